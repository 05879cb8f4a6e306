// What the kernels of a group's scales share: the format's grid and the candidates for its maximum.
//
// The arithmetic is that of the quantizer on the CPU, operation by operation: products and sums
// that the compiler must not fuse are written as intrinsics.
#pragma once

#include "common/common.cuh"

namespace group {

constexpr int COLS = 32;      // columns of a block, one per lane
constexpr int PARTS = 8;      // warps of a block
constexpr int THREADS = COLS * PARTS;
constexpr int GRID = 20;      // tabulated scales of a column (ops/gptq.rs)
constexpr int MAXIMA = 48;    // values of h that are judged
constexpr int FINALISTS = 3;  // values of h that are evaluated exactly
constexpr int TILE_ROWS = 64; // rows in shared memory at a time
constexpr float H_MIN = 1.0f / 16777216.0f;
constexpr float H_MAX = 255.875f;
constexpr float ROUND = 12582912.0f;  // adding and subtracting it rounds to the nearest integer

// Factors by value.
struct Grid { float ratio[GRID]; };
struct Maxima { float factor[MAXIMA]; };

// One group of rows and where it is worked on.
struct Group {
    const float* w;        // [rows, n] of the group: not yet rounded, compensated
    const float* pivot;    // U[first][first]; the next ones are `stride` floats apart
    long long stride;
    int rows, n, bits;
};

__device__ __forceinline__ float half_round(float v) { return __half2float(__float2half_rn(v)); }

__device__ __forceinline__ float low_code(int bits) { return -float(1 << (bits - 1)); }
__device__ __forceinline__ float high_code(int bits) { return float((1 << (bits - 1)) - 1); }

// h as every decoder takes it from the stored maximum 256 h.
__device__ __forceinline__ float stored_h(float h) {
    return half_round(half_round(__fmul_rn(h, 256.0f)) / 256.0f);
}
__device__ __forceinline__ float scale_value(float h, int code) {
    float s = float(code) + 1.0f;
    return half_round(__fmul_rn(__fmul_rn(s, s), h));
}

__device__ __forceinline__ float inverse(float s) { return s > 0.0f ? __fdiv_rn(1.0f, s) : 0.0f; }

// Weighted squared rounding error of one weight.
__device__ __forceinline__ float loss_of(float w, float scale, float inv, float weight, float lo,
                                         float hi) {
    float q = __fsub_rn(__fadd_rn(__fmul_rn(w, inv), ROUND), ROUND);
    q = q < lo ? lo : q;
    q = q > hi ? hi : q;
    float e = __fsub_rn(w, __fmul_rn(q, scale));
    return __fmul_rn(__fmul_rn(weight, e), e);
}

// Largest of `count` values that are not negative; all threads of the block get it.
__device__ __forceinline__ float block_max(const float* values, int count, long long stride,
                                           float* shared) {
    float m = 0.0f;
    for (int i = threadIdx.x; i < count; i += THREADS) m = fmaxf(m, values[i * stride]);
    shared[threadIdx.x] = m;
    __syncthreads();
    for (int d = THREADS / 2; d > 0; d /= 2) {
        if (threadIdx.x < d) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + d]);
        __syncthreads();
    }
    m = shared[0];
    __syncthreads();
    return m;
}

// 1 / U[r][r]^2, what an error in a row costs.
__device__ __forceinline__ float row_cost(const Group& g, int r) {
    float u = g.pivot[r * g.stride];
    return __fdiv_rn(1.0f, __fmul_rn(u, u));
}

// Largest cost of the group's rows: only ratios matter, and they keep sums in range.
__device__ __forceinline__ float top_cost(const Group& g, float* shared) {
    float m = 0.0f;
    for (int r = threadIdx.x; r < g.rows; r += THREADS) m = fmaxf(m, row_cost(g, r));
    shared[threadIdx.x] = m;
    __syncthreads();
    for (int d = THREADS / 2; d > 0; d /= 2) {
        if (threadIdx.x < d) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + d]);
        __syncthreads();
    }
    m = shared[0];
    __syncthreads();
    return m;
}

// Rows first..first + count of the block's columns and their costs.
__device__ __forceinline__ void load_tile(float (&tile)[TILE_ROWS][COLS], float (&cost)[TILE_ROWS],
                                          const Group& g, float top, int first, int count) {
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS;
    __syncthreads();
    for (int r = part; r < count; r += PARTS) {
        tile[r][c] = g.w[(long long)(first + r) * g.n + blockIdx.x * COLS + c];
    }
    for (int r = threadIdx.x; r < count; r += THREADS) {
        cost[r] = __fdiv_rn(row_cost(g, first + r), top);
    }
    __syncthreads();
}

// Values of h around the one that gives the widest column the code 16, without repetitions.
// Returns how many; every thread of the block calls it.
__device__ __forceinline__ int candidates(float (&list)[MAXIMA], const Maxima& maxima, float widest,
                                          int* count) {
    if (threadIdx.x < MAXIMA) {
        float h = __fdiv_rn(widest, 256.0f);
        float x = __fmul_rn(__fmul_rn(h, 0.45f), maxima.factor[threadIdx.x]);
        list[threadIdx.x] = half_round(fminf(fmaxf(x, H_MIN), H_MAX));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int n = 1;
        for (int i = 1; i < MAXIMA; ++i) {
            if (list[i] != list[n - 1]) list[n++] = list[i];
        }
        *count = n;
    }
    __syncthreads();
    return *count;
}

}  // namespace group
