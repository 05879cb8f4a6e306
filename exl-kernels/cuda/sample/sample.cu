// exl_sample: the next token of each row of logits.
//
// logits F32 [rows, vocab], changed by the penalties; params I32 [rows, 16] (struct Params); recent
// I32 [rows, window], newest first; blocked I32 [rows, blocked_width]; out I32 [rows], -1 for a row
// with a NaN or without any token. Steps in the order of exl-gen's sampler: penalties, blocked ids,
// temperature, top-k, top-p, min-p, the draw; falling logits, equal ones by rising id. Every filter
// keeps a front of that order, and the draw is a place in it.
//
// Grid (chunks, rows). A block takes CHUNK logits: penalties, the largest logit, the largest of
// every GROUP and the sum of the weights. The last block of a row to arrive finds the token: the
// group maxima give a bound that at least so many tokens reach as could matter, these are
// collected, sorted and summed up. Where they do not suffice, exact.cuh looks at the whole row.
// Moves 4 bytes a logit, and a little more for the last block; bound: latency of both phases.

#include "common/common.cuh"
#include "sample/block.cuh"
#include "sample/exact.cuh"

namespace {

constexpr float GREEDY_BELOW = 0.01f;
constexpr u32 MOST_LISTED = 1024;    // the largest top-k that the list serves

// ops/sample.rs: SampleParams.
struct Params {
    float temperature;
    u32 top_k;
    float top_p, min_p;
    float repetition, frequency, presence;
    u32 range, decay;
    u32 seed[2], counter[2];

    __device__ explicit Params(const int* words) {
        temperature = __int_as_float(words[0]);
        top_k = words[1];
        top_p = __int_as_float(words[2]);
        min_p = __int_as_float(words[3]);
        repetition = __int_as_float(words[4]);
        frequency = __int_as_float(words[5]);
        presence = __int_as_float(words[6]);
        range = words[7];
        decay = words[8];
        seed[0] = words[9], seed[1] = words[10];
        counter[0] = words[11], counter[1] = words[12];
    }
    __device__ bool greedy() const { return temperature < GREEDY_BELOW || top_k == 1; }
    __device__ bool penalises() const {
        return repetition != 1.0f || frequency != 0.0f || presence != 0.0f;
    }
    // Whether the sum over all tokens can be needed.
    __device__ bool sums() const { return !greedy() && (top_k == 0 || top_k > MOST_LISTED); }

    // Philox4x32-10, the first word of draw `counter`, as a number between 0 and 1.
    __device__ double uniform() const {
        u32 k0 = seed[0], k1 = seed[1], c0 = counter[0], c1 = counter[1], c2 = 0, c3 = 0;
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            u32 high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
            u32 high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
            c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
            k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
        }
        return (double(c0) + 0.5) / 4294967296.0;
    }
};

// What a block leaves for the last one.
struct Chunk {
    u64 best;      // key of the likeliest token, of the first of equal ones; 0 for none
    u64 sum;       // of the weights, relative to the best
    u32 finite;    // tokens above minus infinity
    u32 nan;
};

struct Lists {
    const int* recent;
    int window;
    const int* blocked;
    int blocked_width;
};

// The penalties of one token, seen at the places `first`, ... of the list. The roundings are those
// of separate operations.
__device__ float penalised(const Params& p, const int* recent, int first, int end, float x) {
    const int id = recent[first];
    for (int at = first; at < end; ++at) {
        if (recent[at] != id) continue;
        float strength = 1.0f;
        if (u32(at) >= p.range) {
            strength = __fsub_rn(1.0f, __fdiv_rn(float(at - p.range + 1), float(p.decay)));
        }
        if (at == first) {
            float factor = __fadd_rn(1.0f, __fmul_rn(__fsub_rn(p.repetition, 1.0f), strength));
            x = x > 0.0f ? __fdiv_rn(x, factor) : __fmul_rn(x, factor);
            x = __fsub_rn(x, __fmul_rn(p.presence, strength));
        }
        x = __fsub_rn(x, __fmul_rn(p.frequency, strength));
    }
    return x;
}

