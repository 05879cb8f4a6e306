// exl_attn_prefill_*: attention of many query rows per sequence over a cache of 16-bit floats, on
// tensor cores.
//
// What: a block takes 64 packed rows (attn.cuh) of one sequence and KV head, a warp 16 of them, and
// goes through all keys that any of them sees, KEYS at a time. The K tile is copied while the warps
// are at V and the other way round. Queries and weights are rounded to 16-bit floats, as the products
// around it round their inputs when there are many rows; a V tile's product starts from zero and is
// added in 32-bit floats, so that errors do not grow with the context.
//
// Rows in shared memory are D + 8 halves long: eight of them at 16 bytes each touch all banks once
// (ldmatrix). Blocks with the longest contexts start first.
//
// Bytes: K and V up to the last row's position for every tile, mostly from the second-level cache.
// Bound: tensor cores.

// exl: spills-allowed exl_attn_prefill_128 one register, once in 64 keys
#include "attn.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int WARP_ROWS = 16;
constexpr int ROWS = WARPS * WARP_ROWS;

// Copies the rows of keys `key .. key + KEYS` of a KV head to shared memory with all threads of the
// block; those outside [from, to) and what lies beyond `dim` become zeros.
template <int D, int KEYS>
__device__ __forceinline__ void copy_keys(__half* tile, const __half* rows, int pitch, int key,
                                          int from, int to, int dim) {
    // Threads side by side in a row, 16 bytes each.
    constexpr int SIDE = D % 64 == 0 ? 8 : 4, STEP = WARPS * WARP / SIDE;
    const int row = threadIdx.x / SIDE, at = threadIdx.x % SIDE * 8;
    tile += row * (D + 8) + at;
    rows += row * pitch + at;
#pragma unroll
    for (int i = 0; i < KEYS; i += STEP) {
        const bool there = key + row + i >= from && key + row + i < to;
#pragma unroll
        for (int j = 0; j < D; j += SIDE * 8) {
            cp_async_16_zfill(tile + i * (D + 8) + j, rows + j, there && at + j < dim ? 16 : 0);
        }
        rows += STEP * pitch;
    }
}

// The 16 rows of a warp. Lane l has rows l / 4 and l / 4 + 8.
template <int D, int KEYS>
struct Rows {
    static constexpr int STRIDE = D + 8;

    int lane;
    // Maximum, sum of the weights of this lane's keys, values of columns 8 n + 2 (lane % 4), + 1.
    float most[2], sum[2], values[D / 8][4];

    __device__ __forceinline__ Rows() : lane(threadIdx.x % WARP) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            most[h] = minus_infinity();
            sum[h] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
        }
    }

    // Products of the rows with a K tile: raw[h][2 n + i] is row lane / 4 + 8 h, key
    // 8 n + 2 (lane % 4) + i.
    //
    // The first operand is a query tile: matrices of rows 0-7 and 8-15 by columns 0-7, then by
    // columns 8-15, so lane l names row l % 16, column 8 (l / 16). The second is K^T, whose columns
    // are the stored rows: matrices of keys 0-7 by values 0-7 and 8-15, then keys 8-15, so lane l
    // names key l % 8 + 8 (l / 16), value 8 (l / 8 % 2).
    __device__ __forceinline__ void products(const __half* query, const __half* k,
                                             float (&raw)[2][KEYS / 4]) const {
        const u32 rows = smem_address(query + lane % 16 * STRIDE + lane / 16 * 8);
        const u32 keys = smem_address(k + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8);
        float sums[KEYS / 8][4] = {};
#pragma unroll 2
        for (int step = 0; step < D / 16; ++step) {
            u32 a[4];
            ldmatrix_x4(a, rows + step * 32);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                u32 b[4];
                ldmatrix_x4(b, keys + n * 16 * STRIDE * 2 + step * 32);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    mma_f16(sums[2 * n + j], a, b[2 * j], b[2 * j + 1]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[i / 2][2 * n + i % 2] = sums[n][i];
        }
    }

    // Products become weights; returns the factors of what was summed before.
    __device__ __forceinline__ void softmax(const Attention& a, float (&raw)[2][KEYS / 4], int key,
                                            bool hides, const __half* query, float (&keep)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Row row = row_at<D>(query + (lane / 4 + 8 * h) * STRIDE);
            keep[h] = soften(a, raw[h], row, key, hides, most[h], sum[h]);
        }
    }

    // values = values * keep + weights * V. The products' layout of 16 rows by 16 keys is that of a
    // first operand: registers of rows 0-7 and 8-15 by keys 0-7, then by keys 8-15. The second is
    // V: matrices of keys 0-7 and 8-15 by columns 0-7, then by columns 8-15, transposed, so lane l
    // names key l % 16, column 8 (l / 16).
    __device__ __forceinline__ void weigh(const __half* v, const float (&weights)[2][KEYS / 4],
                                          const float (&keep)[2]) {
        const u32 keys = smem_address(v + lane % 16 * STRIDE + lane / 16 * 8);
        u32 a[KEYS / 16][4];
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int h = i % 2, j = 4 * k + i / 2 * 2;
                a[k][i] = as_u32(__floats2half2_rn(weights[h][j], weights[h][j + 1]));
            }
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            float sums[2][4] = {};
            // Keeps the loads of later columns from taking all registers.
            __syncwarp();
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                u32 b[4];
                ldmatrix_x4_trans(b, keys + k * 16 * STRIDE * 2 + n * 32);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    mma_f16(sums[j], a[k], b[2 * j], b[2 * j + 1]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float(&to)[4] = values[2 * n + j];
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i] = fmaf(to[i], keep[i / 2], sums[j][i]);
            }
        }
    }
};

