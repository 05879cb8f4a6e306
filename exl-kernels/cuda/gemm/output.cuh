// What becomes of the sums of a product: scale of the row, bias, residual, or the gate's activation.
//
// Accumulators of mma and wgmma lie in fragments: lane l holds columns 2 (l % 4) and + 1 of row
// l / 4 of every 8 columns. A warp passes 16 rows at a time through shared memory, so that global
// memory is read and written 16 bytes a lane and the code of the epilogue exists once, not once
// per accumulator.
#pragma once

#include "common/common.cuh"
#include "qgemm/epilogue.cuh"

// out[row, col] = sum * scale[row] + bias[col] + residual[row, col], or with a gate
// out[row, col] = act(gate[row, col]) * (sum * scale[row] + bias[col]).
struct Output {
    float* out;              // rows of `stride` floats, the first n written
    const void* bias;        // [n] or 0
    const float* residual;   // as out, or 0; may be `out`
    const float* gate;       // as out, or 0; may be `out`
    const float* scale;      // [rows] or 0
    int rows, n, stride;
    int bias_type;
    int act;
    int vectors;             // n, stride and the addresses are multiples of 4 floats
};

__device__ __forceinline__ float finished(const Output& o, float sum, float bias, float other) {
    float v = sum + bias;
    if (o.gate) return activate(other, o.act) * v;
    return o.residual ? v + other : v;
}

// Four neighbouring columns; `col` is a multiple of 4.
__device__ __forceinline__ void finish_4(const Output& o, int row, int col, float4 sum) {
    if (row >= o.rows || col >= o.n) return;
    if (o.scale) {
        float s = o.scale[row];
        sum.x *= s;
        sum.y *= s;
        sum.z *= s;
        sum.w *= s;
    }
    const long long at = (long long)row * o.stride + col;
    const float* from = o.gate ? o.gate : o.residual;
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (o.vectors) {
        float4 other = from ? *reinterpret_cast<const float4*>(from + at)
                            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = finished(o, v[i], bias_at(o.bias, o.bias_type, col + i), others[i]);
        }
        *reinterpret_cast<float4*>(o.out + at) = make_float4(v[0], v[1], v[2], v[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (col + i < o.n) {
            float other = from ? from[at + i] : 0.0f;
            o.out[at + i] = finished(o, v[i], bias_at(o.bias, o.bias_type, col + i), other);
        }
    }
}

// Floats of a row of the staging buffer: a multiple of 4 (16-byte reads) that is 8 modulo 32, so
// that the 16 lanes of a phase of 8-byte stores (4 rows, 4 pairs) hit 32 different banks.
template <int COLUMNS>
constexpr int staging_stride() { return COLUMNS + 8; }

template <int COLUMNS>
constexpr int staging_bytes() { return 16 * staging_stride<COLUMNS>() * 4; }

// A warp stores `FRAGMENTS` accumulator fragments of 16 rows and 8 columns each, the first at
// (row, col). `staging` belongs to the warp.
template <int FRAGMENTS>
__device__ __forceinline__ void store_16_rows(const Output& o, float* staging, int row, int col,
                                              const float (*d)[4]) {
    static_assert(FRAGMENTS % 4 == 0, "the staging rows are 8 modulo 32 floats");
    constexpr int STRIDE = staging_stride<8 * FRAGMENTS>();
    const int lane = threadIdx.x % WARP;
    float* at = staging + (lane >> 2) * STRIDE + 2 * (lane & 3);
    __syncwarp();   // the rows before have been read
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
        *reinterpret_cast<float2*>(at + 8 * f) = make_float2(d[f][0], d[f][1]);
        *reinterpret_cast<float2*>(at + 8 * f + 8 * STRIDE) = make_float2(d[f][2], d[f][3]);
    }
    __syncwarp();
    constexpr int VECTORS = 2 * FRAGMENTS;   // of a row
#pragma unroll 1
    for (int e = lane; e < 16 * VECTORS; e += WARP) {
        int r = e / VECTORS, c = 4 * (e % VECTORS);
        finish_4(o, row + r, col + c, *reinterpret_cast<const float4*>(staging + r * STRIDE + c));
    }
}
