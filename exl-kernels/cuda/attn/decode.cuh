// What the kernels of few query rows share: the keys of a warp, the merge of warps and of blocks
// (decode.cu, decode_quantized.cu).
#pragma once

#include "attn.cuh"

constexpr int KEYS = 16;   // keys of a warp at a time

// Block table entries of a sequence from page `from`, one per lane.
struct Pages {
    int from, id;

    __device__ __forceinline__ void load(const Attention& a, int seq, int page) {
        const int last = a.pages_per_seq - 1;
        from = page;
        id = a.block_table[(long long)seq * (last + 1) + min(page + int(threadIdx.x % WARP), last)];
    }
    // The page in the cache that has `key`, which is the same in all lanes.
    __device__ __forceinline__ int of(const Attention& a, int seq, int key) {
        const int page = key / PAGE_TOKENS;
        if (page >= from + WARP) load(a, seq, page);
        return __shfl_sync(FULL_MASK, id, page - from);
    }
    // First token of the group of keys at `key` in the cache.
    __device__ __forceinline__ long long token(const Attention& a, int seq, int key) {
        return (long long)of(a, seq, key) * PAGE_TOKENS + key % PAGE_TOKENS;
    }
};

// The keys of a warp.
struct Turns {
    int first, count;   // key of the first turn, number of turns
};
template <int WARPS>
__device__ __forceinline__ Turns find_turns(const Tile& tile, const Chunks& chunks, int chunk,
                                            const int& warp) {
    const int begin = chunks.origin + (chunks.first + chunk) * chunks.size;
    const int end = min(begin + chunks.size, tile.keys_to);
    // Whole turns of the block that no row sees are left out.
    const int skipped = max(tile.keys_from - begin, 0) / (KEYS * WARPS);
    const int first = begin + skipped * KEYS * WARPS + warp * KEYS;
    return {first, (max(end - first, 0) + KEYS * WARPS - 1) / (KEYS * WARPS)};
}

// Behind the last key of the first `turns` turns.
template <int WARPS>
__device__ __forceinline__ int keys_end(const Turns& t, int turns) {
    return t.first + (max(min(t.count, turns), 1) - 1) * KEYS * WARPS + KEYS;
}

// The kernel: Walk goes through the keys of a warp (decode.cu says what it has).
template <class Walk>
__device__ __forceinline__ void attend(const Attention& a) {
    constexpr int D = Walk::DIM, WARPS = Walk::BLOCK_WARPS, ROWS = Walk::TILE_ROWS;
    extern __shared__ __align__(16) unsigned char memory[];
    __half* shared = reinterpret_cast<__half*>(memory);
    __shared__ float states[WARPS][ROWS][2], running[ROWS][2];
    // Here, not in registers, which are scarce.
    __shared__ Chunks chunks;
    __shared__ int query_rows;
    pdl_launch();
    // The step block is there before the first kernel of a step.
    const Tile tile = find_tile<ROWS>(a, blockIdx.x);
    const Chunks found = find_chunks(a, tile.keys_from, tile.keys_to);
    const int split = blockIdx.z;
    if (tile.count <= 0 || split >= found.count) {
        pdl_wait();   // what follows must not see this kernel end before those that it follows
        return;
    }

    Walk d(a, tile, shared);
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
    // So are, in the cache itself, the keys in front of the sequence's rows (ops.rs: PagedAttn).
    const int there = tile.len - (tile.end - tile.start);
    const bool early = a.stored && d.fill_end(turns) <= there;
    if (early) d.fill(pages, turns);
    pdl_wait();
    if (!early) d.fill(pages, turns);
    constexpr int EACH = ROWS / WARPS, AT_ONCE = D > 128 || EACH < 4 ? 2 : 4;
    store_rows<D, WARPS, EACH, AT_ONCE>(a, tile, d.kv_head, d.warp, Walk::query_rows(shared));
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
            const long long cell = row_at<D>(shared + r * Walk::STRIDE).cell;
            float most = minus_infinity(), sum = 0.0f;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* sums = Walk::sums(shared, w);
                const float2 f = fold(most, sum, states[w][r][0], states[w][r][1]);
                value = fold_value(
                    f, value, *reinterpret_cast<const float4*>(sums + r * Walk::STRIDE + at));
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
                all = Walk::finish(make_float4(all.x * n, all.y * n, all.z * n, all.w * n));
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
        const long long cell = row_at<D>(shared + r * Walk::STRIDE).cell;
        float most = minus_infinity(), sum = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        // Loads of many chunks at a time: the last block's way through them is all latency.
        constexpr int BATCH = Walk::MERGE;
        for (int c = 0; c < chunks.count; c += BATCH) {
            float2 state[BATCH];
            float4 part[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const long long place = cell * a.splits + c + j;
                state[j] = make_float2(minus_infinity(), 0.0f);
                part[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (c + j >= chunks.count) continue;
                state[j] = __ldcg(partials.states + place);
                part[j] = __ldcg(
                    reinterpret_cast<const float4*>(partials.values + place * a.dim + at));
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                value = fold_value(fold(most, sum, state[j].x, state[j].y), value, part[j]);
            }
        }
        const float n = normalizer(sum);
        *reinterpret_cast<float4*>(a.out + cell * a.dim + at) =
            Walk::finish(make_float4(value.x * n, value.y * n, value.z * n, value.w * n));
    }
}