// Applies penalties and blocked ids to the chunk from `first` on, in `v` and in `logits`.
__device__ void change(Shared& s, const Params& p, const Lists& lists, float* logits, int first,
                       int end, float (&v)[EACH]) {
    const bool listed = p.penalises() && lists.window > 0;
    if (!listed && lists.blocked_width == 0) return;
#pragma unroll
    for (int e = 0; e < EACH; ++e) s.stage[threadIdx.x * EACH + e] = v[e];
    __syncthreads();
    u64 reach = u64(p.range) + p.decay;
    const int seen = listed ? int(reach < u64(lists.window) ? reach : u64(lists.window)) : 0;
    for (int at = threadIdx.x; at < seen; at += THREADS) {
        int id = lists.recent[at];
        if (id < first || id >= end) continue;
        bool newest = true;
        for (int i = 0; i < at; ++i) newest = newest && lists.recent[i] != id;
        if (!newest) continue;
        float x = penalised(p, lists.recent, at, seen, s.stage[id - first]);
        s.stage[id - first] = x;
        logits[id] = x;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < lists.blocked_width; at += THREADS) {
        int id = lists.blocked[at];
        if (id < first || id >= end) continue;
        s.stage[id - first] = nothing();
        logits[id] = nothing();
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[e] = s.stage[threadIdx.x * EACH + e];
}

// A block's chunk of a row: what it writes for the last block.
__device__ void scan(Shared& s, const Params& p, Weights& weights, const Lists& lists,
                     float* logits, int tokens, int vectors, u32* maxima, Chunk* chunk) {
    const int first = blockIdx.x * CHUNK, end = min(first + CHUNK, tokens);
    const int own = first + threadIdx.x * EACH;
    float v[EACH];
    if (vectors && own + EACH <= end) {
#pragma unroll
        for (int e = 0; e < EACH; e += 4) {
            float4 f = *reinterpret_cast<const float4*>(logits + own + e);
            v[e] = f.x, v[e + 1] = f.y, v[e + 2] = f.z, v[e + 3] = f.w;
        }
    } else {
#pragma unroll
        for (int e = 0; e < EACH; ++e) v[e] = own + e < end ? logits[own + e] : nothing();
    }
    change(s, p, lists, logits, first, end, v);
    u64 best = 0;
    u32 finite = 0, nan = 0, most = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        nan |= v[e] != v[e];
        if (v[e] > nothing()) {
            ++finite;
            most = max(most, order_of(v[e]));
            // Zeros are equal whatever their sign.
            best = Max::of(best, key_of(__fadd_rn(v[e], 0.0f), own + e));
        }
    }
    constexpr int LANES = GROUP / EACH;
#pragma unroll
    for (int d = 1; d < LANES; d <<= 1) most = max(most, __shfl_xor_sync(FULL_MASK, most, d));
    if (threadIdx.x % LANES == 0 && own < tokens) maxima[own / GROUP] = most;
    best = block_reduce<Max>(s, best);
    // Both counts in one number.
    u64 counts = block_reduce<Add>(s, u64(nan) << 32 | finite);
    u64 sum = 0;
    if (p.sums() && best) {
        weights.most = value_of(u32(best >> 32));
#pragma unroll
        for (int e = 0; e < EACH; ++e) sum += v[e] > nothing() ? weights.of(v[e]) : 0;
        sum = block_reduce<Add>(s, sum);
    }
    if (threadIdx.x == 0) *chunk = {best, sum, u32(counts), u32(counts >> 32)};
}

// A bound that the largest tokens of at least `want` groups reach, and not many more.
__device__ u32 bound(Shared& s, const u32* maxima, int groups, u32 top, u32 want) {
    if (want >= u32(groups)) return LOWEST;
    const bool staged = groups <= MAXIMA;
    if (staged) {
        for (int i = threadIdx.x; i < groups; i += THREADS) s.maxima[i] = __ldcg(maxima + i);
        __syncthreads();
    }
    u32 low = LOWEST, high = top + 1;
    for (int turn = 0; high - low > 1; turn ^= 1) {
        u32 middle = low + (high - low) / 2, count = 0;
        for (int i = threadIdx.x; i < groups; i += THREADS) {
            count += (staged ? s.maxima[i] : __ldcg(maxima + i)) >= middle;
        }
        count = block_count(s, count, turn);
        if (count < want) {
            high = middle;
            continue;
        }
        low = middle;
        if (count <= want + want / 8 + 8) break;
    }
    __syncthreads();
    return low;
}

