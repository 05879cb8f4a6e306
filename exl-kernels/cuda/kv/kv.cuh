// Quantized caches (src/kv.rs): where the heads of a page lie, the transform, what words mean.
#pragma once

#include "common/common.cuh"

// Storage of keys or of values: bits of a code, 8, 6 or 4, the sizes of a head in the planes, and of its
// center, which keys of 4 bits have.
struct Format {
    int bits, codes, high, words, center;

    __device__ __forceinline__ Format(int bits, int dim, bool is_keys)
        : bits(bits), codes(bits == 8 ? dim : dim / 2), high(bits == 6 ? (dim + 3) / 4 : 0),
          words(2 * max(dim / 32, 1)), center(is_keys && bits == 4 ? 2 * dim : 0) {}
};

// A head in the three planes of its page.
template <class Byte>
struct Head {
    Byte *codes, *high, *words;

    __device__ __forceinline__ Head(Byte* cache, const Format& f, long long token, int kv_heads,
                                    int kv_head)
        : Head(cache + page_bytes(f, kv_heads) * (token / PAGE_TOKENS), f, kv_heads,
               u32(token % PAGE_TOKENS) * kv_heads + kv_head) {}

    // Of the page that begins at `page`: head `at`, which is token * kv_heads + KV head.
    __device__ __forceinline__ Head(Byte* page, const Format& f, int kv_heads, u32 at) {
        const u32 heads = PAGE_TOKENS * kv_heads;
        codes = page + at * f.codes;
        high = page + (heads * f.codes + at * f.high);
        words = page + (heads * (f.codes + f.high) + at * f.words);
    }
    __device__ __forceinline__ static u32 plane_bytes(const Format& f, int kv_heads) {
        return PAGE_TOKENS * kv_heads * (f.codes + f.high + f.words);
    }
    __device__ __forceinline__ static long long page_bytes(const Format& f, int kv_heads) {
        return plane_bytes(f, kv_heads) + u32(kv_heads * f.center);
    }
    // The center of a KV head in the page that begins at `page`.
    __device__ __forceinline__ static Byte* center(Byte* page, const Format& f, int kv_heads, int kv_head) {
        return page + (plane_bytes(f, kv_heads) + u32(kv_head * f.center));
    }
};

// Values of group `group` of a head.
struct Group {
    int from, len, block;   // block: values of a block

    __device__ __forceinline__ Group(int group, int dim) {
        from = 32 * group;
        len = group + 1 == max(dim / 32, 1) ? dim - from : 32;
        block = (len + 31) / 32 * 8;
    }
};

// Step and offset of a block, from the word of its group and its place there.
__device__ __forceinline__ __half2 block_scale(int bits, u32 word, int block) {
    if (bits != 4) return __halves2half2(__ushort_as_half(word), __float2half_rn(0.0f));
    const u32 mine = word >> (2 * block);
    __half step = __ushort_as_half(word & 0xff00);
    if (mine & 1) step = __hmul(step, __float2half_rn(0.6875f));
    const __half offset = mine & 2 ? __hmul(step, __float2half_rn(1.5f)) : __float2half_rn(0.0f);
    return __halves2half2(step, offset);
}

// Length of the unit of a head that begins at `at`: 64, or what is left rounded down to a power of two.
__device__ __forceinline__ int unit_length(int at, int dim) {
    const int rest = dim - at;
    return rest >= 64 ? 64 : 1 << (31 - __clz(max(rest, 1)));
}

// The transform of a head in shared memory by THREADS threads, which `sync` lets wait for each other;
// `forward` is from values to what is stored.
template <int THREADS, class Sync>
__device__ __forceinline__ void hadamard(float* x, int dim, bool forward, const Sync& sync) {
    const int thread = threadIdx.x % THREADS;
    for (int step = 2; step < 64; step *= 2) {
        for (int i = thread; i < dim / 2; i += THREADS) {
            // Units other than the last ones are 64 long, and all are multiples of what follows them.
            int at = i / 32 * 64, pair = i % 32, length = unit_length(at, dim);
            while (2 * pair >= length) {
                pair -= length / 2;
                at += length;
                length = unit_length(at, dim);
            }
            if (step < length) {
                float* a = x + at + pair / step * 2 * step + pair % step;
                const float u = a[0], v = a[step];
                a[0] = u + v;
                a[step] = u - v;
            }
        }
        sync();
    }
    for (int i = thread; i < dim; i += THREADS) {
        int at = i / 64 * 64, length = unit_length(at, dim);
        while (i - at >= length) {
            at += length;
            length = unit_length(at, dim);
        }
        const float n = float(length / 2);
        if (!forward) x[i] *= length == 64 ? 1.0f / 32.0f : rsqrtf(32.0f * n);
        else if (length != 64) x[i] *= sqrtf(32.0f / n);
    }
    sync();
}
