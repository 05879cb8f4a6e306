// exl_attn_rows_*: attention of single rows over the paged cache, for every head size and both storage
// types, where no tensor core can help: caches of 32-bit floats, odd heads.
//
// What: a block computes one query head of one row over a chunk of keys (attn.cuh): online softmax in
// 32-bit floats, four keys at a time per warp, the dot product spread over the lanes. The last block of
// a head to arrive merges the chunks in order. exl_attn_rows_any_* takes heads of any size, with the
// query and the sums in shared memory, one block for all keys.
//
// Bytes: K and V of the range once per query head, from the second-level cache for the heads that
// share them. Bound by instructions.

#include "attn.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int KEYS = 4;   // keys of a warp at a time

template <int N>
__device__ __forceinline__ void load_values(float (&v)[N], const float* p, int from, int dim) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = from + i < dim ? p[from + i] : 0.0f;
}
template <int N>
__device__ __forceinline__ void load_values(float (&v)[N], const __half* p, int from, int dim) {
    if (dim % N == 0) {
        if (from >= dim) {
#pragma unroll
            for (int i = 0; i < N; ++i) v[i] = 0.0f;
        } else if constexpr (N == 8) {
            uint4 w = *reinterpret_cast<const uint4*>(p + from);
            u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 f = __half22float2(*reinterpret_cast<__half2*>(&words[i]));
                v[2 * i] = f.x;
                v[2 * i + 1] = f.y;
            }
        } else if constexpr (N == 4) {
            uint2 w = *reinterpret_cast<const uint2*>(p + from);
            float2 a = __half22float2(*reinterpret_cast<__half2*>(&w.x));
            float2 b = __half22float2(*reinterpret_cast<__half2*>(&w.y));
            v[0] = a.x;
            v[1] = a.y;
            v[2] = b.x;
            v[3] = b.y;
        } else if constexpr (N == 2) {
            float2 f = __half22float2(*reinterpret_cast<const __half2*>(p + from));
            v[0] = f.x;
            v[1] = f.y;
        } else {
            v[0] = __half2float(p[from]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = from + i < dim ? __half2float(p[from + i]) : 0.0f;
}

// The sequence of a row of the batch and its position there. False for padding that belongs to nobody.
// For whole warps.
__device__ __forceinline__ bool find_row(const Attention& a, int row, int& seq, int& position) {
    const int lane = threadIdx.x % WARP;
    for (int s = lane; s - lane < a.seqs; s += WARP) {
        const bool there = s < a.seqs;
        const int start = there ? a.q_start[s] : 0, end = there ? a.q_start[s + 1] : 0;
        const int own = there ? a.kv_len[s] - end + row : 0;
        const u32 mine = __ballot_sync(FULL_MASK, start <= row && row < end);
        if (mine == 0) continue;
        const int owner = __ffs(mine) - 1;
        seq = s - lane + owner;
        position = __shfl_sync(FULL_MASK, own, owner);
        return true;
    }
    return false;
}

// First value of a key's row in the cache.
__device__ __forceinline__ long long row_of(const Attention& a, int seq, int kv_head, int key) {
    const int page = a.block_table[(long long)seq * a.pages_per_seq + key / PAGE_TOKENS];
    const long long token = (long long)page * PAGE_TOKENS + key % PAGE_TOKENS;
    return (token * a.kv_heads + kv_head) * a.dim;
}

// From the product of a query with a key to a score in units of log2(e).
__device__ __forceinline__ float score(const Attention& a, float product) {
    const float s = product * a.scale;
    return LOG2_E * (a.softcap > 0.0f ? a.softcap * tanhf(s / a.softcap) : s);
}

// Softmax state of a head: maximum, sum, weighted values from..from + N.
template <int N>
struct State {
    float most, sum, values[N];

    __device__ __forceinline__ void clear() {
        most = minus_infinity();
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = 0.0f;
    }
    // Folds in a part whose values are at `part`.
    template <typename Load>
    __device__ __forceinline__ void add(float part_most, float part_sum, Load part) {
        const float2 f = fold(most, sum, part_most, part_sum);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = fold_value(f, values[i], part(i));
    }
};

// The keys begin..end that fall to this warp.
template <typename KV, int N>
__device__ __forceinline__ void walk(const Attention& a, int seq, int kv_head, int begin, int end,
                                     const float (&q)[N], State<N>& state) {
    const int warp = threadIdx.x / WARP, from = threadIdx.x % WARP * N;
    const KV* k_cache = static_cast<const KV*>(a.k_cache);
    const KV* v_cache = static_cast<const KV*>(a.v_cache);
    for (int base = begin + warp * KEYS; base < end; base += WARPS * KEYS) {
        float k[KEYS][N], v[KEYS][N], s[KEYS];
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            const long long at = row_of(a, seq, kv_head, min(base + j, end - 1));
            load_values(k[j], k_cache + at, from, a.dim);
            load_values(v[j], v_cache + at, from, a.dim);
        }
        float top = minus_infinity();
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            float product = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) product = fmaf(q[i], k[j][i], product);
            s[j] = base + j < end ? score(a, warp_sum(product)) : minus_infinity();
            top = fmaxf(top, s[j]);
        }
        const float next = fmaxf(state.most, ceilf(top));
        const float most = next == minus_infinity() ? 0.0f : next;
        const float keep = state.most == next ? 1.0f : exp2_fast(state.most - next);
        state.most = next;
        state.sum *= keep;
#pragma unroll
        for (int i = 0; i < N; ++i) state.values[i] *= keep;
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            const float p = exp2_fast(s[j] - most);
            state.sum += p;
#pragma unroll
            for (int i = 0; i < N; ++i) state.values[i] = fmaf(p, v[j][i], state.values[i]);
        }
    }
}

