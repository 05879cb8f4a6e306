// exl_attn_decode_*_q*: attention of few query rows per sequence over a quantized cache (src/kv.rs), on
// tensor cores, the keys of a sequence spread over several blocks.
//
// What: chunks, softmax and merge are those of decode.cu, tiles have 8 rows. Products are transposed,
// keys by rows and values by rows, so that the cache is the operand of 16 and the rows are that of 8:
// half the sums of decode.cu, and twice as many warps find room. Codes go from memory to registers, 8
// or 16 bytes of a head at a time, and become operands there: a lane's part of an operand is values of
// few consecutive places of a head, whatever their order is in the product. So of keys lane l has values
// (l % 4) D / 4 ... of keys l / 4 and + 8, and the queries lie in shared memory in that order; of values
// it has (l / 4) D / 8 ... of keys 2 (l % 4), + 1, + 8, + 9. Codes of a key are used up before those of
// the next one are asked for, while the other operand's are under way.
//
// Queries come transformed as the keys are (rope); the mean of values is transformed back before it is
// written, by 16 lanes that have 64 values. What a row's product with a page's center is, which keys of 4
// bits have, is added to its products with the page's keys: worked out once a page, by each warp.
//
// exl: spills-allowed exl_attn_decode_128_q4_q4 on 12.0 two registers, once in 16 keys
//
// Bytes: packed K and V of the sequence once per tile. Bound: instructions, about six for a
// lane's value.

#include "decode.cuh"
#include "kv/kv.cuh"

namespace {

constexpr int ROWS = 8;   // query rows of a tile

// 8 values of a head: codes, as 1024 + code in pairs (i, i + 4) of 16-bit floats.
template <int BITS>
struct Octet {
    static constexpr int WORDS = BITS == 8 ? 2 : 1;   // 32-bit words of lower bits

    static __device__ __forceinline__ void expand(const u32* low, u32 high, u32 (&pairs)[4]) {
        const u32 upper = BITS == 6 ? __byte_perm(high, 0, 0x4140) << 4 : 0;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if (BITS == 8) {
                pairs[p] = and_or(__byte_perm(low[0], low[1], p | (4 + p) << 8), 0x00ff00ff, 0x64006400);
            } else {
                pairs[p] = and_or(low[0] >> (4 * p), 0x000f000f, 0x64006400);
                if (BITS == 6) pairs[p] = and_or(upper >> (2 * p), 0x00300030, pairs[p]);
            }
        }
    }
};