template <int D, int KEYS>
__device__ __forceinline__ void attend(const Attention& a) {
    constexpr int STRIDE = D + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    // Queries, K, V.
    __half* queries = reinterpret_cast<__half*>(memory);
    __half *k_tile = queries + ROWS * STRIDE, *v_tile = k_tile + KEYS * STRIDE;
    pdl_launch();
    pdl_wait();
    const Tile tile = find_tile<ROWS>(a, int(gridDim.x - 1 - blockIdx.x));
    if (tile.count <= 0) return;
    const int kv_head = blockIdx.y;
    const auto copy = [&](__half* to, const void* cache, int key) {
        const int page = a.block_table[(long long)tile.seq * a.pages_per_seq + key / PAGE_TOKENS];
        const long long token = (long long)page * PAGE_TOKENS + key % PAGE_TOKENS;
        const __half* rows =
            static_cast<const __half*>(cache) + (token * a.kv_heads + kv_head) * a.dim;
        copy_keys<D, KEYS>(to, rows, a.kv_heads * a.dim, key, tile.keys_from, tile.keys_to, a.dim);
        cp_async_commit();
    };
    const int begin = tile.keys_from / KEYS * KEYS;
    if (begin < tile.keys_to) copy(k_tile, a.k_cache, begin);

    const int warp = threadIdx.x / WARP;
    __half* query = queries + warp * WARP_ROWS * STRIDE;
    store_rows<D, 1, WARP_ROWS, (D > 128 ? 2 : 4)>(a, tile, kv_head, warp * WARP_ROWS,
                                                 PaddedRows<D, ROWS, 1>{queries});
    Rows<D, KEYS> rows;

    for (int key = begin; key < tile.keys_to; key += KEYS) {
        // K is there for all, and all are done with V.
        cp_async_wait<0>();
        __syncthreads();
        copy(v_tile, a.v_cache, key);
        // Whether any row of the warp must not see any of these keys.
        const bool hides = key + KEYS - 1 > row_at<D>(query).position ||
                           key < first_key(a, tile.keys_to - 1);
        float raw[2][KEYS / 4], keep[2];
        rows.products(query, k_tile, raw);
        rows.softmax(a, raw, key, hides, query, keep);
        // V is there for all, and all are done with K.
        cp_async_wait<0>();
        __syncthreads();
        if (key + KEYS < tile.keys_to) copy(k_tile, a.k_cache, key + KEYS);
        rows.weigh(v_tile, raw, keep);
    }

    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int cell = row_at<D>(query + (rows.lane / 4 + 8 * h) * STRIDE).cell;
        write_row(a, cell, rows.sum[h], rows.values, h);
    }
}

}  // namespace

#define PREFILL(D, KEYS, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS) exl_attn_prefill_##D(       \
        ATTENTION_PARAMETERS) {                                                                   \
        attend<D, KEYS>(ATTENTION_ARGUMENTS);                                                     \
    }
// Heads of up to D values.
PREFILL(64, 64, 3)
PREFILL(96, 64, 3)
PREFILL(128, 64, 3)
PREFILL(256, 32, 2)
