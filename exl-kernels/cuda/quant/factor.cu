// exl_factor_*: the upper factor U of the inverse of a Hessian, (P H P^T + lambda I)^-1 = U^T U, in
// 64-bit floats.
//
// What: the matrix is turned end for end, A = J (P scale H P^T + lambda I) J = L L^T, and U is
// J L^-1 J. Elimination turns A into L^-1 in place, 64 columns at a time: with the block column
// P = A[.., k] M^T and M = L[k][k]^-1,
//     row block k, left of the diagonal  B[k][j] <- M B[k][j],  B[k][k] = M
//     rows below, right of column k      A[i][j] -= P[i] P[j]^T
//     rows below, left of it             B[i][j] -= P[i] B[k][j],  B[i][k] = -P[i] M
// where B is what L^-1 has become so far. Only tiles on and below the diagonal are used.
// `diagonal` has one block and is bound by latency; `update` is a product in 64-bit floats, dim^3 / 3
// multiplications in all.

#include "common/common.cuh"

namespace {
constexpr int TILE = 64;
constexpr int DEPTH = 16;

// sum[i][j] += left[ti + 16 i] . right[tj + 16 j] over DEPTH columns.
__device__ __forceinline__ void multiply(double (&sum)[4][4], const double (&left)[DEPTH][TILE],
                                         const double (&right)[DEPTH][TILE]) {
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
#pragma unroll
    for (int t = 0; t < DEPTH; ++t) {
        double a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] = left[t][ti + 16 * i];
            b[i] = right[t][tj + 16 * i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] = fma(a[i], b[j], sum[i][j]);
    }
}
}  // namespace

// a [dim, dim], lower triangle; status = 1.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_factor_load(const float* h, const int* order, double* a, int* status, int dim, double scale,
                    double lambda) {
    pdl_launch();
    pdl_wait();
    const int i = blockIdx.x;
    if (i == 0 && threadIdx.x == 0) *status = 1;
    // What is no feature gives NaN, never a read elsewhere.
    const u32 mine = order[dim - 1 - i];
    for (int j = threadIdx.x; j <= i; j += blockDim.x) {
        const u32 other = order[dim - 1 - j];
        const bool known = mine < u32(dim) && other < u32(dim);
        double x = known ? double(h[(long long)mine * dim + other]) * scale : double(nanf(""));
        a[(long long)i * dim + j] = i == j ? x + lambda : x;
    }
}

// M of the diagonal block at `at`, in place; zeros above its diagonal. A pivot that is not positive
// clears the status, and the numbers that follow mean nothing.
extern "C" __global__ void __launch_bounds__(256, 1)
    exl_factor_diagonal(double* a, int* status, int at, int dim) {
    __shared__ double s[TILE][TILE + 1];
    __shared__ double p[TILE];
    pdl_launch();
    pdl_wait();
    const int size = min(TILE, dim - at);
    for (int n = threadIdx.x; n < size * size; n += blockDim.x) {
        const int i = n / size, j = n % size;
        s[i][j] = j <= i ? a[(long long)(at + i) * dim + at + j] : 0.0;
    }
    __syncthreads();
    for (int k = 0; k < size; ++k) {
        double pivot = s[k][k];
        if (!(pivot > 0.0) || pivot > 1e300) {
            if (threadIdx.x == 0) *status = 0;
            pivot = 1.0;
        }
        const double m = 1.0 / sqrt(pivot);
        __syncthreads();
        for (int n = threadIdx.x; n < size; n += blockDim.x) {
            if (n > k) p[n] = s[n][k] * m;
            if (n < k) s[k][n] *= m;
            if (n == k) s[k][k] = m;
        }
        __syncthreads();
        for (int n = threadIdx.x; n < size * size; n += blockDim.x) {
            const int i = n / size, j = n % size;
            if (i <= k || j > i) continue;
            if (j > k) {
                s[i][j] -= p[i] * p[j];
            } else if (j < k) {
                s[i][j] -= p[i] * s[k][j];
            } else {
                s[i][k] = -p[i] * m;
            }
        }
        __syncthreads();
    }
    for (int n = threadIdx.x; n < size * size; n += blockDim.x) {
        const int i = n / size, j = n % size;
        a[(long long)(at + i) * dim + at + j] = s[i][j];
    }
}

