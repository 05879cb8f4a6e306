// exl_loss_tiles, exl_loss_sum: tr(D^T H D) with D = a - b (or a alone), the squared output error
// that a change of weights makes.
//
// What: a block computes a tile of 64 x 64 of H D in 32-bit floats, 16 rows of both at a time in
// shared memory (H is symmetric, so its columns are read as rows), multiplies it by D and adds up in
// 64 bits. The second kernel adds the blocks' sums in a fixed order. Bound by 32-bit arithmetic:
// dim^2 columns multiplications.

#include "common/common.cuh"

namespace {
constexpr int TILE = 64;
constexpr int DEPTH = 16;
}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2)
    exl_loss_tiles(const float* h, const float* a, const float* b, double* parts, int dim,
                   int columns) {
    __shared__ float left[DEPTH][TILE], right[DEPTH][TILE];
    __shared__ double sums[256];
    pdl_launch();
    pdl_wait();
    const int r0 = blockIdx.y * TILE, c0 = blockIdx.x * TILE;
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
    auto change = [&](int r, int c) -> float {
        if (r >= dim || c >= columns) return 0.0f;
        const long long at = (long long)r * columns + c;
        return b ? a[at] - b[at] : a[at];
    };
    float sum[4][4] = {};
    for (int first = 0; first < dim; first += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < DEPTH * TILE; i += blockDim.x) {
            const int k = first + i / TILE, j = i % TILE;
            const bool inside = k < dim && r0 + j < dim;
            left[i / TILE][j] = inside ? h[(long long)k * dim + r0 + j] : 0.0f;
            right[i / TILE][j] = change(k, c0 + j);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = left[k][ti + 16 * i];
                y[i] = right[k][tj + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
        }
    }
    double mine = 0.0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            mine += double(sum[i][j]) * double(change(r0 + ti + 16 * i, c0 + tj + 16 * j));
        }
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int d = 128; d > 0; d /= 2) {
        if (threadIdx.x < d) sums[threadIdx.x] += sums[threadIdx.x + d];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[(long long)blockIdx.y * gridDim.x + blockIdx.x] = sums[0];
}

// One block; out[0] = factor * sum of the parts.
extern "C" __global__ void __launch_bounds__(256, 1)
    exl_loss_sum(const double* parts, float* out, int count, double factor) {
    __shared__ double sums[256];
    pdl_launch();
    pdl_wait();
    double mine = 0.0;
    for (int i = threadIdx.x; i < count; i += 256) mine += parts[i];
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int d = 128; d > 0; d /= 2) {
        if (threadIdx.x < d) sums[threadIdx.x] += sums[threadIdx.x + d];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[0] = float(factor * sums[0]);
}
