// exl_attn_decode_*: attention of few query rows per sequence over a cache of 16-bit floats, on
// tensor cores, the keys of a sequence spread over several blocks.
//
// What: a block takes up to 16 packed rows (attn.cuh) of one sequence and KV head and one chunk of
// its keys; the last block of a tile to arrive merges the chunks. Where chunks have fixed places it does so in
// order, and with one block per tile (splits 1) that block goes through them and folds them in the same
// order: the same bits.
//
// exl_attn_decode_rope_*: also what exl_rope_append_f16 does, of sequences with one row each (fresh.cuh); rotated
// queries are not left in memory. Their code is short where it can be: at one row it is executed once, and most
// of it has to come from L2.
//
// Queries and weights are two 16-bit terms each, sums are 32-bit floats: about the accuracy of 32-bit
// arithmetic.
//
// Warps work apart until the chunk ends: of every 16 * WARPS keys, warp w takes keys 16 w .. 16 w + 15
// through its own ring of STAGES K and V tiles, filled by asynchronous copies. Rows in shared memory
// are D + 8 halves long: eight of them at 16 bytes each touch all banks once (ldmatrix).
//
// Bytes: K and V of the sequence once per tile, so once when heads * tokens <= 16 * kv_heads. Bound:
// memory; the products take about a quarter of the time on compute capability 9.0.
//
// exl: spills-allowed exl_attn_decode_256 two registers from 10.0 on, stored before and read after
// the loop over keys
// exl: spills-allowed exl_attn_decode_rope_256 the same

#include "decode.cuh"

namespace {

constexpr int ROWS = 16;   // query rows of a tile

template <int D, int WARPS, int STAGES>
struct Shape {
    static constexpr int STRIDE = D + 8;
    // Halves: a K or V tile, a warp's ring, both terms of the queries.
    static constexpr int TILE = KEYS * STRIDE;
    static constexpr int RING = 2 * STAGES * TILE;
    static constexpr int QUERIES = 2 * ROWS * STRIDE;
    // The ring becomes the warp's sums [ROWS][STRIDE] in the end.
    static_assert(RING * 2 >= ROWS * STRIDE * 4, "sums fit the ring");
};

// Copies the rows of keys `key .. key + KEYS` of a KV head to shared memory; those outside [from, to)
// and what lies beyond `dim` become zeros.
template <int D>
__device__ __forceinline__ void copy_keys(__half* tile, const __half* rows, int pitch, int key,
                                          int from, int to, int dim) {
    // Lanes side by side in a row, 16 bytes each.
    constexpr int LANES = D % 64 == 0 ? 8 : 4, STEP = WARP / LANES;
    const int lane = threadIdx.x % WARP, row = lane / LANES, at = lane % LANES * 8;
    tile += row * (D + 8) + at;
    rows += row * pitch + at;
#pragma unroll
    for (int i = 0; i < KEYS; i += STEP) {
        const bool there = key + row + i >= from && key + row + i < to;
#pragma unroll
        for (int j = 0; j < D; j += LANES * 8) {
            cp_async_16_zfill(tile + i * (D + 8) + j, rows + j, there && at + j < dim ? 16 : 0);
        }
        rows += STEP * pitch;
    }
}

// The key and the value of the last position, which are not in the cache yet, in shared memory.
template <bool SOME_FRESH>
struct FreshRows {
    const __half *key = nullptr, *value = nullptr;
};
template <>
struct FreshRows<false> {};

template <int D, int WARPS, int STAGES, bool SOME_FRESH = false>
struct Decode {
    using S = Shape<D, WARPS, STAGES>;
    static constexpr int DIM = D, BLOCK_WARPS = WARPS, TILE_ROWS = ROWS, STRIDE = S::STRIDE;
    static constexpr int QUERIES = S::QUERIES;   // halves
    static constexpr int MERGE = 8;   // chunks that are merged at a time

    const Attention& a;
    const Tile& tile;
    const int kv_head, warp, lane;
    __half *queries, *ring;   // of the block, of this warp
    // Of rows lane / 4 and lane / 4 + 8: maximum, sum of the weights of this lane's keys, values of
    // columns 8 n + 2 (lane % 4), + 1.
    float most[2], sum[2], values[D / 8][4];
    FreshRows<SOME_FRESH> fresh;

    __device__ __forceinline__ Decode(const Attention& a, const Tile& tile, __half* shared)
        : a(a), tile(tile), kv_head(blockIdx.y), warp(threadIdx.x / WARP),
          lane(threadIdx.x % WARP), queries(shared), ring(shared + S::QUERIES + warp * S::RING) {}

