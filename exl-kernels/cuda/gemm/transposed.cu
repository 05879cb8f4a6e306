// exl_transposed_product: out += alpha (a - minus)^T b with a, minus [rows, m], b [rows, n] and out
// [m, n], in 32-bit floats; minus may be none.
//
// What: a block computes a tile of 128 x 128; 256 threads with 8 x 8 sums each, 8 rows of both at a
// time in shared memory, the next 8 in registers meanwhile. Every sum runs over the rows in order.
// Bound by 32-bit arithmetic: rows m n multiplications.

#include "common/common.cuh"

namespace {
constexpr int TILE = 128;
constexpr int DEPTH = 8;
constexpr int THREADS = 256;
constexpr int STRIDE = THREADS / TILE;
constexpr int EACH = DEPTH / STRIDE;
}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    exl_transposed_product(const float* a, const float* minus, const float* b, float* out, int rows,
                           int m, int n, float alpha) {
    __shared__ float left[DEPTH][TILE], right[DEPTH][TILE];
    pdl_launch();
    pdl_wait();
    const int i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    const int ti = threadIdx.x / 16 * 4, tj = threadIdx.x % 16 * 4;
    // A thread fetches one column of each: rows r, r + STRIDE, and so on of every step.
    const int r = threadIdx.x / TILE, c = threadIdx.x % TILE;
    const bool in_left = i0 + c < m, in_right = j0 + c < n;
    const float* from = a + (long long)r * m + i0 + c;
    const float* less = minus + (long long)r * m + i0 + c;
    const float* other = b + (long long)r * n + j0 + c;
    float next_left[EACH], next_right[EACH];
    auto fetch = [&](int first) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const bool inside = first + r + e * STRIDE < rows;
            next_left[e] = inside && in_left ? *from : 0.0f;
            if (minus && inside && in_left) next_left[e] -= *less;
            next_right[e] = inside && in_right ? *other : 0.0f;
            from += (long long)STRIDE * m;
            less += (long long)STRIDE * m;
            other += (long long)STRIDE * n;
        }
    };
    float sum[8][8] = {};
    fetch(0);
    for (int first = 0; first < rows; first += DEPTH) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            left[r + e * STRIDE][c] = next_left[e];
            right[r + e * STRIDE][c] = next_right[e];
        }
        __syncthreads();
        if (first + DEPTH < rows) fetch(first + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float x[8], y[8];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float4 u = *reinterpret_cast<const float4*>(&left[k][ti + 64 * h]);
                const float4 v = *reinterpret_cast<const float4*>(&right[k][tj + 64 * h]);
                x[4 * h] = u.x, x[4 * h + 1] = u.y, x[4 * h + 2] = u.z, x[4 * h + 3] = u.w;
                y[4 * h] = v.x, y[4 * h + 1] = v.y, y[4 * h + 2] = v.z, y[4 * h + 3] = v.w;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int row = i0 + ti + i % 4 + i / 4 * 64, col = j0 + tj + j % 4 + j / 4 * 64;
            if (row < m && col < n) out[(long long)row * n + col] += alpha * sum[i][j];
        }
}