// Block b of the grid: row block b below the diagonal gives P[b] = A[b][k] M^T, column block b left
// of it B[k][b] = M B[k][b], in place. panel: [dim, TILE].
extern "C" __global__ void __launch_bounds__(256, 2)
    exl_factor_panel(double* a, double* panel, int at, int dim) {
    __shared__ double left[DEPTH][TILE], right[DEPTH][TILE];
    pdl_launch();
    pdl_wait();
    const int b0 = blockIdx.x * TILE;
    if (b0 == at) return;
    const int size = min(TILE, dim - at);
    const bool below = b0 > at;
    double sum[4][4] = {};
    for (int first = 0; first < size; first += DEPTH) {
        __syncthreads();
        for (int n = threadIdx.x; n < DEPTH * TILE; n += blockDim.x) {
            // Neighbouring threads read neighbours in memory.
            const int t = first + n % DEPTH, i = n / DEPTH;
            const bool inside = t < size && i < size;
            const double m = inside ? a[(long long)(at + i) * dim + at + t] : 0.0;
            if (below) {
                const bool row = t < size && b0 + i < dim;
                left[n % DEPTH][i] = row ? a[(long long)(b0 + i) * dim + at + t] : 0.0;
                right[n % DEPTH][i] = m;
            } else {
                left[n % DEPTH][i] = m;
                const int t2 = first + n / TILE, j = n % TILE;
                right[n / TILE][j] = t2 < size ? a[(long long)(at + t2) * dim + b0 + j] : 0.0;
            }
        }
        __syncthreads();
        multiply(sum, left, right);
    }
    // Every element of the block was read.
    __syncthreads();
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = ti + 16 * i, c = tj + 16 * j;
            if (below) {
                if (b0 + r < dim) panel[(long long)(b0 + r) * TILE + c] = sum[i][j];
            } else if (r < size) {
                a[(long long)(at + r) * dim + b0 + c] = sum[i][j];
            }
        }
}

// Row blocks below block column `at`, which is whole here.
extern "C" __global__ void __launch_bounds__(256, 2)
    exl_factor_update(double* a, const double* panel, int at, int dim) {
    __shared__ double left[DEPTH][TILE], right[DEPTH][TILE];
    pdl_launch();
    pdl_wait();
    const int i0 = at + TILE + blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    if (j0 > i0) return;
    double sum[4][4] = {};
    for (int first = 0; first < TILE; first += DEPTH) {
        __syncthreads();
        for (int n = threadIdx.x; n < DEPTH * TILE; n += blockDim.x) {
            const int t = first + n % DEPTH, i = n / DEPTH;
            const bool row = i0 + i < dim;
            left[n % DEPTH][i] = row ? panel[(long long)(i0 + i) * TILE + t] : 0.0;
            if (j0 > at) {
                const bool column = j0 + i < dim;
                right[n % DEPTH][i] = column ? panel[(long long)(j0 + i) * TILE + t] : 0.0;
            } else {
                const int t2 = first + n / TILE, j = n % TILE;
                right[n / TILE][j] = a[(long long)(at + t2) * dim + j0 + j];
            }
        }
        __syncthreads();
        multiply(sum, left, right);
    }
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = i0 + ti + 16 * i, c = j0 + tj + 16 * j;
            if (r >= dim || c > r) continue;
            double* out = a + (long long)r * dim + c;
            *out = (j0 == at ? 0.0 : *out) - sum[i][j];
        }
}

// upper[r][c] = L^-1 turned end for end, zeros below the diagonal. Clears the status when a number
// is not finite or a pivot not positive.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_factor_store(const double* a, float* upper, int* status, int dim) {
    pdl_launch();
    pdl_wait();
    const int r = blockIdx.x;
    const double* row = a + (long long)(dim - 1 - r) * dim;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        const float v = c < r ? 0.0f : float(row[dim - 1 - c]);
        upper[(long long)r * dim + c] = v;
        if (!(fabsf(v) <= 3.4e38f) || (c == r && !(v > 0.0f))) *status = 0;
    }
}