    __device__ __forceinline__ void clear() {
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

    // Raw products of the 16 rows with the 16 keys of a K tile: raw[h][2 j + i] is row
    // lane / 4 + 8 h, key 8 j + 2 (lane % 4) + i.
    //
    // The first operand is a query tile: matrices of rows 0-7 and 8-15 by columns 0-7, then by
    // columns 8-15, so lane l names row l % 16, column 8 (l / 16). The second is K^T, whose columns
    // are the stored rows: matrices of keys 0-7 by values 0-7 and 8-15, then keys 8-15, so lane l
    // names key l % 8 + 8 (l / 16), value 8 (l / 8 % 2).
    __device__ __forceinline__ void products(const __half* k, float (&raw)[2][4]) const {
        const u32 high = smem_address(queries + lane % 16 * S::STRIDE + lane / 16 * 8);
        const u32 low = high + ROWS * S::STRIDE * 2;
        const u32 keys = smem_address(k + (lane % 8 + lane / 16 * 8) * S::STRIDE + lane / 8 % 2 * 8);
        float large[2][4] = {}, small[2][4] = {};
#pragma unroll(D > 128 ? 2 : 4)
        for (int step = 0; step < D / 16; ++step) {
            u32 b[4], hi[4], lo[4];
            ldmatrix_x4(b, keys + step * 32);
            ldmatrix_x4(hi, high + step * 32);
            ldmatrix_x4(lo, low + step * 32);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                mma_f16(large[j], hi, b[2 * j], b[2 * j + 1]);
                mma_f16(small[j], lo, b[2 * j], b[2 * j + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[i / 2][2 * j + i % 2] = large[j][i] + small[j][i];
        }
    }

    // values = values * keep + weights * V. The products' layout of 16 rows by 16 keys is that of a
    // first operand: registers of rows 0-7 and 8-15 by keys 0-7, then by keys 8-15. The second is
    // V: matrices of keys 0-7 and 8-15 by columns 0-7, then by columns 8-15, transposed, so lane l
    // names key l % 16, column 8 (l / 16).
    __device__ __forceinline__ void weigh(const __half* v, const float (&weights)[2][4],
                                          const float (&keep)[2]) {
        const u32 keys = smem_address(v + lane % 16 * S::STRIDE + lane / 16 * 8);
        u32 hi[4], lo[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = i % 2, j = i / 2;
            split(weights[h][2 * j], weights[h][2 * j + 1], hi[i], lo[i]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            u32 b[4];
            // Keeps the loads of later columns from taking all registers.
            if (D > 128 && n % (D > 192 ? 1 : 4) == 0) __syncwarp();
            ldmatrix_x4_trans(b, keys + n * 32);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float added[4] = {};
                mma_f16(added, lo, b[2 * j], b[2 * j + 1]);
                mma_f16(added, hi, b[2 * j], b[2 * j + 1]);
                float(&to)[4] = values[2 * n + j];
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i] = fmaf(to[i], keep[i / 2], added[i]);
            }
        }
    }

    __device__ __forceinline__ Turns turns(const Chunks& chunks, int chunk) const {
        return find_turns<WARPS>(tile, chunks, chunk, warp);
    }
    __device__ __forceinline__ const __half* rows(const void* cache, Pages& pages, int key) const {
        return static_cast<const __half*>(cache) +
               (pages.token(a, tile.seq, key) * a.kv_heads + kv_head) * a.dim;
    }
    __device__ __forceinline__ __half* k_tile(int turn) const {
        return ring + turn % STAGES * 2 * S::TILE;
    }
    __device__ __forceinline__ __half* v_tile(int turn) const { return k_tile(turn) + S::TILE; }
    __device__ __forceinline__ void start(__half* to, const void* cache, Pages& pages,
                                          const Turns& t, int turn) const {
        if (turn < t.count) {
            const int key = t.first + turn * KEYS * WARPS;
            copy_keys<D>(to, rows(cache, pages, key), a.kv_heads * a.dim, key,
                         tile.keys_from, tile.keys_to - (SOME_FRESH ? 1 : 0), a.dim);
        }
        // Empty groups keep the count of what is under way the same.
        cp_async_commit();
    }

    // Puts what is not in the cache into a tile that has been copied, if the turn has it. By the whole warp.
    __device__ __forceinline__ void complete(__half* tile_rows, const __half* row, const Turns& t,
                                             int turn) const {
        const int at = tile.keys_to - 1 - (t.first + turn * KEYS * WARPS);
        if (at < 0 || at >= KEYS) return;
        for (int i = lane; i < D / 8; i += WARP) {
            reinterpret_cast<uint4*>(tile_rows + at * S::STRIDE)[i] = reinterpret_cast<const uint4*>(row)[i];
        }
        __syncwarp();
    }

    // Behind the last key of which fill() loads something.
    __device__ __forceinline__ int fill_end(const Turns& t) const { return keys_end<WARPS>(t, STAGES); }
    __device__ __forceinline__ void fill(Pages& pages, const Turns& t) const {
#pragma unroll 1
        for (int turn = 0; turn < STAGES; ++turn) {
            start(k_tile(turn), a.k_cache, pages, t, turn);
            start(v_tile(turn), a.v_cache, pages, t, turn);
        }
    }

    // Goes through the keys whose first STAGES turns fill() has started.
    __device__ __forceinline__ void run(Pages& pages, const Turns& t) {
        for (int turn = 0; turn < t.count; ++turn) {
            const int key = t.first + turn * KEYS * WARPS + lane % 4 * 2;
            float raw[2][4], keep[2];
            cp_async_wait<2 * STAGES - 1>();
            __syncwarp();
            if constexpr (SOME_FRESH) complete(k_tile(turn), fresh.key, t, turn);
            products(k_tile(turn), raw);
            __syncwarp();
            start(k_tile(turn), a.k_cache, pages, t, turn + STAGES);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Row row = row_at<D>(queries + (lane / 4 + 8 * h) * S::STRIDE);
                const int from = first_key(a, row.position);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = key + i / 2 * 8 + i % 2;
                    if (a.softcap > 0.0f) raw[h][i] = capped(a, raw[h][i], row.factor);
                    if (at > row.position || at < from) raw[h][i] = minus_infinity();
                }
                const float factor = a.softcap > 0.0f ? 1.0f : row.factor;
                keep[h] = soften(raw[h], factor, most[h], sum[h]);
            }
            cp_async_wait<2 * STAGES - 1>();
            __syncwarp();
            if constexpr (SOME_FRESH) complete(v_tile(turn), fresh.value, t, turn);
            weigh(v_tile(turn), raw, keep);
            __syncwarp();
            start(v_tile(turn), a.v_cache, pages, t, turn + STAGES);
        }
        cp_async_wait<0>();
        __syncwarp();
    }

