// exl_refine_load, _begin, _pull, _settle, _pass: coordinate descent over the codes of a matrix.
//
// With all rows rounded each code is set once more to what is best for its column given all others.
// For D = weight - decoded and the damped Hessian H in packed order, P = H D pulls at every code:
// the best value of row r is decoded[r] + P[r] / H[r][r]. Columns are independent:
//   load    H in packed order: scale h + lambda I
//   begin   copies codes and decoded values, which are bettered in place
//   pull    P = H D
//   settle  a panel of at most 128 rows, 32 at a time; changes reach the panel inside the block
//   pass    a panel's changes reach all other rows: P[r, :] += sum_p H[p][r] change[p, :]
// A block of `settle` has 32 columns; its first warp settles with a column per lane and the rows of a
// step in registers, then all eight pass the changes on. `pull` and `pass` are products in 32-bit
// floats with tiles of 128 x 128, bound by arithmetic: inputs^2 outputs multiplications each round.

#include "quant/group.cuh"

using namespace group;

namespace {
constexpr int STEP = 32;    // rows settled before their changes are passed on
constexpr int PANEL = 128;  // rows settled before their changes leave the block
constexpr int TILE = 128;   // tile of the products
constexpr int DEPTH = 8;
constexpr int OWN = 8;      // rows and columns of a tile that a thread has

// Adds to `sum` what rows first..end of H [k, k] and of a matrix make of the tile at (r0, c0):
// H is symmetric, so that its rows serve as columns. `right(p, c)` is 0 where there is nothing.
template <class Right>
__device__ __forceinline__ void multiply(float (&sum)[OWN][OWN], const float* h, int first, int end,
                                         int r0, int c0, int k, Right right) {
    __shared__ __align__(16) float left_tile[DEPTH][TILE], right_tile[DEPTH][TILE];
    const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
    for (int from = first; from < end; from += DEPTH) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < DEPTH * TILE / THREADS; ++t) {
            const int i = t * THREADS + threadIdx.x, p = from + i / TILE, j = i % TILE;
            const bool inside = p < end && r0 + j < k;
            left_tile[i / TILE][j] = inside ? h[(long long)p * k + r0 + j] : 0.0f;
            right_tile[i / TILE][j] = p < end ? right(p, c0 + j) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int p = 0; p < DEPTH; ++p) {
            float a[OWN], b[OWN];
            // Two runs of four apart by half a tile: no bank serves two threads of a warp.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = half * TILE / 2;
                *reinterpret_cast<float4*>(&a[4 * half]) =
                    *reinterpret_cast<const float4*>(&left_tile[p][at + 4 * ti]);
                *reinterpret_cast<float4*>(&b[4 * half]) =
                    *reinterpret_cast<const float4*>(&right_tile[p][at + 4 * tj]);
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i)
#pragma unroll
                for (int j = 0; j < OWN; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
    }
}

// Offset in its tile of what a thread has at index i.
__device__ __forceinline__ int place(int thread, int i) { return i / 4 * (TILE / 2) + 4 * thread + i % 4; }
}  // namespace

// packed[r][c] = scale h[order[r]][order[c]], plus lambda on the diagonal. A block per row.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_refine_load(const float* h, const int* order, float* packed, int k, double scale,
                    double lambda) {
    pdl_launch();
    pdl_wait();
    const int r = blockIdx.x;
    const u32 feature = order[r];
    const float* from = h + (long long)feature * k;
    float* to = packed + (long long)r * k;
    for (int c = threadIdx.x; c < k; c += THREADS) {
        const u32 other = order[c];
        // What is no feature gives NaN, never a read elsewhere.
        const bool known = feature < u32(k) && other < u32(k);
        const double value = known ? double(from[other]) * scale : double(nanf(""));
        to[c] = float(c == r ? value + lambda : value);
    }
}

// Copies a row of codes and one of decoded values. A block per row.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_refine_begin(const u8* codes, const float* decoded, u8* new_codes, float* new_decoded, int n) {
    pdl_launch();
    pdl_wait();
    const long long row = (long long)blockIdx.x * n;
    for (int c = threadIdx.x; c < n; c += THREADS) {
        new_codes[row + c] = codes[row + c];
        new_decoded[row + c] = decoded[row + c];
    }
}

