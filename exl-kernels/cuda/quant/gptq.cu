// exl_gptq_gather, _round, _update: error-compensated rounding of the rows of a matrix.
//
// What: rows in packed order are rounded one after the other; the error of row r over its pivot is
// taken off every later row j by U[r][j] times it. Columns are independent:
//   gather  w[r, :] = weight[order[r], :], the working copy
//   round   a group of rows, 32 at a time; their errors reach the rest of the panel (whole groups
//           of at most 128 rows together, or one larger group) inside the block
//   update  a panel's errors reach all rows behind it: w[r, :] -= sum_p U[p][r] e[p, :]
// A block of `round` has 32 columns; its first warp rounds with a column per lane and the rows of a
// step in registers, then all eight pass the errors on. `update` is a product in 32-bit floats
// with tiles of 64 x 64, bound by arithmetic: inputs^2 outputs / 2 multiplications in all.

#include "quant/group.cuh"

using namespace group;

namespace {
constexpr int STEP = 32;   // rows rounded before their errors are passed on
constexpr int SLICE = 64;  // later rows whose part of U is in shared memory
constexpr int TILE = 64;   // tile of `update`
constexpr int DEPTH = 16;
}  // namespace

extern "C" __global__ void __launch_bounds__(256, 4)
    exl_gptq_gather(const float* weight, const int* order, float* w, int n) {
    pdl_launch();
    pdl_wait();
    const u32 feature = order[blockIdx.x];
    // What is no feature gives NaN, never a read elsewhere.
    const bool known = feature < gridDim.x;
    const float* from = weight + (known ? (long long)feature * n : 0);
    float* to = w + (long long)blockIdx.x * n;
    for (int c = threadIdx.x; c < n; c += blockDim.x) to[c] = known ? from[c] : nanf("");
}

// Rows first..first + rows of w [k, n] are the group, first..end the rest of its panel, which began
// at row `panel`. errors: [panel rows, n]. codes [k, n], scale_codes [n] and maximum of the group;
// decoded [k, n] in the order of the features. Starts with the choice among the finalists.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    exl_gptq_round(float* w, const float* upper, const int* order, float* errors, u8* codes,
                   u8* scale_codes, int* maximum, float* decoded, const float* finals,
                   const u8* found, const double* exact, int first, int rows, int panel, int end,
                   int k, int n, int bits) {
    __shared__ __align__(16) float u[STEP][STEP];
    __shared__ float e[STEP][COLS], slice[STEP][SLICE];
    __shared__ double sums[THREADS / FINALISTS][FINALISTS];
    __shared__ int chosen;
    pdl_launch();
    pdl_wait();
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS;
    const int column = blockIdx.x * COLS + c;
    const int kept = int(finals[FINALISTS]);
    const float widest = finals[FINALISTS + 1];
    constexpr int LANES = THREADS / FINALISTS;
    if (threadIdx.x < LANES * FINALISTS) {
        const int f = threadIdx.x % FINALISTS, lane = threadIdx.x / FINALISTS;
        double sum = 0.0;
        if (f < kept) {
            for (int b = lane; b < gridDim.x; b += LANES) sum += exact[(long long)b * FINALISTS + f];
        }
        sums[lane][f] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int l = 1; l < LANES; ++l) {
            for (int f = 0; f < FINALISTS; ++f) sums[0][f] += sums[l][f];
        }
        int winner = 0;
        for (int f = 1; f < kept; ++f) {
            if (sums[0][f] < sums[0][winner]) winner = f;
        }
        chosen = winner;
    }
    __syncthreads();
    // Nothing but zeros: the smallest maximum, code 0.
    const bool empty = widest <= 0.0f;
    const float h = empty ? H_MIN : finals[chosen];
    const int code = empty ? 0 : found[(long long)chosen * n + column];
    const float scale = scale_value(stored_h(h), code);
    if (part == 0) scale_codes[column] = u8(code);
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        const int underflow = !empty && __fdiv_rn(widest, 256.0f) < H_MIN;
        *maximum = __half_as_ushort(__float2half_rn(__fmul_rn(h, 256.0f))) | underflow << 16;
    }
    const float lo = low_code(bits), hi = high_code(bits);
    for (int step = first; step < first + rows; step += STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < STEP * STEP; i += THREADS) {
            u[i / STEP][i % STEP] = upper[(long long)(step + i / STEP) * k + step + i % STEP];
        }
        __syncthreads();
        if (part == 0) {
            float v[STEP];
#pragma unroll
            for (int r = 0; r < STEP; ++r) v[r] = w[(long long)(step + r) * n + column];
#pragma unroll
            for (int r = 0; r < STEP; ++r) {
                float q = 0.0f;
                if (scale > 0.0f) q = fminf(fmaxf(rintf(__fdiv_rn(v[r], scale)), lo), hi);
                const float d = half_round(__fmul_rn(q, scale));
                const float error = __fmul_rn(__fsub_rn(v[r], d), __fdiv_rn(1.0f, u[r][r]));
                codes[(long long)(step + r) * n + column] = u8(int(q - lo));
                const u32 feature = order[step + r];
                if (feature < u32(k)) decoded[(long long)feature * n + column] = d;
                errors[(long long)(step + r - panel) * n + column] = error;
                e[r][c] = error;
#pragma unroll
                for (int j = r + 1; j < STEP; ++j) {
                    v[j] = __fsub_rn(v[j], __fmul_rn(u[r][j], error));
                }
            }
        }
        for (int from = step + STEP; from < end; from += SLICE) {
            const int count = min(SLICE, end - from);
            __syncthreads();
            for (int i = threadIdx.x; i < STEP * SLICE; i += THREADS) {
                const int r = i / SLICE, j = i % SLICE;
                if (j < count) slice[r][j] = upper[(long long)(step + r) * k + from + j];
            }
            __syncthreads();
            for (int j = part; j < count; j += PARTS) {
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < STEP; ++r) sum = fmaf(slice[r][j], e[r][c], sum);
                w[(long long)(from + j) * n + column] -= sum;
            }
        }
    }
}

// w[r, :] -= sum over the panel's rows p of upper[p][r] errors[p - panel, :] for end <= r < k.
extern "C" __global__ void __launch_bounds__(256, 2)
    exl_gptq_update(float* w, const float* upper, const float* errors, int panel, int end, int k,
                    int n) {
    __shared__ float left[DEPTH][TILE], right[DEPTH][TILE];
    pdl_launch();
    pdl_wait();
    const int r0 = end + blockIdx.y * TILE, c0 = blockIdx.x * TILE;
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
    float sum[4][4] = {};
    for (int first = panel; first < end; first += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < DEPTH * TILE; i += blockDim.x) {
            const int p = first + i / TILE, j = i % TILE;
            left[i / TILE][j] = r0 + j < k ? upper[(long long)p * k + r0 + j] : 0.0f;
            right[i / TILE][j] = c0 + j < n ? errors[(long long)(p - panel) * n + c0 + j] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int p = 0; p < DEPTH; ++p) {
            float a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = left[p][ti + 16 * i];
                b[i] = right[p][tj + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = r0 + ti + 16 * i, c = c0 + tj + 16 * j;
            if (r < k && c < n) w[(long long)r * n + c] -= sum[i][j];
        }
}
