// exl_rope_append_*: rotates q in place, rotates k and writes k and v into the paged cache.
//
// What: a block takes a group of heads of one row. A thread computes the angle of one pair of values
// once and applies it to up to HEADS heads, loads first. Positions may have three axes (rope.cuh).
//
// Bytes: q twice, k and v once, in 32-bit floats, and the new part of the cache. Bound: latency at few
// rows, memory at many.

#include "rope/rope.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int HEADS = 4;   // heads of a thread at a time

__device__ __forceinline__ void store(float* to, float v) { *to = v; }
__device__ __forceinline__ void store(__half* to, float v) { *to = __float2half_rn(v); }

// Four values, or one.
__device__ __forceinline__ void load(float (&v)[4], const float* from, bool four) {
    if (four) {
        const float4 all = *reinterpret_cast<const float4*>(from);
        v[0] = all.x;
        v[1] = all.y;
        v[2] = all.z;
        v[3] = all.w;
    } else {
        v[0] = *from;
    }
}
__device__ __forceinline__ void store(float* to, const float (&v)[4], bool four) {
    if (four) {
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        *to = v[0];
    }
}
__device__ __forceinline__ void store(__half* to, const float (&v)[4], bool four) {
    if (four) {
        *reinterpret_cast<uint2*>(to) = four_halves(v[0], v[1], v[2], v[3]);
    } else {
        *to = __float2half_rn(v[0]);
    }
}

template <typename KV>
__device__ __forceinline__ void rope_append(float* q, const float* k, const float* v,
                                            const Positions& positions, const int* slots,
                                            const float* inv_freq, KV* k_cache, KV* v_cache,
                                            int heads, int kv_heads, int head_dim, int pairs,
                                            int interleaved, float factor) {
    // Threads of a pair each, and heads side by side.
    const int lanes = max(min(pairs, THREADS), 1), side = THREADS / lanes;
    const int pair = threadIdx.x % lanes, all = heads + kv_heads;
    const int first = (blockIdx.y * side + threadIdx.x / lanes) * HEADS;
    const int row = blockIdx.x;
    pdl_launch();
    // Constants, and the step block, which is there before the first kernel of a step.
    float frequency = pair < pairs ? inv_freq[pair] : 0.0f;
    int position = positions.at(row, pair);
    const long long slot = slots[row];
    float2 turn = rotation(position, frequency, factor);
    pdl_wait();
    float* q_row = q + (long long)row * heads * head_dim;
    const float* k_row = k + (long long)row * kv_heads * head_dim;
    const float* v_row = v + (long long)row * kv_heads * head_dim;
    KV* k_to = k_cache + slot * kv_heads * head_dim;
    KV* v_to = v_cache + slot * kv_heads * head_dim;
    const int thread = blockIdx.y * THREADS + threadIdx.x, threads = gridDim.y * THREADS;
    const int values = kv_heads * head_dim;
    // Four values at a time where sizes and addresses allow.
    const u64 places = u64(v) | u64(v_cache);
    const bool fours = head_dim % 4 == 0 && places % 16 == 0;
    const int each = fours ? 4 : 1;
    float early[4];
    if (thread * each < values) load(early, v_row + thread * each, fours);

    if (int(threadIdx.x) < lanes * side) {
        for (int p = pair; p < pairs; p += lanes) {
            if (p != pair) {
                frequency = inv_freq[p];
                position = positions.at(row, p);
                turn = rotation(position, frequency, factor);
            }
            const int at = interleaved ? 2 * p : p, other = interleaved ? at + 1 : p + pairs;
            for (int from = first; from < all; from += gridDim.y * side * HEADS) {
                float x[HEADS], y[HEADS];
#pragma unroll
                for (int i = 0; i < HEADS; ++i) {
                    const int h = from + i;
                    const float* head =
                        h < heads ? q_row + h * head_dim : k_row + (h - heads) * head_dim;
                    x[i] = h < all ? head[at] : 0.0f;
                    y[i] = h < all ? head[other] : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < HEADS; ++i) {
                    const int h = from + i;
                    const float2 pair = turned(x[i], y[i], turn);
                    if (h < heads) {
                        q_row[h * head_dim + at] = pair.x;
                        q_row[h * head_dim + other] = pair.y;
                    } else if (h < all) {
                        store(k_to + (h - heads) * head_dim + at, pair.x);
                        store(k_to + (h - heads) * head_dim + other, pair.y);
                    }
                }
            }
        }
    }
    for (int i = thread; i * each < values; i += threads) {
        if (i != thread) load(early, v_row + i * each, fours);
        store(v_to + i * each, early, fours);
    }
    // What does not rotate.
    const int rest = head_dim - 2 * pairs;
    for (int i = thread; i < kv_heads * rest; i += threads) {
        const int at = i / rest * head_dim + 2 * pairs + i % rest;
        store(k_to + at, k_row[at]);
    }
}

}  // namespace

#define ROPE(NAME, KV)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                      \
        NAME(float* q, const float* k, const float* v, const int* positions, const int* slots,    \
             const float* inv_freq, KV* k_cache, KV* v_cache, int heads, int kv_heads,            \
             int head_dim, int pairs, int interleaved, float factor, int second, int third) {     \
        rope_append<KV>(q, k, v, Positions{positions, int(gridDim.x), second, third}, slots,      \
                        inv_freq, k_cache, v_cache, heads, kv_heads, head_dim, pairs,             \
                        interleaved, factor);                                                     \
    }
ROPE(exl_rope_append_f16, __half)
ROPE(exl_rope_append_f32, float)
