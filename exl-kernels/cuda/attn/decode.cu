// exl_attn_decode_*: attention of few query rows per sequence over a cache of 16-bit floats, on
// tensor cores, the keys of a sequence spread over several blocks.
//
// What: a block takes up to 16 packed rows (attn.cuh) of one sequence and KV head and one chunk of
// its keys; the last block of a tile to arrive merges the chunks in order. With one block per tile
// (splits 1) that block goes through the chunks and folds them in the same order: the same bits.
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

#include "attn.cuh"

namespace {

constexpr int ROWS = 16;   // query rows of a tile
constexpr int KEYS = 16;   // keys of a warp at a time

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

// Block table entries of a sequence from page `from`, one per lane.
struct Pages {
    int from, id;

    __device__ __forceinline__ void load(const Attention& a, int seq, int page) {
        const int last = a.pages_per_seq - 1;
        from = page;
        id = a.block_table[(long long)seq * (last + 1) + min(page + int(threadIdx.x % WARP), last)];
    }
    // First token of the group of keys at `key` in the cache. The same key in all lanes.
    __device__ __forceinline__ long long token(const Attention& a, int seq, int key) {
        const int page = key / PAGE_TOKENS;
        if (page >= from + WARP) load(a, seq, page);
        return (long long)__shfl_sync(FULL_MASK, id, page - from) * PAGE_TOKENS + key % PAGE_TOKENS;
    }
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

template <int D, int WARPS, int STAGES>
struct Decode {
    using S = Shape<D, WARPS, STAGES>;

    const Attention& a;
    const Tile& tile;
    const int kv_head, warp, lane;
    __half *queries, *ring;   // of the block, of this warp
    // Of rows lane / 4 and lane / 4 + 8: maximum, sum of the weights of this lane's keys, values of
    // columns 8 n + 2 (lane % 4), + 1.
    float most[2], sum[2], values[D / 8][4];

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

    // The keys of a warp.
    struct Turns {
        int first, count;   // key of the first turn, number of turns
    };
    __device__ __forceinline__ Turns turns(const Chunks& chunks, int chunk) const {
        const int begin = chunks.origin + (chunks.first + chunk) * chunks.size;
        const int end = min(begin + chunks.size, tile.keys_to);
        // Whole turns of the block that no row sees are left out.
        const int skipped = max(tile.keys_from - begin, 0) / (KEYS * WARPS);
        const int first = begin + skipped * KEYS * WARPS + warp * KEYS;
        return {first, (max(end - first, 0) + KEYS * WARPS - 1) / (KEYS * WARPS)};
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
                         tile.keys_from, tile.keys_to, a.dim);
        }
        // Empty groups keep the count of what is under way the same.
        cp_async_commit();
    }

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
            weigh(v_tile(turn), raw, keep);
            __syncwarp();
            start(v_tile(turn), a.v_cache, pages, t, turn + STAGES);
        }
        cp_async_wait<0>();
        __syncwarp();
    }

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