    static __device__ __forceinline__ PaddedRows<D, ROWS, 2> query_rows(__half* shared) {
        return {shared};
    }
    // A warp's sums, and what becomes of a mean before it is written.
    static __device__ __forceinline__ const float* sums(const __half* shared, int warp) {
        return reinterpret_cast<const float*>(shared + S::QUERIES + warp * S::RING);
    }
    static __device__ __forceinline__ float4 finish(float4 mean) { return mean; }

    // The warp's result to shared memory, over its ring: sums [ROWS][STRIDE].
    __device__ __forceinline__ void leave(float (*states)[ROWS][2]) {
        float* to = reinterpret_cast<float*>(ring);
        const int row = lane / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float all = sum[h];
            all += __shfl_xor_sync(FULL_MASK, all, 1);
            all += __shfl_xor_sync(FULL_MASK, all, 2);
            if (lane % 4 == 0) {
                states[warp][row + 8 * h][0] = most[h];
                states[warp][row + 8 * h][1] = all;
            }
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                *reinterpret_cast<float2*>(to + (row + 8 * h) * S::STRIDE + 8 * n + lane % 4 * 2) =
                    make_float2(values[n][2 * h], values[n][2 * h + 1]);
            }
        }
    }
};

}  // namespace

#define DECODE(NAME, D, WARPS, STAGES, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS) exl_attn_decode_##NAME(     \
        ATTENTION_PARAMETERS) {                                                                   \
        attend<Decode<D, WARPS, STAGES>>(ATTENTION_ARGUMENTS);                                            \
    }
#define DECODE_ROPE(D, WARPS, BLOCKS)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS) exl_attn_decode_rope_##D(    \
        ATTENTION_PARAMETERS, const __grid_constant__ Rotation rotation) {                         \
        typedef Fresh<D, WARPS * WARP> Own;                                                        \
        __shared__ __align__(16) char own[Own::BYTES];                                             \
        attend<Decode<D, WARPS, 2, true>>(ATTENTION_ARGUMENTS, Own(rotation, own));                \
    }
// Heads of up to D values.
DECODE(64, 64, 4, 2, 3)
DECODE(96, 96, 4, 2, 2)
DECODE(128, 128, 4, 2, 2)
DECODE(256, 256, 2, 2, 2)
// The same with blocks half as large, for many sequences.
DECODE(128_many, 128, 2, 2, 4)
// With rotation and append.
DECODE_ROPE(64, 4, 3)
DECODE_ROPE(96, 4, 2)
DECODE_ROPE(128, 4, 2)
DECODE_ROPE(256, 2, 2)