template <typename KV, int N>
__device__ __forceinline__ void attend(const Attention& a) {
    constexpr int WIDE = WARP * N;
    __shared__ float values[WARPS][WIDE], states[WARPS][2];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, head = blockIdx.y, part = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, from = lane * N;
    int seq, position;
    // Padding keeps what it held.
    if (!find_row(a, row, seq, position)) return;
    const int keys_from = first_key(a, position), keys_to = position + 1;
    const Chunks chunks = find_chunks(a, keys_from, keys_to);
    if (part >= chunks.count) return;
    const bool shares = a.splits > 1 && chunks.count > 1;
    const long long cell = (long long)row * a.heads + head;

    float q[N];
    load_values(q, a.q + cell * a.dim, from, a.dim);
    // Of the first warp: what it has merged.
    State<N> all;
    all.clear();
    const int last = a.splits > 1 ? part + 1 : chunks.count;
    for (int chunk = part; chunk < last; ++chunk) {
        const int begin = chunks.origin + (chunks.first + chunk) * chunks.size;
        State<N> state;
        state.clear();
        walk<KV, N>(a, seq, head / (a.heads / a.kv_heads), max(begin, keys_from),
                    min(begin + chunks.size, keys_to), q, state);
        if (lane == 0) {
            states[warp][0] = state.most;
            states[warp][1] = state.sum;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) values[warp][from + i] = state.values[i];
        __syncthreads();
        if (warp == 0) {
            state.clear();
            for (int w = 0; w < WARPS; ++w) {
                state.add(states[w][0], states[w][1], [&](int i) { return values[w][from + i]; });
            }
            if (shares) {
                all = state;
            } else {
                all.add(state.most, state.sum, [&](int i) { return state.values[i]; });
            }
        }
        __syncthreads();
    }
    if (shares) {
        const Partials partials(a);
        if (warp == 0) {
            const long long place = cell * a.splits + part;
            if (lane == 0) __stcg(partials.states + place, make_float2(all.most, all.sum));
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (from + i < a.dim) __stcg(partials.values + place * a.dim + from + i, all.values[i]);
            }
        }
        if (!arrives_last(a.counters + cell, chunks.count)) return;
        if (warp == 0) {
            all.clear();
            for (int c = 0; c < chunks.count; ++c) {
                const long long place = cell * a.splits + c;
                const float2 state = __ldcg(partials.states + place);
                float part_values[N];
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    part_values[i] = 0.0f;
                    if (from + i < a.dim) {
                        part_values[i] = __ldcg(partials.values + place * a.dim + from + i);
                    }
                }
                all.add(state.x, state.y, [&](int i) { return part_values[i]; });
            }
        }
    }
    if (warp != 0) return;
    const float n = normalizer(all.sum);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (from + i < a.dim) a.out[cell * a.dim + from + i] = all.values[i] * n;
    }
}

