// exl_paged_attn_*: attention of single rows over the paged cache, for every head size and both
// storage types. exl_rope_append_*: rotation and append to the cache.
//
// What: a block computes one query head of one row over a range of keys ("split"): online softmax
// in 32-bit floats, four keys at a time per warp, the dot product spread over the lanes. Bytes: K and
// V of the range once per query head, from the second-level cache for the heads that share them.
// Bound by memory for long contexts. With several splits the last block of a head to arrive merges
// them in order.

#include "common/common.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int KEYS = 4;   // keys of a warp at a time

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

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

// Softmax state of one head: maximum, sum, weighted values of the lane's part of the head.
template <int N>
struct State {
    float most, sum, values[N];

    __device__ __forceinline__ void clear() {
        most = minus_infinity();
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = 0.0f;
    }
    __device__ __forceinline__ void rescale(float to) {
        float c = most == to ? 1.0f : expf(most - to);
        most = to;
        sum *= c;
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] *= c;
    }
    __device__ __forceinline__ void merge(float other_most, float other_sum, const float* other,
                                          int from, int dim) {
        if (other_most == minus_infinity()) return;
        rescale(fmaxf(most, other_most));
        float c = expf(other_most - most);
        sum += c * other_sum;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (from + i < dim) values[i] += c * other[from + i];
        }
    }
};

struct Attention {
    const float* q;
    const void *k_cache, *v_cache;
    const int *block_table, *q_start, *kv_len;
    float* out;
    float* scratch;
    u32* counters;
    int rows, seqs, pages_per_seq, heads, kv_heads, head_dim, splits, window;
    float scale, softcap;
};

template <typename KV, int N>
__device__ __forceinline__ void attend(const Attention& a) {
    __shared__ float shared[WARPS * (32 * N + 2)];
    __shared__ u32 arrived;
    pdl_launch();
    pdl_wait();
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, from = lane * N;
    const int dim = a.head_dim;
    int seq = 0;
    while (seq < a.seqs && a.q_start[seq + 1] <= row) ++seq;
    // Padding that belongs to no sequence keeps what it held.
    if (seq == a.seqs || a.q_start[seq] > row) return;
    const int position = a.kv_len[seq] - a.q_start[seq + 1] + row;
    const int last = position + 1, first = a.window > 0 ? max(0, last - a.window) : 0;
    // Splits in whole groups of keys, of equal size.
    const int keys = max(last - first, 0);
    const int each = ((keys + a.splits - 1) / a.splits + 15) / 16 * 16;
    const int begin = first + split * each, end = min(last, begin + each);

    float q[N];
    load_values(q, a.q + ((long long)row * a.heads + head) * dim, from, dim);
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] *= a.scale;
    State<N> state;
    state.clear();
    const int kv_head = head / (a.heads / a.kv_heads);
    const KV* k_cache = static_cast<const KV*>(a.k_cache);
    const KV* v_cache = static_cast<const KV*>(a.v_cache);
    const int* pages = a.block_table + (long long)seq * a.pages_per_seq;
    for (int base = begin + warp * KEYS; base < end; base += WARPS * KEYS) {
        long long at[KEYS];
        float k[KEYS][N], v[KEYS][N], s[KEYS];
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            int key = min(base + j, end - 1);
            long long slot = (long long)pages[key / PAGE_TOKENS] * PAGE_TOKENS + key % PAGE_TOKENS;
            at[j] = (slot * a.kv_heads + kv_head) * dim;
            load_values(k[j], k_cache + at[j], from, dim);
        }
#pragma unroll
        for (int j = 0; j < KEYS; ++j) load_values(v[j], v_cache + at[j], from, dim);
        float most = state.most;
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            s[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) s[j] = fmaf(q[i], k[j][i], s[j]);
            s[j] = warp_sum(s[j]);
            if (a.softcap > 0.0f) s[j] = a.softcap * tanhf(s[j] / a.softcap);
            if (base + j >= end) s[j] = minus_infinity();
            most = fmaxf(most, s[j]);
        }
        state.rescale(most);
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            float p = expf(s[j] - most);
            state.sum += p;
#pragma unroll
            for (int i = 0; i < N; ++i) state.values[i] = fmaf(p, v[j][i], state.values[i]);
        }
    }
    // Warps in order.
    float* own = shared + warp * (32 * N + 2);
    if (lane == 0) {
        own[0] = state.most;
        own[1] = state.sum;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) own[2 + from + i] = state.values[i];
    __syncthreads();
    if (warp == 0) {
        for (int w = 1; w < WARPS; ++w) {
            const float* other = shared + w * (32 * N + 2);
            state.merge(other[0], other[1], other + 2, from, 32 * N);
        }
    }
    const long long cell = (long long)row * a.heads + head;
    const int stride = dim + 2;
    if (a.splits > 1) {
        float* mine = a.scratch + (cell * a.splits + split) * stride;
        if (warp == 0) {
            if (lane == 0) {
                __stcg(mine, state.most);
                __stcg(mine + 1, state.sum);
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (from + i < dim) __stcg(mine + 2 + from + i, state.values[i]);
            }
            __threadfence();
        }
        __syncthreads();
        if (threadIdx.x == 0) arrived = atomicAdd(a.counters + cell, 1u);
        __syncthreads();
        if (arrived != u32(a.splits - 1) || warp != 0) return;
        __threadfence();
        if (lane == 0) a.counters[cell] = 0;
        state.clear();
        for (int k = 0; k < a.splits; ++k) {
            const float* other = a.scratch + (cell * a.splits + k) * stride;
            float values[N];
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = from + i < dim ? __ldcg(other + 2 + from + i) : 0;
            float most = __ldcg(other), sum = __ldcg(other + 1);
            if (most == minus_infinity()) continue;
            state.rescale(fmaxf(state.most, most));
            float c = expf(most - state.most);
            state.sum += c * sum;
#pragma unroll
            for (int i = 0; i < N; ++i) state.values[i] += c * values[i];
        }
    }
    if (warp != 0) return;
    float inverse = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
    // A sum that is not a number stays so.
    if (state.sum != state.sum) inverse = state.sum;
    float* to = a.out + cell * dim;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (from + i < dim) to[from + i] = state.values[i] * inverse;
    }
}

