// exl_kv_append: rotates q and k by their positions, transforms q for keys that are stored transformed,
// and writes k and v into a quantized cache (src/kv.rs).
//
// Keys of 4 bits are stored as what they differ by from the center of their position's page, which the
// token in the first slot of a page writes there.
//
// What: a block takes one head of one row. Values go through the transform in shared memory; a warp
// encodes a group: of 8 and 6 bits its largest value gives the scale, of 4 bits each lane tries one
// block with one choice of step and offset for one sign, scale after scale, and the lanes agree on the
// least squared error. Where rows are few (exl_kv_append_few) seven warps try one
// scale of a group each.
//
// Bytes: q twice, k and v once, in 32-bit floats, and the new part of the cache. Bound: latency at few
// rows, instructions at many.

#include "kv/kv.cuh"
#include "rope/rope.cuh"

namespace {

constexpr int THREADS = 128;
// Warps that share the scales of a group where rows are few.
constexpr int SHARES = 7;
// Scales of 4-bit codes that are tried: steps around the one that makes the largest value 8 steps.
constexpr int LEAST = -3, MOST = 3;

__device__ __forceinline__ float nearest(float v, float low, float high) {
    return rintf(fminf(fmaxf(v, low), high));
}

// Squared error of the first `count` values of one block.
template <int N>
__device__ __forceinline__ float block_error(const float (&y)[N], int count, float step, float shift) {
    const float inverse = 1.0f / step;
    float error = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float q = nearest(fmaf(y[i], inverse, -shift), -8.0f, 7.0f) + shift;
        const float e = fmaf(q, step, -y[i]);
        if (i < count) error = fmaf(e, e, error);
    }
    return error;
}

// The best word so far, and its squared error.
struct Found {
    float error;
    u32 word;

    // The better one: of equal errors that with a positive scale, then the one found first.
    __device__ __forceinline__ Found or_else(const Found& later) const {
        const bool turns = later.error == error && (later.word >> 15) < (word >> 15);
        return later.error < error || turns ? later : *this;
    }
};

// Best word of a group of 4-bit codes whose largest value is `most` and whose blocks have N values, of
// the scales that are this one of SPLIT shares. For whole warps. Candidates do not wait for each other.
template <int N, int SPLIT>
__device__ __forceinline__ Found search(const float* y, const Group& g, float most, int share) {
    constexpr int EACH = (MOST - LEAST + SPLIT) / SPLIT;
    const int lane = threadIdx.x % WARP, block = lane / 4 % 4, choice = lane % 4;
    const int from = block * N, count = min(N, g.len - from);
    const float ratio = choice & 1 ? 0.6875f : 1.0f, shift = choice & 2 ? 1.5f : 0.0f;
    const int middle = __half_as_ushort(__float2half_rn(most * 0.125f)) >> 8;
    float mine[N], best = __int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < N; ++i) mine[i] = i < count ? y[from + i] : 0.0f;
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int t = LEAST + EACH * share + i, top = middle + t;
        const u32 scale = u32(top) << 8 | u32(lane / 16) << 15;
        float error = 0.0f;
        if (count > 0) {
            error = block_error(mine, count, __half2float(__ushort_as_half(scale)) * ratio, shift);
        }
        // The best choice of each block: the first of equal ones.
        int chosen = choice;
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            const float other = __shfl_xor_sync(FULL_MASK, error, d);
            const int theirs = __shfl_xor_sync(FULL_MASK, chosen, d);
            if (other < error || (other == error && theirs < chosen)) {
                error = other;
                chosen = theirs;
            }
        }
        u32 bits = count > 0 ? u32(chosen) << (2 * block) : 0;
#pragma unroll
        for (int d = 4; d < 16; d *= 2) {
            error += __shfl_xor_sync(FULL_MASK, error, d);
            bits |= __shfl_xor_sync(FULL_MASK, bits, d);
        }
        if (t <= MOST && top >= 1 && top <= 0x6f && error < best) {
            best = error;
            word = scale | bits;
        }
    }
    const Found mine_found{best, word};
    return mine_found.or_else({__shfl_xor_sync(FULL_MASK, best, 16),
                               __shfl_xor_sync(FULL_MASK, word, 16)});
}