// Lists every token whose order is at least `least`: their number, or -1 when they are too many.
__device__ int collect(Shared& s, Row row, const u32* maxima, int groups, u32 least) {
    constexpr int AHEAD = 4;
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x == 0) s.counter = 0;
    __syncthreads();
    bool room = true;
    for (int base = threadIdx.x - lane; base < groups && room; base += THREADS) {
        bool hit = base + lane < groups && __ldcg(maxima + base + lane) >= least;
        u32 mask = __ballot_sync(FULL_MASK, hit);
        while (mask && room) {
            float x[AHEAD];
            int ids[AHEAD];
#pragma unroll
            for (int e = 0; e < AHEAD; ++e) {
                ids[e] = mask ? (base + __ffs(mask) - 1) * GROUP + lane : row.tokens;
                mask &= mask - 1;
                x[e] = ids[e] < row.tokens ? __ldcg(row.logits + ids[e]) : nothing();
            }
#pragma unroll
            for (int e = 0; e < AHEAD; ++e) {
                room = append(s, order_of(x[e]) >= least, key_of(x[e], ids[e])) && room;
            }
        }
    }
    __syncthreads();
    int n = s.counter <= u32(CAPACITY) ? int(s.counter) : -1;
    __syncthreads();
    return n;
}

__device__ __forceinline__ u64 share_of(u64 total, float p) {
    u64 share = __double2ull_ru(double(p) * double(total));
    return share < 1 ? 1 : (share < total ? share : total);
}

// The sum that the draw must reach: it lies above its share of the total.
__device__ __forceinline__ u64 draw_of(const Params& p, u64 total) {
    u64 below = __double2ull_rz(p.uniform() * double(total));
    return below < total ? below + 1 : total;
}

// The least logit that min-p keeps; a logit right at the bound must not fall for its rounding.
__device__ __forceinline__ float least_of(const Params& p, float most) {
    double log_share = log(double(p.min_p) * (1.0 - 1e-6));
    return __double2float_ru(double(most) + log_share * double(p.temperature));
}

struct Summary {
    float most;
    u64 sum;         // of all weights, when Params::sums
    u32 finite;
};

__device__ __forceinline__ bool filters_by_share(const Params& p) {
    return p.top_p > 0.0f && p.top_p < 1.0f;
}

// The token, found among the likeliest; -1 when these do not suffice.
__device__ int draw_listed(Shared& s, const Params& p, const Weights& weights, Row row,
                           const u32* maxima, int groups, const Summary& all) {
    const u32 top_k = p.top_k < all.finite ? p.top_k : 0;
    if (top_k > MOST_LISTED) return -1;
    u32 least = LOWEST;
    if (all.finite > u32(CAPACITY)) {
        u32 want = top_k ? top_k : min(MOST_LISTED, u32(groups) / 2);
        least = bound(s, maxima, groups, order_of(all.most), want);
    }
    const int n = collect(s, row, maxima, groups, least);
    if (n < 0) return -1;
    sort_list(s, n);
    sum_list(s, weights, n, 0);
    // Tokens that are kept: the first `end`, which may be more than are listed.
    u32 end = top_k ? top_k : all.finite;
    const u32 listed = u32(n);
    u64 total = end <= listed ? s.list.upto[end - 1] : all.sum;
    if (filters_by_share(p)) {
        const u64 top_p = once<u64>(s, [&] { return share_of(total, p.top_p); });
        int have = int(min(end, listed)), at = first_reaching(s, have, top_p);
        if (at < have) {
            end = u32(at) + 1;
        } else if (end > listed) {
            return -1;
        }
    }
    if (p.min_p > 0.0f) {
        const float bottom = once<float>(s, [&] { return least_of(p, all.most); });
        const int have = int(min(end, listed));
        int at = first_of(s, have, [&](int i) {
            return value_of(u32(s.list.keys[i] >> 32)) < bottom;
        });
        if (at < have) {
            end = u32(max(at, 1));
        } else if (end > listed) {
            return -1;
        }
    }
    total = end <= listed ? s.list.upto[end - 1] : all.sum;
    const u64 target = once<u64>(s, [&] { return draw_of(p, total); });
    const int have = int(min(end, listed)), at = first_reaching(s, have, target);
    return at < have ? int(id_of(s.list.keys[at])) : -1;
}