// Heads of any size: shared memory holds the query, the sums and the weights of WARPS * WARP keys.
template <typename KV>
__device__ __forceinline__ void attend_any(const Attention& a) {
    constexpr int THREADS = WARPS * WARP;
    extern __shared__ float memory[];
    float *q = memory, *values = q + a.dim, *weights = values + a.dim;
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int seq, position;
    if (!find_row(a, row, seq, position)) return;
    const KV* k_cache = static_cast<const KV*>(a.k_cache);
    const KV* v_cache = static_cast<const KV*>(a.v_cache);
    const long long cell = (long long)row * a.heads + head;
    for (int i = threadIdx.x; i < a.dim; i += THREADS) {
        q[i] = a.q[cell * a.dim + i];
        values[i] = 0.0f;
    }
    __syncthreads();
    // The same in all threads.
    float most = minus_infinity(), sum = 0.0f;
    for (int base = first_key(a, position); base <= position; base += THREADS) {
        const int count = min(THREADS, position + 1 - base);
        for (int j = warp; j < count; j += WARPS) {
            const KV* k = k_cache + row_of(a, seq, kv_head, base + j);
            float product = 0.0f;
            for (int i = lane; i < a.dim; i += WARP) product = fmaf(q[i], to_float(k[i]), product);
            product = warp_sum(product);
            if (lane == 0) weights[j] = score(a, product);
        }
        __syncthreads();
        float next = most;
        for (int j = 0; j < count; ++j) next = fmaxf(next, weights[j]);
        const float keep = most == next ? 1.0f : exp2_fast(most - next);
        most = next;
        __syncthreads();
        if (int(threadIdx.x) < count) weights[threadIdx.x] = exp2_fast(weights[threadIdx.x] - most);
        __syncthreads();
        sum *= keep;
        for (int j = 0; j < count; ++j) sum += weights[j];
        for (int i = threadIdx.x; i < a.dim; i += THREADS) values[i] *= keep;
        for (int j = 0; j < count; ++j) {
            const KV* v = v_cache + row_of(a, seq, kv_head, base + j);
            const float p = weights[j];
            for (int i = threadIdx.x; i < a.dim; i += THREADS) {
                values[i] = fmaf(p, to_float(v[i]), values[i]);
            }
        }
        __syncthreads();
    }
    const float n = normalizer(sum);
    for (int i = threadIdx.x; i < a.dim; i += THREADS) a.out[cell * a.dim + i] = values[i] * n;
}

}  // namespace

#define ATTENTION(NAME, CALL)                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, 3) NAME(                            \
        ATTENTION_PARAMETERS) {                                                                   \
        CALL(ATTENTION_ARGUMENTS);                                                                \
    }
// Up to 32, 64, 128 and 256 values per head.
ATTENTION(exl_attn_rows_f16_32, (attend<__half, 1>))
ATTENTION(exl_attn_rows_f16_64, (attend<__half, 2>))
ATTENTION(exl_attn_rows_f16_128, (attend<__half, 4>))
ATTENTION(exl_attn_rows_f16_256, (attend<__half, 8>))
ATTENTION(exl_attn_rows_f32_32, (attend<float, 1>))
ATTENTION(exl_attn_rows_f32_64, (attend<float, 2>))
ATTENTION(exl_attn_rows_f32_128, (attend<float, 4>))
ATTENTION(exl_attn_rows_f32_256, (attend<float, 8>))
ATTENTION(exl_attn_rows_any_f16, attend_any<__half>)
ATTENTION(exl_attn_rows_any_f32, attend_any<float>)