// The transform (kv.cuh) of a head of 64 or 128 values, one of each thread.
__device__ __forceinline__ void hadamard_by_lanes(float* x, int dim, bool forward) {
    const int i = threadIdx.x;
    const bool there = i < dim;
    float v = there ? x[i] : 0.0f;
#pragma unroll
    for (int d = 2; d < WARP; d *= 2) {
        const float other = __shfl_xor_sync(FULL_MASK, v, d);
        v = i & d ? other - v : v + other;
    }
    if (there) x[i] = v;
    __syncthreads();
    const float other = there ? x[i ^ WARP] : 0.0f;
    v = i & WARP ? other - v : v + other;
    __syncthreads();
    if (there) x[i] = forward ? v : v * (1.0f / 32.0f);
    __syncthreads();
}

// Encodes a group of transformed values, of which there may be none. For whole warps, of which SPLIT in
// a row share a group, in step with those of the other groups.
template <int SPLIT>
__device__ __forceinline__ void encode(const float* head, int group, int dim, const Format& f,
                                       const Head<u8>& to) {
    const int lane = threadIdx.x % WARP, share = threadIdx.x / WARP % SPLIT;
    const bool there = group < max(dim / 32, 1);
    const Group g(there ? group : 0, dim);
    const float* y = head + g.from;
    float high = 0.0f, low = 0.0f;
    bool finite = true;
    for (int i = lane; i < g.len; i += WARP) {
        high = fmaxf(high, y[i]);
        low = fminf(low, y[i]);
        finite = finite && isfinite(y[i]);
    }
    high = warp_max(high);
    low = -warp_max(-low);
    finite = __all_sync(FULL_MASK, finite);
    const float zero = float(1 << (f.bits - 1)), most = fminf(fmaxf(high, -low), 65504.0f);
    Found found{__int_as_float(0x7f800000), 0};
    if (there && finite && f.bits == 4 && most != 0.0f) {
        found = g.block == 8 ? search<8, SPLIT>(y, g, most, share) : search<16, SPLIT>(y, g, most, share);
    }
    if constexpr (SPLIT > 1) {
        __shared__ Found shares[SPLIT * THREADS / WARP];
        const int warp = threadIdx.x / WARP;
        if (lane == 0) shares[warp] = found;
        __syncthreads();
#pragma unroll
        for (int i = 1; i < SPLIT; ++i) {
            if (share == 0) found = found.or_else(shares[warp + i]);
        }
        __syncthreads();
    }
    if (!there || share != 0) return;
    u32 word = found.word;
    if (!finite) {
        word = 0x7e00;
    } else if (f.bits != 4) {
        const float scale = (high > -low ? -most : most) / zero;
        word = __half_as_ushort(__float2half_rn(scale));
        if ((word & 0x7fff) == 0) word = 0;
    }
    const bool empty = word == 0 || !finite;
    for (int base = 0; base < g.len; base += WARP) {
        const int i = base + lane;
        u32 code = 0;
        if (i < g.len && !empty) {
            const float2 scale = __half22float2(block_scale(f.bits, word, i / g.block));
            const float shift = scale.y != 0.0f ? 1.5f : 0.0f;
            code = u32(nearest(fmaf(y[i], 1.0f / scale.x, -shift), -zero, zero - 1.0f) + zero);
        }
        const int at = g.from + i;
        if (f.bits == 8) {
            if (i < g.len) to.codes[at] = u8(code);
            continue;
        }
        const u32 next = __shfl_down_sync(FULL_MASK, code, 1);
        const u32 upper = code >> 4 | next >> 4 << 2;
        const u32 more = __shfl_down_sync(FULL_MASK, upper, 2);
        if (i < g.len && lane % 2 == 0) to.codes[at / 2] = u8(code & 15 | next << 4);
        if (f.bits == 6 && i < g.len && lane % 4 == 0) {
            to.high[at / 4] = u8(upper | (i + 2 < g.len ? more << 4 : 0));
        }
    }
    if (lane == 0) *reinterpret_cast<u16*>(to.words + 2 * group) = u16(word);
}