// The sine and cosine of position * frequency, exact to 32 bits for any position: the angle is
// brought to one turn in 64 bits.
__device__ __forceinline__ void rotation(int position, float frequency, float* sine, float* cosine) {
    double angle = double(position) * double(frequency);
    double turns = rint(angle * 0.15915494309189535);
    sincosf(float(fma(turns, -6.283185307179586, angle)), sine, cosine);
}

template <typename KV>
__device__ __forceinline__ KV stored(float v);
template <>
__device__ __forceinline__ float stored<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __half stored<__half>(float v) {
    return __float2half_rn(v);
}

// One block per row; threads walk over pairs of q, then of k, then over v.
template <typename KV>
__device__ __forceinline__ void rope_append(float* q, const float* k, const float* v,
                                            const int* positions, const int* slots,
                                            const float* inv_freq, KV* k_cache, KV* v_cache,
                                            int heads, int kv_heads, int head_dim, int pairs,
                                            int interleaved, float factor) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, position = positions[row];
    const long long slot = slots[row];
    float* q_row = q + (long long)row * heads * head_dim;
    const float* k_row = k + (long long)row * kv_heads * head_dim;
    const float* v_row = v + (long long)row * kv_heads * head_dim;
    KV* k_to = k_cache + slot * kv_heads * head_dim;
    KV* v_to = v_cache + slot * kv_heads * head_dim;
    const int all = heads + kv_heads;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < all * pairs;
         i += gridDim.y * blockDim.x) {
        int head = i / pairs, p = i % pairs;
        int a = interleaved ? 2 * p : p, b = interleaved ? 2 * p + 1 : p + pairs;
        float sine, cosine;
        rotation(position, inv_freq[p], &sine, &cosine);
        sine *= factor;
        cosine *= factor;
        if (head < heads) {
            float* at = q_row + head * head_dim;
            float x = at[a], y = at[b];
            at[a] = x * cosine - y * sine;
            at[b] = y * cosine + x * sine;
        } else {
            int offset = (head - heads) * head_dim;
            float x = k_row[offset + a], y = k_row[offset + b];
            k_to[offset + a] = stored<KV>(x * cosine - y * sine);
            k_to[offset + b] = stored<KV>(y * cosine + x * sine);
        }
    }
    // What does not rotate.
    const int rest = head_dim - 2 * pairs;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < kv_heads * rest;
         i += gridDim.y * blockDim.x) {
        int at = i / rest * head_dim + 2 * pairs + i % rest;
        k_to[at] = stored<KV>(k_row[at]);
    }
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < kv_heads * head_dim;
         i += gridDim.y * blockDim.x) {
        v_to[i] = stored<KV>(v_row[i]);
    }
}

}  // namespace

#define ATTENTION(NAME, KV, N)                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, 4) NAME(                            \
        const float* q, const void* k_cache, const void* v_cache, const int* block_table,         \
        const int* q_start, const int* kv_len, float* out, float* scratch, u32* counters,         \
        int rows, int seqs, int pages_per_seq, int heads, int kv_heads, int head_dim, int splits, \
        int window, float scale, float softcap) {                                                 \
        attend<KV, N>({q, k_cache, v_cache, block_table, q_start, kv_len, out, scratch, counters, \
                       rows, seqs, pages_per_seq, heads, kv_heads, head_dim, splits, window,      \
                       scale, softcap});                                                          \
    }
// Up to 32, 64, 128 and 256 values per head.
ATTENTION(exl_paged_attn_f16_32, __half, 1)
ATTENTION(exl_paged_attn_f16_64, __half, 2)
ATTENTION(exl_paged_attn_f16_128, __half, 4)
ATTENTION(exl_paged_attn_f16_256, __half, 8)
ATTENTION(exl_paged_attn_f32_32, float, 1)
ATTENTION(exl_paged_attn_f32_64, float, 2)
ATTENTION(exl_paged_attn_f32_128, float, 4)
ATTENTION(exl_paged_attn_f32_256, float, 8)

#define ROPE(NAME, KV)                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 4)                                          \
        NAME(float* q, const float* k, const float* v, const int* positions, const int* slots,    \
             const float* inv_freq, KV* k_cache, KV* v_cache, int heads, int kv_heads,            \
             int head_dim, int pairs, int interleaved, float factor) {                            \
        rope_append<KV>(q, k, v, positions, slots, inv_freq, k_cache, v_cache, heads, kv_heads,   \
                        head_dim, pairs, interleaved, factor);                                    \
    }
ROPE(exl_rope_append_f16, __half)
ROPE(exl_rope_append_f32, float)
