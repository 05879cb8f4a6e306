// What rotation with append to the cache does (rope/rope_append.cu), by the attention behind it: of sequences with
// one row each, which sees the keys in front of it and its own. Its own key and value come from shared memory, so
// that all other keys can be loaded before the launch in front has ended. The same bits as of two launches.
#pragma once

#include "attn.cuh"
#include "common/places.cuh"
#include "rope/rope.cuh"

// How one row is left once more, in the order of the product behind attention; not at all by default. The host fills
// this struct word by word: lower/attention/fresh.rs.
struct Leaving {
    const u32* order = nullptr;   // where that has its inputs, [heads, dim]
    float* ordered = nullptr;     // what that reads

    // Four values, those of a head from value `at` on.
    struct Four {
        Places places;
        float* ordered;

        __device__ __forceinline__ void store(float4* to, const float4& v) const {
            if (ordered) places.store(ordered, v);
            *to = v;
        }
    };
    __device__ __forceinline__ Four four(const Attention& a, long long head, int at) const {
        return {Places(order, int(head) * a.dim + at), ordered};
    }
    // Asks for what a tile looks up there, by the whole block.
    __device__ __forceinline__ void prefetch(const Attention& a, const Tile& tile, int kv_head) const {
        const int line = 32 * threadIdx.x;
        if (!order || line >= tile.count * a.dim) return;
        const int head = kv_head * (a.heads / a.kv_heads) + tile.from;
        asm volatile("prefetch.global.L1 [%0];" ::"l"(order + head * a.dim + line));
    }
};

// The host fills this struct word by word: lower/attention/fresh.rs.
struct Rotation {
    const float *k, *v;               // [rows, kv_heads, dim]
    const int *positions, *slots;     // [axes, rows], [rows]
    const float* inv_freq;            // [pairs]
    __half *k_cache, *v_cache;
    int pairs, interleaved;           // with 2, otherwise with 4 pairs a time
    int second, third;                // as in Positions
    float factor;
    int rehearses;                    // the launch in front leaves room for all blocks of this one, which wait for it
    Leaving leaving;
};

// Nothing is fresh: rotated queries, and all keys are in the cache.
struct AllStored {
    static constexpr bool SOME_FRESH = false;
    Leaving own = {};

    __device__ __forceinline__ bool rehearses() const { return false; }
    __device__ __forceinline__ const Leaving& leaving() const { return own; }

    template <int ROWS>
    __device__ __forceinline__ static Tile find(const Attention& a, int slot) {
        return find_tile<ROWS>(a, slot);
    }
};

// The tile of slot `slot`, as find_tile's, where each sequence has one row: what has to be loaded is known at once.
template <int ROWS>
__device__ __forceinline__ Tile find_row(const Attention& a, int slot) {
    const int group = a.heads / a.kv_heads;
    const auto first = [&](int seq) { return seq * group / ROWS + seq; };
    int seq = slot * ROWS / (group + ROWS);
    while (seq + 1 < a.seqs && first(seq + 1) <= slot) ++seq;
    const int len = a.kv_len[seq], from = (slot - first(seq)) * ROWS;
    const int position = len - 1;
    return {seq, seq, seq + 1, len, from, min(ROWS, group - from), first_key(a, position), len};
}

// Of one row of a KV head, by THREADS threads. Shared memory: angles of the pairs, then key and value of D halves.
template <int D, int THREADS>
struct Fresh {
    static constexpr bool SOME_FRESH = true;
    static constexpr int BYTES = D / 2 * int(sizeof(float2)) + 2 * D * int(sizeof(__half));
    // Four values each of key and value, of a thread.
    static constexpr int EACH = (D / 2 + THREADS - 1) / THREADS;

    const Rotation& r;
    float2* turns;
    __half* rows;

    template <int ROWS>
    __device__ __forceinline__ static Tile find(const Attention& a, int slot) {
        return find_row<ROWS>(a, slot);
    }

    __device__ __forceinline__ Fresh(const Rotation& r, char* shared)
        : r(r), turns(reinterpret_cast<float2*>(shared)), rows(reinterpret_cast<__half*>(turns + D / 2)) {}

    __device__ __forceinline__ bool rehearses() const { return r.rehearses; }
    __device__ __forceinline__ const Leaving& leaving() const { return r.leaving; }
    __device__ __forceinline__ const __half* key() const { return rows; }
    __device__ __forceinline__ const __half* value() const { return rows + D; }