// The token, whatever it takes.
__device__ int draw_exact(Shared& s, const Params& p, const Weights& weights, Row row,
                          float most) {
    enum { TOP_K, TOP_P, DRAW };
    const Total all = total_of(s, weights, row, nothing());
    u64 total = all.weight;
    int token = -1;
#pragma unroll 1
    for (int step = TOP_K; step <= DRAW; ++step) {
        if (step == TOP_K && !(p.top_k && p.top_k < all.count)) continue;
        if (step == TOP_P && !filters_by_share(p)) continue;
        if (step == DRAW && p.min_p > 0.0f) {
            // Both keep a front: the shorter one has the smaller sum.
            const float bottom = once<float>(s, [&] { return least_of(p, most); });
            u64 kept = total_of(s, weights, row, bottom).weight;
            total = kept < total ? kept : total;
        }
        const u64 target = once<u64>(s, [&] {
            if (step == TOP_K) return u64(p.top_k);
            return step == TOP_P ? share_of(total, p.top_p) : draw_of(p, total);
        });
        Found found = cross(s, weights, row, target, step == TOP_K);
        total = found.upto;
        token = int(found.id);
    }
    return token;
}

// The last block of a row: the token.
__device__ int finish(Shared& s, const Params& p, Weights& weights, Row row, const u32* maxima,
                      const Chunk* chunks, int count) {
    u64 best = 0, counts = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        best = Max::of(best, __ldcg(&chunks[i].best));
        counts += u64(__ldcg(&chunks[i].nan)) << 32 | __ldcg(&chunks[i].finite);
    }
    best = block_reduce<Max>(s, best);
    counts = block_reduce<Add>(s, counts);
    if (best == 0 || counts >> 32) return -1;
    if (p.greedy()) return int(id_of(best));
    weights.most = value_of(u32(best >> 32));
    u64 sum = 0;
    if (p.sums()) {
        for (int i = threadIdx.x; i < count; i += THREADS) {
            u64 part = __ldcg(&chunks[i].sum), top = __ldcg(&chunks[i].best);
            float most = value_of(u32(top >> 32));
            if (part == 0) continue;
            double fall = (double(most) - double(weights.most)) / double(p.temperature);
            sum += most == weights.most ? part : __double2ull_rn(double(part) * exp(fall));
        }
        sum = block_reduce<Add>(s, sum);
    }
    const int groups = (row.tokens + GROUP - 1) / GROUP;
    const Summary all = {weights.most, sum, u32(counts)};
    int token = draw_listed(s, p, weights, row, maxima, groups, all);
    return token >= 0 ? token : draw_exact(s, p, weights, row, weights.most);
}

}  // namespace

// scratch: for each row, chunks of struct Chunk and then maxima of all groups, `row_bytes` in all;
// counters: one for each row, zero. tokens <= vocab: ids from there on are never drawn. vectors:
// rows are aligned to 16 bytes. one_bits: see Weights.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    exl_sample(float* logits, const int* params, const int* recent, const int* blocked, int* out,
               char* scratch, u32* counters, int vocab, int tokens, int window, int blocked_width,
               int row_bytes, int one_bits, int vectors) {
    __shared__ Shared s;
    __shared__ bool last;
    pdl_launch();
    if (threadIdx.x < EXP2_STEPS) s.table[threadIdx.x] = EXP2_TABLE[threadIdx.x];
    const int row = blockIdx.y;
    float* own = logits + (long long)row * vocab;
    Chunk* chunks = reinterpret_cast<Chunk*>(scratch + (long long)row * row_bytes);
    u32* maxima = reinterpret_cast<u32*>(chunks + gridDim.x);
    const Lists lists = {recent + (long long)row * window, window,
                         blocked + (long long)row * blocked_width, blocked_width};
    pdl_wait();
    const Params p(params + 16 * row);
    Weights weights;
    weights.table = s.table;
    weights.one_bits = one_bits;
    weights.most = 0.0f;
    const float temperature = p.greedy() ? 1.0f : p.temperature;
    const u64 scale = once<u64>(s, [&] { return Weights::scale_of(temperature); });
    weights.high = __uint_as_float(u32(scale >> 32));
    weights.low = __uint_as_float(u32(scale));
    scan(s, p, weights, lists, own, tokens, vectors, maxima, chunks + blockIdx.x);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counters + row, 1u) == gridDim.x - 1;
        if (last) counters[row] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    int token = finish(s, p, weights, Row{own, tokens}, maxima, chunks, gridDim.x);
    if (threadIdx.x == 0) out[row] = token;
}
