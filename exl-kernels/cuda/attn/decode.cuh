// What the kernels of few query rows share: the keys of a warp, the merge of warps and of blocks
// (decode.cu, decode_quantized.cu).
#pragma once

#include "fresh.cuh"

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

// Merges the chunks of a tile one after the other: the bits of a block that goes through all of them.
template <class Walk, class Fresh>
__device__ __forceinline__ void merge_in_order(const Attention& a, const Fresh& fresh, const __half* shared,
                                               int rows, int count) {
    constexpr int D = Walk::DIM;
    const Partials partials(a);
    for (int i = threadIdx.x; i < rows * (a.dim / 4); i += Walk::BLOCK_WARPS * WARP) {
        const int r = i / (a.dim / 4), at = i % (a.dim / 4) * 4;
        const long long cell = row_at<D>(shared + r * Walk::STRIDE).cell;
        float most = minus_infinity(), sum = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int c = 0; c < count; ++c) {
            const long long place = cell * a.splits + c;
            const float2 state = __ldcg(partials.states + place);
            const float4 part =
                __ldcg(reinterpret_cast<const float4*>(partials.values + place * a.dim + at));
            value = fold_value(fold(most, sum, state.x, state.y), value, part);
        }
        const float n = normalizer(sum);
        fresh.leaving().four(a, cell, at).store(
            reinterpret_cast<float4*>(a.out + cell * a.dim + at),
            Walk::finish(make_float4(value.x * n, value.y * n, value.z * n, value.w * n)));
    }
}

// Merges the chunks of a tile, at most MAX_SPLITS. This is all latency: first what each chunk counts for, by
// a warp for each row, then all values, many at a time.
template <class Walk, class Fresh>
__device__ __forceinline__ void merge(const Attention& a, const Fresh& fresh, __half* shared, int rows,
                                      int count) {
    constexpr int D = Walk::DIM, WARPS = Walk::BLOCK_WARPS, EACH = MAX_SPLITS / WARP;
    // Where the warps' sums were: of each row a factor for every chunk.
    float* factors = reinterpret_cast<float*>(shared + Walk::QUERIES);
    const Partials partials(a);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int r = warp; r < rows; r += WARPS) {
        const long long place = (long long)row_at<D>(shared + r * Walk::STRIDE).cell * a.splits;
        float2 state[EACH];
        float most = minus_infinity(), sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int c = lane + i * WARP;
            state[i] = make_float2(minus_infinity(), 0.0f);
            if (c < count) state[i] = __ldcg(partials.states + place + c);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) most = fmaxf(most, state[i].x);
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            // A chunk without keys that the row sees counts for nothing, also where no other has any.
            const bool empty = state[i].x == minus_infinity() && state[i].y == 0.0f;
            const float factor = empty ? 0.0f : exp2_fast(state[i].x - most);
            sum = fmaf(factor, state[i].y, sum);
            state[i].x = factor;
        }
        const float n = normalizer(warp_sum(sum));
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (lane + i * WARP < count) factors[r * MAX_SPLITS + lane + i * WARP] = state[i].x * n;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (a.dim / 4); i += WARPS * WARP) {
        const int r = i / (a.dim / 4), at = i % (a.dim / 4) * 4;
        const long long cell = row_at<D>(shared + r * Walk::STRIDE).cell;
        const float* from = partials.values + cell * a.splits * a.dim + at;
        const float* factor = factors + r * MAX_SPLITS;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int c = 0; c < count; c += Walk::MERGE) {
            float4 part[Walk::MERGE];
#pragma unroll
            for (int j = 0; j < Walk::MERGE; ++j) {
                part[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (c + j < count) {
                    part[j] = __ldcg(
                        reinterpret_cast<const float4*>(from + (long long)(c + j) * a.dim));
                }
            }
#pragma unroll
            for (int j = 0; j < Walk::MERGE; ++j) {
                if (c + j < count) value = fold_value({1.0f, factor[c + j]}, value, part[j]);
            }
        }
        fresh.leaving().four(a, cell, at).store(reinterpret_cast<float4*>(a.out + cell * a.dim + at),
                                                Walk::finish(value));
    }
}

