// What norms share: rows in registers, and sums over a row. Which entry takes a row depends on dim
// alone, so the order of a sum never depends on the number of rows:
//   <lanes>x<vectors>   dim <= 1024: lanes of a warp, each with so many vectors of four elements,
//                       several rows in a block; no barrier
//   <threads>x<vectors> dim <= 16384: a block for each row
//   any                 odd or longer rows: a block for each row, which is read more than once
// All but the last need dim % 4 == 0 and addresses aligned to 16 bytes.
#pragma once

#include "common/types.cuh"

constexpr int LANE_THREADS = 128;
constexpr int ANY_THREADS = 512;

// Thread `at` of STRIDE has the vectors at, at + STRIDE, ... of a row, and 0 beyond.
template <int STRIDE, int V>
__device__ __forceinline__ void load_vectors(float4 (&v)[V], const float* row, int at, int vectors) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        int i = at + j * STRIDE;
        v[j] = i < vectors ? load_4(row, i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

__device__ __forceinline__ float add_squares(float sum, float4 v) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}
template <int V>
__device__ __forceinline__ float squares_of(const float4 (&v)[V]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) sum = add_squares(sum, v[j]);
    return sum;
}

// Likewise the vectors of weights of a row of theirs.
template <int STRIDE, int V, typename W>
__device__ __forceinline__ void load_weights(float4 (&w)[V], const W* weight, int at, int vectors) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        int i = at + j * STRIDE;
        w[j] = i < vectors ? load_4(weight, i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

// Those from element `first` on, of a type known at run time, or `instead` of them where there are none.
template <int STRIDE, int V>
__device__ __forceinline__ void load_weights(float4 (&w)[V], const void* weights, int type,
                                             long long first, int at, int vectors, float instead) {
    if (!weights) {
#pragma unroll
        for (int j = 0; j < V; ++j) w[j] = make_float4(instead, instead, instead, instead);
    } else if (type == TYPE_F16) {
        load_weights<STRIDE>(w, static_cast<const __half*>(weights) + first, at, vectors);
    } else if (type == TYPE_BF16) {
        load_weights<STRIDE>(w, static_cast<const __nv_bfloat16*>(weights) + first, at, vectors);
    } else {
        load_weights<STRIDE>(w, static_cast<const float*>(weights) + first, at, vectors);
    }
}

// The sum over LANES lanes of a warp, the same in all of them.
template <int LANES>
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d >>= 1) v += __shfl_xor_sync(FULL_MASK, v, d);
    return v;
}

// The sum over a block, the same in all threads. Sums of one block that follow each other need different
// numbers: each has memory of its own.
template <int T, int NUMBER = 0>
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float partial[T / WARP];
    v = warp_sum(v);
    const int lane = threadIdx.x % WARP;
    if (lane == 0) partial[threadIdx.x / WARP] = v;
    __syncthreads();
    return warp_sum(lane < T / WARP ? partial[lane] : 0.0f);
}

// Of the sum of squares of what is normalised.
__device__ __forceinline__ float factor_of(float sum, int dim, float eps) {
    return 1.0f / sqrtf(sum / float(dim) + eps);
}

// Four normalised values.
__device__ __forceinline__ float4 scaled(float4 v, float factor, float4 w, float offset) {
    return make_float4(v.x * factor * (w.x + offset), v.y * factor * (w.y + offset),
                       v.z * factor * (w.z + offset), v.w * factor * (w.w + offset));
}
