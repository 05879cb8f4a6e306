// What a block of the sampler does together: reductions, a sort, and questions to a sorted list.
//
// Every function is called by all threads of the block and begins and ends with all shared memory
// that it uses free for others.
#pragma once

#include "common/common.cuh"
#include "sample/weight.cuh"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int EACH = 8;                   // logits of a thread
constexpr int CHUNK = THREADS * EACH;     // logits of a block
constexpr int GROUP = 32;                 // logits whose largest one is kept
constexpr int MAXIMA = 8192;              // groups that fit in shared memory
constexpr int CAPACITY = 2048;            // of the sorted list
constexpr int ITEMS = CAPACITY / THREADS;
constexpr int BINS = 2048;                // of a histogram
constexpr int THREAD_BINS = BINS / THREADS;

// Falling order is by this number, then by rising id.
__device__ __forceinline__ u32 order_of(float x) {
    u32 b = __float_as_uint(x);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}
constexpr u32 LOWEST = 0x00800000u;       // of all finite numbers
__device__ __forceinline__ u64 key_of(float x, u32 id) { return u64(order_of(x)) << 32 | u32(~id); }
__device__ __forceinline__ u32 id_of(u64 key) { return ~u32(key); }

__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }

struct List {
    u64 keys[CAPACITY];    // falling
    u64 upto[CAPACITY];    // sum of the weights up to and with a key
};
struct Histogram {
    u64 weights[BINS];
    u32 counts[BINS];
};

struct Shared {
    union {
        float stage[CHUNK];
        u32 maxima[MAXIMA];
        List list;
        Histogram bins;
    };
    u64 table[EXP2_STEPS];
    u64 words[WARPS];
    u32 counts[2][WARPS];
    u64 above_weight;
    u64 once;
    u32 above_count;
    u32 counter;
    int index;
};

__device__ __forceinline__ u64 shuffle_xor(u64 v, int d) {
    return __shfl_xor_sync(FULL_MASK, v, d);
}

__device__ __forceinline__ u64 warp_sum_u64(u64 v) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) v += shuffle_xor(v, d);
    return v;
}

struct Add {
    __device__ static u64 of(u64 a, u64 b) { return a + b; }
};
struct Max {
    __device__ static u64 of(u64 a, u64 b) { return a > b ? a : b; }
};

// The reduction of v over the block, in all threads; 0 is neutral.
template <typename F>
__device__ __forceinline__ u64 block_reduce(Shared& s, u64 v) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) v = F::of(v, shuffle_xor(v, d));
    const int lane = threadIdx.x % WARP;
    if (lane == 0) s.words[threadIdx.x / WARP] = v;
    __syncthreads();
    v = lane < WARPS ? s.words[lane] : 0;
    __syncthreads();
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) v = F::of(v, shuffle_xor(v, d));
    return v;
}

// As a sum over small numbers, for use in a loop: `turn` alternates between 0 and 1, and something
// else synchronises the block behind the loop.
__device__ __forceinline__ u32 block_count(Shared& s, u32 v, int turn) {
    const int lane = threadIdx.x % WARP;
    v = __reduce_add_sync(FULL_MASK, v);
    if (lane == 0) s.counts[turn][threadIdx.x / WARP] = v;
    __syncthreads();
    return __reduce_add_sync(FULL_MASK, lane < WARPS ? s.counts[turn][lane] : 0);
}

// Sum over the threads before this one.
__device__ __forceinline__ u64 block_before(Shared& s, u64 v) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 upto = v;
#pragma unroll
    for (int d = 1; d < WARP; d <<= 1) {
        u64 other = __shfl_up_sync(FULL_MASK, upto, d);
        if (lane >= d) upto += other;
    }
    if (lane == WARP - 1) s.words[warp] = upto;
    __syncthreads();
    u64 before = warp_sum_u64(lane < warp ? s.words[lane] : 0);
    __syncthreads();
    return before + upto - v;
}