template <int D, int WARPS, int STAGES>
__device__ __forceinline__ void attend(const Attention& a) {
    using S = Shape<D, WARPS, STAGES>;
    extern __shared__ __align__(16) unsigned char memory[];
    __half* shared = reinterpret_cast<__half*>(memory);
    __shared__ float states[WARPS][ROWS][2], running[ROWS][2];
    // Here, not in registers, which are scarce.
    __shared__ Chunks chunks;
    __shared__ int query_rows;
    pdl_launch();
    pdl_wait();
    const Tile tile = find_tile<ROWS>(a, blockIdx.x);
    if (tile.count <= 0) return;
    const Chunks found = find_chunks(a, tile.keys_from, tile.keys_to);
    const int split = blockIdx.z;
    if (split >= found.count) return;

    Decode<D, WARPS, STAGES> d(a, tile, shared);
    if (threadIdx.x < ROWS) {
        running[threadIdx.x][0] = minus_infinity();
        running[threadIdx.x][1] = 0.0f;
    }
    if (threadIdx.x == 0) {
        chunks = found;
        query_rows = tile.count;
    }
    auto turns = d.turns(found, split);
    Pages pages;
    pages.load(a, tile.seq, turns.first / PAGE_TOKENS);
    d.fill(pages, turns);
    store_rows<D, WARPS, ROWS / WARPS, (D > 128 ? 2 : 4)>(a, tile, d.kv_head, d.warp,
                                                        PaddedRows<D, ROWS, 2>{shared});
    __syncthreads();
    for (int chunk = split;; ++chunk) {
        d.clear();
        d.run(pages, turns);
        d.leave(states);
        __syncthreads();

        // Warps in order, then what earlier chunks left in `out`.
        const Partials partials(a);
        const bool shares = a.splits > 1 && chunks.count > 1;
        const bool ends = a.splits > 1 || chunk + 1 == chunks.count;
        for (int i = threadIdx.x; i < query_rows * (a.dim / 4); i += WARPS * WARP) {
            const int r = i / (a.dim / 4), at = i % (a.dim / 4) * 4;
            const long long cell = row_at<D>(shared + r * S::STRIDE).cell;
            float most = minus_infinity(), sum = 0.0f;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* sums =
                    reinterpret_cast<const float*>(shared + S::QUERIES + w * S::RING);
                const float2 f = fold(most, sum, states[w][r][0], states[w][r][1]);
                value = fold_value(
                    f, value, *reinterpret_cast<const float4*>(sums + r * S::STRIDE + at));
            }
            if (shares) {
                const long long place = cell * a.splits + split;
                __stcg(reinterpret_cast<float4*>(partials.values + place * a.dim + at), value);
                if (at == 0) __stcg(partials.states + place, make_float2(most, sum));
                continue;
            }
            float4* to = reinterpret_cast<float4*>(a.out + cell * a.dim + at);
            float all_most = running[r][0], all_sum = running[r][1];
            float4 all = chunk == split ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;
            all = fold_value(fold(all_most, all_sum, most, sum), all, value);
            if (ends) {
                const float n = normalizer(all_sum);
                all = make_float4(all.x * n, all.y * n, all.z * n, all.w * n);
            }
            *to = all;
        }
        if (ends) break;
        __syncthreads();
        if (threadIdx.x < ROWS) {
            const int r = threadIdx.x;
            float most = minus_infinity(), sum = 0.0f;
            for (int w = 0; w < WARPS; ++w) fold(most, sum, states[w][r][0], states[w][r][1]);
            fold(running[r][0], running[r][1], most, sum);
        }
        __syncthreads();
        turns = d.turns(chunks, chunk + 1);
        pages.load(a, tile.seq, turns.first / PAGE_TOKENS);
        d.fill(pages, turns);
    }
    if (a.splits == 1 || chunks.count == 1) return;

    if (!arrives_last(a.counters + blockIdx.x * a.kv_heads + d.kv_head, chunks.count)) return;
    const Partials partials(a);
    for (int i = threadIdx.x; i < query_rows * (a.dim / 4); i += WARPS * WARP) {
        const int r = i / (a.dim / 4), at = i % (a.dim / 4) * 4;
        const long long cell = row_at<D>(shared + r * S::STRIDE).cell;
        float most = minus_infinity(), sum = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int c = 0; c < chunks.count; ++c) {
            const long long place = cell * a.splits + c;
            const float2 state = __ldcg(partials.states + place);
            const float4 part =
                __ldcg(reinterpret_cast<const float4*>(partials.values + place * a.dim + at));
            value = fold_value(fold(most, sum, state.x, state.y), value, part);
        }
        const float n = normalizer(sum);
        *reinterpret_cast<float4*>(a.out + cell * a.dim + at) =
            make_float4(value.x * n, value.y * n, value.z * n, value.w * n);
    }
}

}  // namespace

#define DECODE(NAME, D, WARPS, STAGES, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS) exl_attn_decode_##NAME(     \
        ATTENTION_PARAMETERS) {                                                                   \
        attend<D, WARPS, STAGES>(ATTENTION_ARGUMENTS);                                            \
    }
// Heads of up to D values.
DECODE(64, 64, 4, 2, 3)
DECODE(96, 96, 4, 2, 2)
DECODE(128, 128, 4, 2, 2)
DECODE(256, 256, 2, 2, 2)
// The same with blocks half as large, for many sequences.
DECODE(128_many, 128, 2, 2, 4)