    // The angles, before the row is there. By the whole block; a barrier must follow.
    __device__ __forceinline__ void prepare(const Attention& a, int row) const {
        const Positions positions = {r.positions, a.rows, r.second, r.third};
#pragma unroll 1
        for (int p = threadIdx.x; p < r.pairs; p += THREADS) {
            turns[p] = rotation(positions.at(row, p), r.inv_freq[p], r.factor);
        }
    }

    // Four values of a head from value `at` on, and those that they are paired with. From L2: a rehearsal may have
    // loaded what was there before.
    struct Four {
        float4 own, other;
    };
    __device__ __forceinline__ static float4 load_4(const float* at) {
        return __ldcg(reinterpret_cast<const float4*>(at));
    }
    __device__ __forceinline__ Four load(const float* head, int at) const {
        const bool apart = !r.interleaved && at < 2 * r.pairs;
        const int other = !apart ? at : at < r.pairs ? at + r.pairs : at - r.pairs;
        return {load_4(head + at), load_4(head + other)};
    }
    __device__ __forceinline__ float4 rotated(const Four& four, int at) const {
        const float4 v = four.own, w = four.other;
        if (at >= 2 * r.pairs) return v;
        if (r.interleaved) {
            const float2 a = turned(v.x, v.y, turns[at / 2]), b = turned(v.z, v.w, turns[at / 2 + 1]);
            return make_float4(a.x, a.y, b.x, b.y);
        }
        const bool first = at < r.pairs;
        const float2* turn = turns + (first ? at : at - r.pairs);
        const auto half = [&](float own, float other, float2 turn) {
            return first ? turned(own, other, turn).x : turned(other, own, turn).y;
        };
        return make_float4(half(v.x, w.x, turn[0]), half(v.y, w.y, turn[1]), half(v.z, w.z, turn[2]),
                           half(v.w, w.w, turn[3]));
    }

    // Stores the queries of a tile, rotated. Unlike store_rows this is short, as instructions that are not at hand
    // take longer than they run: a warp has a row at a time, and rows that are not there keep what lies there,
    // which their products alone see. `unit`: score_unit(). By the whole block.
    template <int ROWS, class Rows>
    __device__ __forceinline__ void store_rows(const Attention& a, const Tile& tile, int kv_head, float unit,
                                               const Rows& to) const {
        const int first = tile.start * a.heads + kv_head * (a.heads / a.kv_heads) + tile.from;
#pragma unroll 1
        for (int r = threadIdx.x / WARP; r < ROWS; r += THREADS / WARP) {
            Row row = {-1, 1.0f, -1};
            if (r < tile.count) {
                row.position = tile.len - 1;
                row.cell = first + r;
                const float* q = a.q + (long long)row.cell * a.dim;
                Query<D> query;
#pragma unroll
                for (int i = 0; i < Query<D>::N; ++i) {
                    const int at = 4 * (threadIdx.x % WARP) + 128 * i;
                    query.values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (at < a.dim) query.values[i] = rotated(load(q, at), at);
                }
                const float down = query.store(
                    a.scale < 0.0f, [&](int at, uint2 high, uint2 low) { to.put(r, at, high, low); });
                // score_factor(), which would divide by the soft-cap.
                row.factor = score_scale(a, down) * unit;
            }
            if (threadIdx.x % WARP == 0) to.put(r, row);
        }
    }

    // A thread's part of the key or of the value.
    struct Part {
        Four four;
        int at;
        bool is_value;
    };
    __device__ __forceinline__ Part part(const Attention& a, int row, int kv_head, int round) const {
        const int i = threadIdx.x + round * THREADS;
        Part p = {{}, (i % (D / 4)) * 4, i >= D / 4};
        const long long from = ((long long)row * a.kv_heads + kv_head) * a.dim;
        if (i >= D / 2 || p.at >= a.dim) return p;
        p.four = p.is_value ? Four{load_4(r.v + from + p.at), {}} : load(r.k + from, p.at);
        return p;
    }
    // Rotates the key and puts both into shared memory and, if `appends`, into the cache at token `slot`. By the
    // whole block; a barrier must follow.
    __device__ __forceinline__ void put(const Attention& a, const Part& p, int round, long long slot,
                                        int kv_head, bool appends) const {
        if (int(threadIdx.x) + round * THREADS >= D / 2) return;
        const float4 v = p.is_value ? p.four.own : rotated(p.four, p.at);
        const uint2 four = four_halves(v.x, v.y, v.z, v.w);
        *reinterpret_cast<uint2*>(rows + (p.is_value ? D : 0) + p.at) = four;
        if (!appends || p.at >= a.dim) return;
        __half* to = (p.is_value ? r.v_cache : r.k_cache) + (slot * a.kv_heads + kv_head) * a.dim;
        *reinterpret_cast<uint2*>(to + p.at) = four;
    }
};