// The kernel: Walk goes through the keys of a warp (decode.cu says what it has). `fresh`: what it rotates and
// appends.
template <class Walk, class Fresh = AllStored>
__device__ __forceinline__ void attend(const Attention& a, const Fresh& fresh = {}) {
    constexpr int D = Walk::DIM, WARPS = Walk::BLOCK_WARPS, ROWS = Walk::TILE_ROWS;
    extern __shared__ __align__(16) unsigned char memory[];
    __half* shared = reinterpret_cast<__half*>(memory);
    __shared__ float states[WARPS][ROWS][2], running[ROWS][2];
    // Here, not in registers, which are scarce.
    __shared__ Chunks chunks;
    __shared__ int query_rows;
    if (!Fresh::SOME_FRESH) pdl_launch();
    // The step block is there before the first kernel of a step.
    const Tile tile = Fresh::template find<ROWS>(a, blockIdx.x);
    Pages pages;
    if constexpr (Fresh::SOME_FRESH) pages.load(a, tile.seq, 0);
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
    fresh.leaving().prefetch(a, tile, d.kv_head);
    auto turns = d.turns(found, split);
    if constexpr (!Fresh::SOME_FRESH) pages.load(a, tile.seq, turns.first / PAGE_TOKENS);
    constexpr int EACH = ROWS / WARPS, AT_ONCE = D > 128 || EACH < 4 ? 2 : 4;
    // The keys in front of the sequence's rows are there as well, in the cache itself (ops.rs: PagedAttn).
    const bool rehearses = fresh.rehearses();
    if constexpr (Fresh::SOME_FRESH) {
        if (!rehearses) d.fill(pages, turns);
        fresh.prepare(a, tile.start);
        __syncthreads();
    }
    // A rehearsal goes through all that comes once the row is there, with whatever lies there before: then the
    // instructions are at hand when it matters. Nothing of it is kept.
#pragma unroll 1
    for (bool real = !rehearses;; real = true) {
        if constexpr (Fresh::SOME_FRESH) {
            const long long slot = fresh.r.slots[tile.start];
            if (real) {
                if (rehearses) {
                    d.fill(pages, turns);
                    // What is loaded from here on is little.
                    pdl_launch();
                }
                pdl_wait();
            }
            const float unit = score_unit(a);
            typename Fresh::Part parts[Fresh::EACH];
#pragma unroll
            for (int i = 0; i < Fresh::EACH; ++i) parts[i] = fresh.part(a, tile.start, d.kv_head, i);
            fresh.template store_rows<ROWS>(a, tile, d.kv_head, unit, Walk::query_rows(shared));
            // Who has the last key appends it.
            const bool appends = real && tile.from == 0 && (a.splits == 1 || split == found.count - 1);
#pragma unroll
            for (int i = 0; i < Fresh::EACH; ++i) fresh.put(a, parts[i], i, slot, d.kv_head, appends);
            d.fresh = {fresh.key(), fresh.value()};
        } else {
            const int there = tile.len - (tile.end - tile.start);
            const bool early = a.stored && d.fill_end(turns) <= there;
            if (early) d.fill(pages, turns);
            pdl_wait();
            if (!early) d.fill(pages, turns);
            store_rows<D, WARPS, EACH, AT_ONCE>(a, tile, d.kv_head, d.warp, Walk::query_rows(shared));
        }
        __syncthreads();
        // Not before: instructions that are not at hand would come behind the weights that the next launch asks for.
        if (Fresh::SOME_FRESH && real) pdl_launch();
        for (int chunk = split;; ++chunk) {
            d.clear();
            d.run(pages, real ? turns : Turns{turns.first, min(turns.count, 1)});
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
#pragma unroll(Fresh::SOME_FRESH ? 1 : WARPS)
                for (int w = 0; w < WARPS; ++w) {
                    const float* sums = Walk::sums(shared, w);
                    const float2 f = fold(most, sum, states[w][r][0], states[w][r][1]);
                    value = fold_value(
                        f, value, *reinterpret_cast<const float4*>(sums + r * Walk::STRIDE + at));
                }
                if (shares) {
                    if (!real) continue;
                    const long long place = cell * a.splits + split;
                    __stcg(reinterpret_cast<float4*>(partials.values + place * a.dim + at), value);
                    if (at == 0) __stcg(partials.states + place, make_float2(most, sum));
                    continue;
                }
                float4* to = reinterpret_cast<float4*>(a.out + cell * a.dim + at);
                const Leaving::Four left = fresh.leaving().four(a, cell, at);
                float all_most = running[r][0], all_sum = running[r][1];
                float4 all = chunk == split ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;
                all = fold_value(fold(all_most, all_sum, most, sum), all, value);
                if (ends) {
                    const float n = normalizer(all_sum);
                    all = Walk::finish(make_float4(all.x * n, all.y * n, all.z * n, all.w * n));
                }
                if (real && ends) {
                    left.store(to, all);
                } else if (real) {
                    *to = all;
                }
            }
            if (ends || !real) break;
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
        if (real) break;
        __syncthreads();
    }
    if (a.splits == 1 || chunks.count == 1) return;

    if (!arrives_last(a.counters + blockIdx.x * a.kv_heads + d.kv_head, chunks.count)) return;
    if (a.chunk > 0) {
        merge_in_order<Walk>(a, fresh, shared, query_rows, chunks.count);
    } else {
        merge<Walk>(a, fresh, shared, query_rows, chunks.count);
    }
}