// One head of one row; SPLIT warps share the scales of a group.
template <int SPLIT>
__device__ __forceinline__ void append(float* q, const float* k, const float* v, const int* positions,
                                       const int* slots, const float* inv_freq, u8* k_cache, u8* v_cache,
                                       const __half* k_centers, int centers, int heads, int kv_heads,
                                       int head_dim, int pairs, int interleaved, float factor, int k_bits,
                                       int v_bits, int second, int third) {
    constexpr int COUNT = SPLIT * THREADS;
    extern __shared__ float x[];
    const auto sync = [] { __syncthreads(); };
    const int row = blockIdx.x, which = blockIdx.y;
    pdl_launch();
    const bool is_q = which < heads, is_k = !is_q && which < heads + kv_heads;
    const int head = is_q ? which : is_k ? which - heads : which - heads - kv_heads;
    const long long at = ((long long)row * (is_q ? heads : kv_heads) + head) * head_dim;
    const float* from = (is_q ? q : is_k ? k : v) + at;
    const int turned = is_q || is_k ? pairs : 0;
    // Constants, and the step block, which is there before the first kernel of a step.
    const Positions at_axes{positions, int(gridDim.x), second, third};
    const auto rotation_of = [&](int p) { return rotation(at_axes.at(row, p), inv_freq[p], factor); };
    const int first = threadIdx.x;
    float2 turn = first < turned ? rotation_of(first) : float2{};
    const int slot = slots[row];
    const Format f(is_k ? k_bits : v_bits, head_dim, is_k);
    const int page = min(at_axes.at(row, 0) / PAGE_TOKENS, centers - 1);
    const auto center_at = [&](int i) {
        return page < 0 ? __float2half_rn(0.0f)
                        : k_centers[((long long)page * kv_heads + head) * head_dim + i];
    };
    __half center = __float2half_rn(0.0f);
    if (is_k && f.center > 0 && first < head_dim) center = center_at(first);
    pdl_wait();
    for (int p = first; p < turned; p += COUNT) {
        const int a = interleaved ? 2 * p : p, b = interleaved ? a + 1 : p + pairs;
        if (p != first) turn = rotation_of(p);
        x[a] = from[a] * turn.x - from[b] * turn.y;
        x[b] = from[b] * turn.x + from[a] * turn.y;
    }
    for (int i = 2 * turned + threadIdx.x; i < head_dim; i += COUNT) x[i] = from[i];
    __syncthreads();
    if (head_dim == 64 || head_dim == 128) {
        hadamard_by_lanes(x, head_dim, !is_q);
    } else {
        hadamard<COUNT>(x, head_dim, !is_q, sync);
    }
    if (is_q) {
        for (int i = threadIdx.x; i < head_dim; i += COUNT) q[at + i] = x[i];
        return;
    }
    if (f.center > 0) {
        u8* in_page = k_cache + Head<u8>::page_bytes(f, kv_heads) * (slot / PAGE_TOKENS);
        __half* to = reinterpret_cast<__half*>(Head<u8>::center(in_page, f, kv_heads, head));
        for (int i = first; i < head_dim; i += COUNT) {
            if (i != first) center = center_at(i);
            x[i] -= __half2float(center);
            if (slot % PAGE_TOKENS == 0) to[i] = center;
        }
        __syncthreads();
    }
    const Head<u8> to(is_k ? k_cache : v_cache, f, slot, kv_heads, head);
    constexpr int TOGETHER = THREADS / WARP;
    const int mine = threadIdx.x / (SPLIT * WARP);
    for (int group = 0; group < max(head_dim / 32, 1); group += TOGETHER) {
        encode<SPLIT>(x, group + mine, head_dim, f, to);
    }
}

}  // namespace

#define APPEND_ARGUMENTS                                                                             \
    float *q, const float *k, const float *v, const int *positions, const int *slots,                \
        const float *inv_freq, u8 *k_cache, u8 *v_cache, const __half *k_centers, int centers,       \
        int heads, int kv_heads, int head_dim, int pairs, int interleaved, float factor, int k_bits, \
        int v_bits, int second, int third
#define APPEND_VALUES                                                                                \
    q, k, v, positions, slots, inv_freq, k_cache, v_cache, k_centers, centers, heads, kv_heads,      \
        head_dim, pairs, interleaved, factor, k_bits, v_bits, second, third

extern "C" __global__ void __launch_bounds__(THREADS, 4) exl_kv_append(APPEND_ARGUMENTS) {
    append<1>(APPEND_VALUES);
}

extern "C" __global__ void __launch_bounds__(SHARES* THREADS, 1) exl_kv_append_few(APPEND_ARGUMENTS) {
    append<SHARES>(APPEND_VALUES);
}