// A matrix of 8 x 8 halves, of which lane l has columns 2 (l % 4), + 1 of row l / 4, with rows for columns.
__device__ __forceinline__ u32 transposed(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

template <int BITS>
__device__ __forceinline__ u32 dequantize(u32 pair, __half2 step, __half2 offset) {
    const __half2 zero = __float2half2_rn(1024.0f + float(1 << (BITS - 1)));
    const __half2 code = __hsub2(as_half2(pair), zero);
    return as_u32(BITS == 4 ? __hfma2(code, step, offset) : __hmul2(code, step));
}

// N consecutive octets of one key's head in registers.
template <int BITS, int N>
struct Codes {
    u32 low[N * Octet<BITS>::WORDS], high[(N + 1) / 2];
    u32 word[(N + 3) / 4];   // of the groups of the octets
    static_assert(N <= 4 || N % 4 == 0, "whole groups, or a part of one");

    // Octets `from` and after, of a key that is there or whose words are to be 0.
    __device__ __forceinline__ void load(const Head<const u8>& head, int from, bool there) {
        constexpr int BYTES = N * 4 * Octet<BITS>::WORDS;
        const u8* at = head.codes + from * 4 * Octet<BITS>::WORDS;
        if constexpr (BYTES % 16 == 0) {
#pragma unroll
            for (int i = 0; i < BYTES / 16; ++i) {
                const uint4 v = reinterpret_cast<const uint4*>(at)[i];
                low[4 * i] = v.x;
                low[4 * i + 1] = v.y;
                low[4 * i + 2] = v.z;
                low[4 * i + 3] = v.w;
            }
        } else if constexpr (BYTES == 8) {
            const uint2 v = *reinterpret_cast<const uint2*>(at);
            low[0] = v.x;
            low[1] = v.y;
        } else {
            low[0] = *reinterpret_cast<const u32*>(at);
        }
        if constexpr (BITS == 6) {
            if constexpr (N == 1) {
                high[0] = *reinterpret_cast<const u16*>(head.high + 2 * from);
            } else {
#pragma unroll
                for (int i = 0; i < N / 2; ++i) {
                    high[i] = reinterpret_cast<const u32*>(head.high + 2 * from)[i];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < (N + 3) / 4; ++i) {
            word[i] = there ? reinterpret_cast<const u16*>(head.words)[from / 4 + i] : 0;
        }
    }
    __device__ __forceinline__ void expand(int octet, u32 (&pairs)[4]) const {
        const u32 upper = BITS == 6 ? high[octet / 2] >> (octet % 2 * 16) : 0;
        Octet<BITS>::expand(low + octet * Octet<BITS>::WORDS, upper, pairs);
    }
    // Step and offset of an octet, of which the head has `from` before the first one here: block_scale, its
    // factors looked up.
    __device__ __forceinline__ __half2 scale(int octet, int from, const __half2* factors) const {
        const u32 w = word[octet / 4];
        if constexpr (BITS != 4) return block_scale(BITS, w, 0);
        const int block = N < 4 ? (from + octet) % 4 : octet % 4;
        return __hmul2(as_half2(__byte_perm(w, 0, 0x1414)), factors[w >> (2 * block) & 3]);
    }
};

// Column of a value of a query in shared memory: products go through steps of 16 columns, in which lane
// l has columns 2 (l % 4), + 1, + 8, + 9.
template <int D>
__device__ __forceinline__ int column(int value) {
    const int lane = value / (D / 4), octet = value % (D / 4) / 8, pair = value % 4, half = value / 4 % 2;
    return 16 * (2 * octet + pair / 2) + 2 * lane + half + 8 * (pair % 2);
}

template <int D>
struct ReorderedRows {
    PaddedRows<D, ROWS, 2> rows;

    __device__ __forceinline__ void put(int r, int at, uint2 high, uint2 low) const {
        __half* to = rows.queries + r * (D + 8);
        const u32 terms[2][2] = {{high.x, high.y}, {low.x, low.y}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = column<D>(at + i);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                to[t * ROWS * (D + 8) + place] = __ushort_as_half(u16(terms[t][i / 2] >> (i % 2 * 16)));
            }
        }
    }
    __device__ __forceinline__ void put(int r, const Row& row) const { rows.put(r, row); }
};

template <int D, int WARPS, int K_BITS, int V_BITS>
struct Walk {
    static constexpr int DIM = D, BLOCK_WARPS = WARPS, TILE_ROWS = ROWS, STRIDE = D + 8;
    static constexpr int QUERIES = 2 * ROWS * STRIDE;   // halves
    static constexpr int MERGE = 8;   // chunks that are merged at a time
    // Octets of a lane in a key and in a value.
    static constexpr int K_OCTETS = D / 32, V_OCTETS = D / 64;

    const Attention& a;
    const Tile& tile;
    const int kv_head, warp, lane;
    __half* shared;
    const __half2* factors;   // shared: by the choice of a block of 4-bit codes
    Codes<K_BITS, K_OCTETS> keys[2];
    Codes<V_BITS, V_OCTETS> vals[4];
    // Of rows 2 (lane % 4) + h: maximum, sum of the weights of this lane's keys, values
    // (lane / 4) D / 8 + 8 o + p in values[4 o + p][h], p < 4, and those four places on in [..][2 + h].
    float most[2], sum[2], values[D / 16][4];

    __device__ __forceinline__ Walk(const Attention& a, const Tile& tile, __half* shared)
        : a(a), tile(tile), kv_head(blockIdx.y), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP),
          shared(shared) {
        // A barrier follows before they are used.
        __shared__ __half2 table[4];
        // One in the place of the step: all products are exact.
        if (threadIdx.x < 4) table[threadIdx.x] = block_scale(4, 0x3c00 | threadIdx.x, 0);
        factors = table;
    }

    static __device__ __forceinline__ ReorderedRows<D> query_rows(__half* shared) { return {{shared}}; }
    static __device__ __forceinline__ const float* sums(const __half* shared, int warp) {
        return reinterpret_cast<const float*>(shared + QUERIES) + warp * ROWS * STRIDE;
    }

    // The inverse transform of 64 values by 16 lanes.
    static __device__ __forceinline__ float4 finish(float4 v) {
        const int lane = threadIdx.x % WARP;
        const u32 mask = 0xffffu << (lane & 16);
        v = make_float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
#pragma unroll
        for (int d = 1; d < 16; d *= 2) {
            const float sign = lane & d ? -1.0f : 1.0f;
            v.x = fmaf(sign, v.x, __shfl_xor_sync(mask, v.x, d));
            v.y = fmaf(sign, v.y, __shfl_xor_sync(mask, v.y, d));
            v.z = fmaf(sign, v.z, __shfl_xor_sync(mask, v.z, d));
            v.w = fmaf(sign, v.w, __shfl_xor_sync(mask, v.w, d));
        }
        constexpr float N = 1.0f / 32.0f;
        return make_float4(v.x * N, v.y * N, v.z * N, v.w * N);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            most[h] = minus_infinity();
            sum[h] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
        }
    }

    __device__ __forceinline__ Turns turns(const Chunks& chunks, int chunk) const {
        return find_turns<WARPS>(tile, chunks, chunk, warp);
    }

    // A turn's keys are of one page: where it begins, and this KV head of the key `more` keys on in it.
    template <int BITS, bool IS_KEYS>
    __device__ __forceinline__ const u8* page(const void* cache, Pages& pages, int key) const {
        const int id = pages.of(a, tile.seq, key);
        const Format format(BITS, D, IS_KEYS);
        return static_cast<const u8*>(cache) + id * Head<const u8>::page_bytes(format, a.kv_heads);
    }
    template <int BITS, bool IS_KEYS>
    __device__ __forceinline__ Head<const u8> head(const u8* page, int key, int more) const {
        const u32 at = (key % PAGE_TOKENS + more) * a.kv_heads + kv_head;
        return {page, Format(BITS, D, IS_KEYS), a.kv_heads, at};
    }
    __device__ __forceinline__ void load_keys(Pages& pages, const Turns& t, int turn) {
        if (turn >= t.count) return;
        const int key = t.first + turn * KEYS * WARPS;
        const u8* from = page<K_BITS, true>(a.k_cache, pages, key);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            keys[j].load(head<K_BITS, true>(from, key, lane / 4 + 8 * j), lane % 4 * K_OCTETS, true);
        }
    }
    // What no row sees counts as 0, whatever is stored there.
    __device__ __forceinline__ void load_values(Pages& pages, const Turns& t, int turn) {
        if (turn >= t.count) return;
        const int key = t.first + turn * KEYS * WARPS;
        const u8* from = page<V_BITS, false>(a.v_cache, pages, key);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int at = lane % 4 * 2 + j % 2 + j / 2 * 8;
            const bool there = key + at >= tile.keys_from && key + at < tile.keys_to;
            vals[j].load(head<V_BITS, false>(from, key, at), lane / 4 * V_OCTETS, there);
        }
    }
    // Behind the last key of which fill() loads something.
    __device__ __forceinline__ int fill_end(const Turns& t) const { return keys_end<WARPS>(t, 1); }
    __device__ __forceinline__ void fill(Pages& pages, const Turns& t) {
        load_keys(pages, t, 0);
        load_values(pages, t, 0);
    }

    // Raw products of row 2 (lane % 4) + h with the center of the page of `key`.
    __device__ __forceinline__ void center_products(Pages& pages, int key, float (&shift)[2]) const {
        const u8* first = page<K_BITS, true>(a.k_cache, pages, key);
        const Format format(K_BITS, D, true);
        const uint4* center = reinterpret_cast<const uint4*>(
            Head<const u8>::center(first, format, a.kv_heads, kv_head) + lane % 4 * (D / 2));
        uint4 c[K_OCTETS];
#pragma unroll
        for (int o = 0; o < K_OCTETS; ++o) c[o] = center[o];
        const u32 high = smem_address(shared + lane % 8 * STRIDE + lane / 8 * 8);
        const u32 low = high + ROWS * STRIDE * 2;
        float large[4] = {}, small[4] = {};
#pragma unroll
        for (int o = 0; o < K_OCTETS; ++o) {
            u32 hi[4], lo[4];
            ldmatrix_x4(hi, high + o * 64);
            ldmatrix_x4(lo, low + o * 64);
            // Pairs as those of codes, the same for all of 16 keys.
            const u32 p[4] = {__byte_perm(c[o].x, c[o].z, 0x5410), __byte_perm(c[o].x, c[o].z, 0x7632),
                              __byte_perm(c[o].y, c[o].w, 0x5410), __byte_perm(c[o].y, c[o].w, 0x7632)};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const u32 k[4] = {p[2 * step], p[2 * step], p[2 * step + 1], p[2 * step + 1]};
                mma_f16(large, k, hi[2 * step], hi[2 * step + 1]);
                mma_f16(small, k, lo[2 * step], lo[2 * step + 1]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) shift[h] = large[h] + small[h];
    }

    // Raw products of 16 keys with the rows: raw[h][j] is row 2 (lane % 4) + h, key lane / 4 + 8 j, each
    // with its row's `shift` added.
    __device__ __forceinline__ void products(const float (&shift)[2], float (&raw)[2][2]) const {
        // Matrices of the rows by 8 columns each, 32 columns at a time.
        const u32 high = smem_address(shared + lane % 8 * STRIDE + lane / 8 * 8);
        const u32 low = high + ROWS * STRIDE * 2;
        float large[2][4] = {}, small[2][4] = {};
#pragma unroll
        for (int o = 0; o < K_OCTETS; ++o) {
            u32 b[2][4], hi[4], lo[4];
            ldmatrix_x4(hi, high + o * 64);
            ldmatrix_x4(lo, low + o * 64);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 pairs[4];
                keys[j].expand(o, pairs);
                const __half2 s = keys[j].scale(o, lane % 4 * K_OCTETS, factors);
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    b[j][p] = dequantize<K_BITS>(pairs[p], __low2half2(s), __high2half2(s));
                }
            }
            // Two sums of each, so that products need not wait for those before them.
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const u32 k[4] = {b[0][2 * step], b[1][2 * step], b[0][2 * step + 1], b[1][2 * step + 1]};
                mma_f16(large[step], k, hi[2 * step], hi[2 * step + 1]);
                mma_f16(small[step], k, lo[2 * step], lo[2 * step + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            raw[i % 2][i / 2] = large[0][i] + large[1][i] + (small[0][i] + small[1][i]);
            if (K_BITS == 4) raw[i % 2][i / 2] += shift[i % 2];
        }
    }

    // Products become weights; the factor of what was summed before.
    __device__ __forceinline__ float weights(float (&raw)[2], int h, int key) {
        const Row row = row_at<D>(shared + (lane % 4 * 2 + h) * STRIDE);
        const int from = first_key(a, row.position);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = key + lane / 4 + 8 * j;
            if (a.softcap > 0.0f) raw[j] = capped(a, raw[j], row.factor);
            if (at > row.position || at < from) raw[j] = minus_infinity();
        }
        return soften<2, 4, 32>(raw, a.softcap > 0.0f ? 1.0f : row.factor, most[h], sum[h]);
    }

    // values = values * keep + weights * V.
    __device__ __forceinline__ void weigh(const float (&weights)[2][2], const float (&keep)[2]) {
        // Of rows by keys instead of keys by rows.
        u32 hi[2], lo[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            split(weights[0][j], weights[1][j], hi[j], lo[j]);
            hi[j] = transposed(hi[j]);
            lo[j] = transposed(lo[j]);
        }
#pragma unroll
        for (int o = 0; o < V_OCTETS; ++o) {
            // Of two neighbouring keys, one in each half.
            u32 b[8][2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 first[4], second[4];
                vals[2 * j].expand(o, first);
                vals[2 * j + 1].expand(o, second);
                const __half2 s = vals[2 * j].scale(o, lane / 4 * V_OCTETS, factors);
                const __half2 t = vals[2 * j + 1].scale(o, lane / 4 * V_OCTETS, factors);
                const __half2 step = __lows2half2(s, t), offset = __highs2half2(s, t);
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    const u32 even = __byte_perm(first[p], second[p], 0x5410);
                    const u32 odd = __byte_perm(first[p], second[p], 0x7632);
                    b[p][j] = dequantize<V_BITS>(even, step, offset);
                    b[p + 4][j] = dequantize<V_BITS>(odd, step, offset);
                }
            }
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const u32 v[4] = {b[p][0], b[p + 4][0], b[p][1], b[p + 4][1]};
                float added[4] = {};
                mma_f16(added, v, lo[0], lo[1]);
                mma_f16(added, v, hi[0], hi[1]);
                float(&to)[4] = values[4 * o + p];
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i] = fmaf(to[i], keep[i % 2], added[i]);
            }
        }
    }

    __device__ __forceinline__ void run(Pages& pages, const Turns& t) {
        float shift[2] = {0.0f, 0.0f};
        for (int turn = 0; turn < t.count; ++turn) {
            const int key = t.first + turn * KEYS * WARPS;
            float raw[2][2], keep[2];
            // The warp's first turn in a page.
            if (K_BITS == 4 && (turn == 0 || key % PAGE_TOKENS < KEYS * WARPS)) {
                center_products(pages, key, shift);
            }
            products(shift, raw);
            load_keys(pages, t, turn + 1);
#pragma unroll
            for (int h = 0; h < 2; ++h) keep[h] = weights(raw[h], h, key);
            weigh(raw, keep);
            load_values(pages, t, turn + 1);
        }
        __syncwarp();
    }

    // The warp's result to shared memory: sums [ROWS][STRIDE].
    __device__ __forceinline__ void leave(float (*states)[ROWS][2]) {
        float* to = reinterpret_cast<float*>(shared + QUERIES) + warp * ROWS * STRIDE;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = lane % 4 * 2 + h;
            float all = sum[h];
#pragma unroll
            for (int d = 4; d < WARP; d *= 2) all += __shfl_xor_sync(FULL_MASK, all, d);
            if (lane / 4 == 0) {
                states[warp][row][0] = most[h];
                states[warp][row][1] = all;
            }
            float* at = to + row * STRIDE + lane / 4 * (D / 8);
#pragma unroll
            for (int n = 0; n < D / 16; n += 4) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int i = 2 * half + h;
                    *reinterpret_cast<float4*>(at + 2 * n + 4 * half) = make_float4(
                        values[n][i], values[n + 1][i], values[n + 2][i], values[n + 3][i]);
                }
            }
        }
    }
};

}  // namespace

#define DECODE(D, WARPS, BLOCKS, K_BITS, V_BITS)                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS)                             \
        exl_attn_decode_##D##_q##K_BITS##_q##V_BITS(ATTENTION_PARAMETERS,                         \
                                                    const __grid_constant__ Leaving leaving) {     \
        attend<Walk<D, WARPS, K_BITS, V_BITS>>(ATTENTION_ARGUMENTS, AllStored{leaving});          \
    }
#define DECODES(K_BITS, V_BITS, BLOCKS_128)                                                       \
    DECODE(64, 4, 4, K_BITS, V_BITS)                                                              \
    DECODE(128, 4, BLOCKS_128, K_BITS, V_BITS)
DECODES(8, 8, 3)
DECODES(6, 6, 3)
DECODES(4, 4, 4)
DECODES(8, 4, 3)