// pull = packed (weight - decoded), its rows in packed order. A block per tile.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    exl_refine_pull(const float* packed, const int* order, const float* weight, const float* decoded,
                    float* pull, int k, int n) {
    pdl_launch();
    pdl_wait();
    const int r0 = blockIdx.y * TILE, c0 = blockIdx.x * TILE;
    float sum[OWN][OWN] = {};
    multiply(sum, packed, 0, k, r0, c0, k, [&](int p, int c) -> float {
        const u32 feature = order[p];
        if (c >= n || feature >= u32(k)) return 0.0f;
        const long long at = (long long)feature * n + c;
        return weight[at] - decoded[at];
    });
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            const int r = r0 + place(threadIdx.x / 16, i), c = c0 + place(threadIdx.x % 16, j);
            if (r < k && c < n) pull[(long long)r * n + c] = sum[i][j];
        }
}

// Where the rows of a panel's steps have their scales.
struct Steps {
    int group[PANEL / STEP];
    int bits[PANEL / STEP];
};

// Sets the codes of rows first..end, the panel. change: [PANEL, n], decoded values before less
// after.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    exl_refine_settle(float* pull, const float* packed, const int* order, const u8* scale_codes,
                      const int* maxima, u8* codes, float* decoded, float* change, int first, int end,
                      int k, int n, Steps steps) {
    __shared__ float rows[PANEL][COLS], changes[STEP][COLS];
    __shared__ __align__(16) float h[STEP][PANEL];
    pdl_launch();
    pdl_wait();
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS, count = end - first;
    const int column = blockIdx.x * COLS + c;
    for (int r = part; r < count; r += PARTS) rows[r][c] = pull[(long long)(first + r) * n + column];
    for (int step = 0; step < count; step += STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < STEP * PANEL; i += THREADS) {
            const int r = i / PANEL, j = i % PANEL;
            const long long at = (long long)(first + step + r) * k + first + j;
            if (j < count) h[r][j] = packed[at];
        }
        __syncthreads();
        if (part == 0) {
            const int group = steps.group[step / STEP], bits = steps.bits[step / STEP];
            const float lo = low_code(bits), hi = high_code(bits);
            const __half maximum = __ushort_as_half(u16(maxima[group]));
            const float scale = scale_value(half_round(__half2float(maximum) / 256.0f),
                                            scale_codes[(long long)group * n + column]);
            // All loads first: what is stored below could be what is loaded next.
            float v[STEP], before[STEP];
#pragma unroll
            for (int r = 0; r < STEP; ++r) {
                const u32 feature = order[first + step + r];
                const bool known = feature < u32(k);
                v[r] = rows[step + r][c];
                before[r] = known ? decoded[(long long)feature * n + column] : 0.0f;
            }
#pragma unroll
            for (int r = 0; r < STEP; ++r) {
                const float curve = h[r][step + r];
                const u32 feature = order[first + step + r];
                float changed = 0.0f;
                if (curve > 0.0f && scale > 0.0f && feature < u32(k)) {
                    const float best = before[r] + __fdiv_rn(v[r], curve);
                    const float q = fminf(fmaxf(rintf(__fdiv_rn(best, scale)), lo), hi);
                    const float d = half_round(__fmul_rn(q, scale));
                    codes[(long long)(first + step + r) * n + column] = u8(int(q - lo));
                    decoded[(long long)feature * n + column] = d;
                    changed = before[r] - d;
                }
                changes[r][c] = changed;
                change[(long long)(step + r) * n + column] = changed;
#pragma unroll
                for (int j = 0; j < STEP; ++j) v[j] = fmaf(h[r][step + j], changed, v[j]);
            }
#pragma unroll
            for (int r = 0; r < STEP; ++r) rows[step + r][c] = v[r];
        }
        __syncthreads();
        for (int j = part; j < count; j += PARTS) {
            if (j / STEP == step / STEP) continue;
            float sum = 0.0f;
#pragma unroll
            for (int r = 0; r < STEP; ++r) sum = fmaf(h[r][j], changes[r][c], sum);
            rows[j][c] += sum;
        }
    }
    __syncthreads();
    for (int r = part; r < count; r += PARTS) pull[(long long)(first + r) * n + column] = rows[r][c];
}

// pull[r, :] += sum over the panel's rows p of packed[p][r] change[p - first, :], for all rows r but
// those of the panel first..end, which is a tile of its own. A block per tile.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    exl_refine_pass(float* pull, const float* packed, const float* change, int first, int end, int k,
                    int n) {
    pdl_launch();
    pdl_wait();
    const int r0 = blockIdx.y * TILE, c0 = blockIdx.x * TILE;
    if (r0 == first) return;
    float sum[OWN][OWN] = {};
    multiply(sum, packed, first, end, r0, c0, k, [&](int p, int c) -> float {
        return c < n ? change[(long long)(p - first) * n + c] : 0.0f;
    });
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            const int r = r0 + place(threadIdx.x / 16, i), c = c0 + place(threadIdx.x % 16, j);
            if (r < k && c < n) pull[(long long)r * n + c] += sum[i][j];
        }
}