// What one thread computes, in all threads: for 64-bit floats, which most GPUs compute slowly.
template <typename T, typename F>
__device__ __forceinline__ T once(Shared& s, F compute) {
    T* slot = reinterpret_cast<T*>(&s.once);
    if (threadIdx.x == 0) *slot = compute();
    __syncthreads();
    T result = *slot;
    __syncthreads();
    return result;
}

// Puts the first n keys of the list in falling order. Keys are not zero.
__device__ __forceinline__ void sort_list(Shared& s, int n) {
    u64* keys = s.list.keys;
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
    __syncthreads();
    // Bitonic. A warp compares within 64 neighbours as long as they lie at most 32 apart.
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int a = 2 * i - (i & (step - 1)), b = a + step;
                u64 x = keys[a], y = keys[b];
                if ((x < y) == ((a & run) == 0)) keys[a] = y, keys[b] = x;
            }
            int next = step > 1 ? step / 2 : run;
            if (step > WARP || next > WARP) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

// Weights of the first n keys, summed on top of `base`.
__device__ __forceinline__ void sum_list(Shared& s, const Weights& weights, int n, u64 base) {
    u64 upto[ITEMS];
    u64 sum = 0;
#pragma unroll
    for (int e = 0; e < ITEMS; ++e) {
        int i = threadIdx.x * ITEMS + e;
        if (i < n) sum += weights.of(value_of(u32(s.list.keys[i] >> 32)));
        upto[e] = sum;
    }
    base += block_before(s, sum);
#pragma unroll
    for (int e = 0; e < ITEMS; ++e) {
        int i = threadIdx.x * ITEMS + e;
        if (i < n) s.list.upto[i] = base + upto[e];
    }
    __syncthreads();
}

// Where `holds(i)` is true for the first time in 0..n, or n; once true it stays so.
template <typename F>
__device__ __forceinline__ int first_of(Shared& s, int n, F holds) {
    if (threadIdx.x == 0) s.index = n;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        if (holds(i) && (i == 0 || !holds(i - 1))) s.index = i;
    }
    __syncthreads();
    int found = s.index;
    __syncthreads();
    return found;
}

// Where the sums of the list reach `target`, or n.
__device__ __forceinline__ int first_reaching(Shared& s, int n, u64 target) {
    return first_of(s, n, [&](int i) { return s.list.upto[i] >= target; });
}

// Appends keys of a warp to the list as long as it has room, which the result says; lanes without
// a key pass `valid` as false.
__device__ __forceinline__ bool append(Shared& s, bool valid, u64 key) {
    const u32 lane = threadIdx.x % WARP, mask = __ballot_sync(FULL_MASK, valid);
    if (!mask) return true;
    u32 start = 0;
    if (lane == 0) start = atomicAdd(&s.counter, u32(__popc(mask)));
    start = __shfl_sync(FULL_MASK, start, 0);
    u32 at = start + __popc(mask & ((1u << lane) - 1));
    if (valid && at < u32(CAPACITY)) s.list.keys[at] = key;
    return start + __popc(mask) <= u32(CAPACITY);
}

// All logits of a row, four at a time: each(x, id) is called by all threads of a warp together,
// with minus infinity beyond the end.
template <typename F>
__device__ __forceinline__ void for_row(const float* row, int tokens, F each) {
    constexpr int AHEAD = 4;
#pragma unroll 1
    for (int first = threadIdx.x; first - int(threadIdx.x) < tokens; first += AHEAD * THREADS) {
        float v[AHEAD];
#pragma unroll
        for (int e = 0; e < AHEAD; ++e) {
            int id = first + e * THREADS;
            v[e] = id < tokens ? __ldcg(row + id) : nothing();
        }
#pragma unroll
        for (int e = 0; e < AHEAD; ++e) each(v[e], u32(first + e * THREADS));
    }
}

}  // namespace
