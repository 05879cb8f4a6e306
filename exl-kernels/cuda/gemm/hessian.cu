// exl_hessian_syrk: h += x^T x with x [rows, dim] and h [dim, dim], both triangles, in 32-bit floats.
//
// What: a block computes a tile of 64 x 64 on or above the diagonal and adds it to both triangles;
// 256 threads with 4 x 4 sums each, 16 rows of x at a time in shared memory. Every sum runs over
// the rows in order. Bound by 32-bit arithmetic: rows dim^2 multiplications.

#include "common/common.cuh"

namespace {
constexpr int TILE = 64;
constexpr int STEP = 16;
}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2)
    exl_hessian_syrk(const float* x, float* h, int rows, int dim) {
    __shared__ float left[STEP][TILE], right[STEP][TILE];
    pdl_launch();
    pdl_wait();
    const int i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    if (j0 < i0) return;
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
    float sum[4][4] = {};
    for (int first = 0; first < rows; first += STEP) {
        __syncthreads();
        for (int n = threadIdx.x; n < STEP * TILE; n += blockDim.x) {
            int r = n / TILE, c = n % TILE;
            const float* row = x + (long long)(first + r) * dim;
            bool inside = first + r < rows;
            left[r][c] = inside && i0 + c < dim ? row[i0 + c] : 0.0f;
            right[r][c] = inside && j0 + c < dim ? row[j0 + c] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < STEP; ++r) {
            float a[4], b[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                a[n] = left[r][ti + 16 * n];
                b[n] = right[r][tj + 16 * n];
            }
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int m = 0; m < 4; ++m) sum[n][m] = fmaf(a[n], b[m], sum[n][m]);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            int i = i0 + ti + 16 * n, j = j0 + tj + 16 * m;
            if (i < dim && j < dim) {
                h[(long long)i * dim + j] += sum[n][m];
                // Tiles on the diagonal hold both triangles already.
                if (i0 != j0) h[(long long)j * dim + i] += sum[n][m];
            }
        }
}
