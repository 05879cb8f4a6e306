// Products with unquantized weights at full 32-bit accuracy: one warp computes one output column for up
// to eight rows. It streams the column's weights once and takes x, which the block's warps share, from
// the first-level cache.
#pragma once

#include "common/common.cuh"

constexpr int ROWS = 8;   // of a warp

__device__ __forceinline__ void load_row(float (&v)[8], const float* p) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 f = *reinterpret_cast<const float4*>(p + i);
        v[i] = f.x;
        v[i + 1] = f.y;
        v[i + 2] = f.z;
        v[i + 3] = f.w;
    }
}
template <typename T>
__device__ __forceinline__ void load_row(float (&v)[8], const T* p) {
    uint4 w = *reinterpret_cast<const uint4*>(p);
    const T* t = reinterpret_cast<const T*>(&w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(t[i]);
}

// Sums of up to eight rows with one column of weights, complete in lane 0. `row(r)`: where row r of x
// is, for r below `rows`.
template <typename W, typename Row>
__device__ __forceinline__ void dots(float (&sum)[ROWS], const Row& row, const W* w, int rows,
                                     int inputs, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = 0.0f;
    if (inputs % 8 == 0) {
        for (int k = 8 * lane; k < inputs; k += 8 * WARP) {
            float a[8];
            load_row(a, w + k);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r < rows) {
                    float b[8];
                    load_row(b, row(r) + k);
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[r] = fmaf(a[i], b[i], sum[r]);
                }
            }
        }
    } else {
        for (int k = lane; k < inputs; k += WARP) {
            float a = to_float(w[k]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r < rows) {
                    sum[r] = fmaf(a, row(r)[k], sum[r]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = warp_sum(sum[r]);
}
