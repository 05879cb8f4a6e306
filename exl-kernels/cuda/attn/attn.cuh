// What the attention kernels share: arguments, tiles of query rows, queries as two 16-bit terms, the
// online softmax.
//
// Packed rows: the heads / kv_heads ("group") query heads of a KV head are further rows of the same
// keys. Packed row r of a sequence is head r % group of its token r / group.
//
// Softmax: scores are in units of log2(e). The running maximum is rounded up to a whole number, so
// that every rescaling is by an exact power of two, and weights are 2^(score - maximum + 14): as two
// 16-bit terms they keep 22 bits down to 2^-24 of the largest and never overflow.
#pragma once

#include "common/common.cuh"

struct Attention {
    const float* q;                                 // [rows, heads, dim]
    const void *k_cache, *v_cache;                  // [pages, PAGE_TOKENS, kv_heads, dim]
    const int *block_table, *q_start, *kv_len;      // [seqs, pages_per_seq], [seqs + 1], [seqs]
    float* out;                                     // [rows, heads, dim]
    float* scratch;                                 // partial results, see Partials
    u32* counters;                                  // zero
    int rows, seqs, pages_per_seq, heads, kv_heads, dim;
    int splits;                                     // most blocks that share the keys of a tile
    int chunk;                                      // keys of a block; 0: as even as can be
    int window;                                     // 0: none
    float scale, softcap;
    int stored;                                     // keys in front of a sequence's rows are there
                                                    // before the launch before this one
};
// What every attention kernel is given, and the same as an Attention.
#define ATTENTION_PARAMETERS                                                                      \
    const float *q, const void *k_cache, const void *v_cache, const int *block_table,             \
        const int *q_start, const int *kv_len, float *out, float *scratch, u32 *counters,         \
        int rows, int seqs, int pages_per_seq, int heads, int kv_heads, int head_dim, int splits, \
        int chunk, int window, float scale, float softcap, int stored
#define ATTENTION_ARGUMENTS                                                                       \
    {q,    k_cache, v_cache,       block_table, q_start,  kv_len,   out,    scratch, counters,    \
     rows, seqs,    pages_per_seq, heads,       kv_heads, head_dim, splits, chunk,   window,      \
     scale, softcap,        stored}

constexpr float LOG2_E = 1.4426950408889634f;
// Weights are stored times two to this power.
constexpr float WEIGHT_SHIFT = 14.0f;
// Fewest keys of a block when `chunk` is 0.
constexpr int LEAST_CHUNK = 128;
// Most chunks of a tile then.
constexpr int MAX_SPLITS = 128;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// 2^x within two units in the last place; 0 below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8x8 matrices, transposed: lane l holds rows 2 (l % 4), + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// First key that the row at a position sees.
__device__ __forceinline__ int first_key(const Attention& a, int position) {
    return a.window > 0 ? max(0, position + 1 - a.window) : 0;
}

// Packed rows `from .. from + count` of sequence `seq`, whose tokens are rows start .. end.
struct Tile {
    int seq, start, end, len;
    int from, count;   // count <= 0: nothing to do
    int keys_from, keys_to;   // keys that any row of the tile sees

    // Position of a packed row of the sequence.
    __device__ __forceinline__ int position(int packed, int group) const {
        return len - (end - start) + packed / group;
    }
    // Its place among all [rows, heads].
    __device__ __forceinline__ int cell(int packed, int group, int heads, int kv_head) const {
        return (start + packed / group) * heads + kv_head * group + packed % group;
    }
};

// The tile of slot `slot` of rows * group / ROWS + seqs slots. Slots of sequence s begin at
// q_start[s] * group / ROWS + s, rounded down: that leaves each at least as many slots as it has
// tiles. For whole warps.
template <int ROWS>
__device__ __forceinline__ Tile find_tile(const Attention& a, int slot) {
    const int lane = threadIdx.x % WARP, group = a.heads / a.kv_heads;
    Tile tile = {0, 0, 0, 0, 0, 0, 0, 0};
    int base = 0;
    for (int s = lane; s - lane < a.seqs; s += WARP) {
        const bool there = s < a.seqs;
        const int start = there ? a.q_start[s] : 0, end = there ? a.q_start[s + 1] : 0;
        const int len = there ? a.kv_len[s] : 0;
        const int first = start * group / ROWS + s;
        const u32 before = __ballot_sync(FULL_MASK, there && first <= slot);
        if (before == 0) break;
        const int last = WARP - 1 - __clz(before);
        tile.seq = s - lane + last;
        tile.start = __shfl_sync(FULL_MASK, start, last);
        tile.end = __shfl_sync(FULL_MASK, end, last);
        tile.len = __shfl_sync(FULL_MASK, len, last);
        base = __shfl_sync(FULL_MASK, first, last);
        if (last < WARP - 1) break;
    }
    tile.from = (slot - base) * ROWS;
    tile.count = min(ROWS, (tile.end - tile.start) * group - tile.from);
    if (tile.count > 0) {
        tile.keys_from = first_key(a, tile.position(tile.from, group));
        tile.keys_to = tile.position(tile.from + tile.count - 1, group) + 1;
    }
    return tile;
}

// The part of the keys [from, to) that blocks take: chunk c is
// [origin + c * size, origin + (c + 1) * size), c in first .. first + count.
struct Chunks {
    int origin, size, first, count;
};

__device__ __forceinline__ Chunks find_chunks(const Attention& a, int from, int to) {
    const bool fixed = a.chunk > 0;
    Chunks c;
    // Fixed chunks stand where they stand, whatever the batch.
    c.origin = fixed ? 0 : from / 64 * 64;
    const int even = ((to - c.origin + a.splits - 1) / a.splits + 63) / 64 * 64;
    c.size = fixed ? a.chunk : max(even, LEAST_CHUNK);
    c.first = (from - c.origin) / c.size;
    // At least one, which may be empty, so that somebody writes the result.
    c.count = max(1, (max(to - c.origin, 0) + c.size - 1) / c.size - c.first);
    return c;
}

// Adds a part with its own maximum and sum to what is there, and returns the factors of the values
// that are there and of the part's. The same bits wherever it is used.
__device__ __forceinline__ float2 fold(float& most, float& sum, float part_most, float part_sum) {
    if (part_most == minus_infinity() && part_sum == 0.0f) return make_float2(1.0f, 0.0f);
    const float next = fmaxf(most, part_most);
    const float a = most == next ? 1.0f : exp2_fast(most - next);
    const float b = part_most == next ? 1.0f : exp2_fast(part_most - next);
    sum = __fmaf_rn(b, part_sum, __fmul_rn(a, sum));
    most = next;
    return make_float2(a, b);
}
__device__ __forceinline__ float fold_value(float2 factors, float value, float part) {
    return __fmaf_rn(factors.y, part, __fmul_rn(factors.x, value));
}
__device__ __forceinline__ float4 fold_value(float2 factors, float4 value, float4 part) {
    return make_float4(
        fold_value(factors, value.x, part.x), fold_value(factors, value.y, part.y),
        fold_value(factors, value.z, part.z), fold_value(factors, value.w, part.w));
}

// What turns weighted sums into means: 0 for a row without keys; NaN stays.
__device__ __forceinline__ float normalizer(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Partial results in scratch memory: values [rows * heads, splits, dim], then, aligned to
// 8 bytes, maximum and sum [rows * heads, splits].
struct Partials {
    float* values;
    float2* states;

    __device__ __forceinline__ Partials(const Attention& a) {
        const long long cells = (long long)a.rows * a.heads * a.splits;
        values = a.scratch;
        states = reinterpret_cast<float2*>(a.scratch + (cells * a.dim + 1) / 2 * 2);
    }
};

// Counts a block of whoever shares `counter` and says whether it is the last of `count`: then all
// that the others wrote before is visible. For whole blocks.
__device__ __forceinline__ bool arrives_last(u32* counter, int count) {
    __shared__ u32 arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1u);
        if (arrived == u32(count - 1)) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return arrived == u32(count - 1);
}

// Two numbers as 16-bit floats and what those leave.
__device__ __forceinline__ void split(float a, float b, u32& hi, u32& lo) {
    const __half2 h = __floats2half2_rn(a, b);
    const __half2 l = __floats2half2_rn(a - __low2float(h), b - __high2float(h));
    hi = as_u32(h);
    lo = as_u32(l);
}

// A lane's part of a query of D values, zeros beyond `dim` and for a query that is not there (null).
// `q` is aligned to 16 bytes, dim a multiple of 4.
template <int D>
struct Query {
    static constexpr int N = (D + 127) / 128;
    float4 values[N];   // 4 * lane + 128 * i ...

    __device__ __forceinline__ void load(const float* q, int dim) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int at = 4 * (threadIdx.x % WARP) + 128 * i;
            values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (q != nullptr && at < dim) values[i] = *reinterpret_cast<const float4*>(q + at);
        }
    }
    // Writes it as q 2^e = hi + lo by `put(at, hi, lo)`, four values from value `at` on; e puts the
    // largest into [2^10, 2^11), so that lo keeps its bits. Returns 2^-e. For whole warps.
    template <class Put>
    __device__ __forceinline__ float store(bool negate, const Put& put) const {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float4 v = values[i];
            most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
        const int exponent = (__float_as_int(warp_max(most)) >> 23) - 127;
        const int e = min(max(10 - exponent, -100), 100);
        float up = __int_as_float((127 + e) << 23);
        if (negate) up = -up;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int at = 4 * (threadIdx.x % WARP) + 128 * i;
            if (at >= D) continue;
            const float4 v = make_float4(values[i].x * up, values[i].y * up, values[i].z * up,
                                         values[i].w * up);
            uint2 high, low;
            split(v.x, v.y, high.x, low.x);
            split(v.z, v.w, high.y, low.y);
            put(at, high, low);
        }
        return __int_as_float((127 - e) << 23);
    }
};

// How products of stored queries become scores in units of log2(e): product * factor, or with a
// soft-cap capped(product, factor). `down` is from Query::store.
__device__ __forceinline__ float score_unit(const Attention& a) {
    return a.softcap > 0.0f ? 2.0f * LOG2_E / a.softcap : LOG2_E;
}
// Positive, so that the largest product is the largest score.
__device__ __forceinline__ float score_scale(const Attention& a, float down) {
    return fmaxf(fabsf(a.scale) * down, 1e-37f);
}
__device__ __forceinline__ float score_factor(const Attention& a, float down) {
    return score_scale(a, down) * score_unit(a);
}
// cap tanh(x) with tanh(x) = 1 - 2 / (1 + e^(2 x)), within 2e-7.
__device__ __forceinline__ float capped(const Attention& a, float product, float factor) {
    const float tanh = 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(product * factor));
    return a.softcap * LOG2_E * tanh;
}

// What a warp needs to know of a query row.
struct Row {
    int position;
    float factor;   // of its products (score_factor)
    int cell;       // its place among all [rows, heads]; -1 for none
};

// Rows in shared memory that are D + 8 halves long. What is to know of a row lies behind its D halves
// (registers are scarce), second terms, if TERMS is 2, behind the first terms of all ROWS.
template <int D, int ROWS, int TERMS>
struct PaddedRows {
    __half* queries;

    __device__ __forceinline__ void put(int r, int at, uint2 high, uint2 low) const {
        __half* to = queries + r * (D + 8) + at;
        *reinterpret_cast<uint2*>(to) = high;
        if (TERMS > 1) *reinterpret_cast<uint2*>(to + ROWS * (D + 8)) = low;
    }
    __device__ __forceinline__ void put(int r, const Row& row) const {
        *reinterpret_cast<Row*>(queries + r * (D + 8) + D) = row;
    }
};
template <int D>
__device__ __forceinline__ const Row& row_at(const __half* hi) {
    return *reinterpret_cast<const Row*>(hi + D);
}

// Stores COUNT rows `first`, + STEP ... of a tile, AT_ONCE at a time. A row that is not there sees no
// keys. For whole warps.
template <int D, int STEP, int COUNT, int AT_ONCE, class Rows>
__device__ __forceinline__ void store_rows(const Attention& a, const Tile& tile, int kv_head,
                                           int first, const Rows& to) {
    static_assert(COUNT % AT_ONCE == 0, "whole batches");
    const int group = a.heads / a.kv_heads;
#pragma unroll 1
    for (int from = first; from < first + COUNT * STEP; from += AT_ONCE * STEP) {
        Query<D> query[AT_ONCE];
        int cell[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int r = from + i * STEP;
            const bool there = r < tile.count;
            cell[i] = there ? tile.cell(tile.from + r, group, a.heads, kv_head) : -1;
            query[i].load(there ? a.q + (long long)cell[i] * a.dim : nullptr, a.dim);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int r = from + i * STEP;
            Row row;
            row.position = cell[i] >= 0 ? tile.position(tile.from + r, group) : -1;
            const float down = query[i].store(
                a.scale < 0.0f, [&](int at, uint2 high, uint2 low) { to.put(r, at, high, low); });
            row.factor = score_factor(a, down);
            row.cell = cell[i];
            if (threadIdx.x % WARP == 0) to.put(r, row);
        }
    }
}

// The softmax of a row over N raw products of this lane and of those whose numbers differ from its own
// in the bits LOW .. HIGH / 2, in place: products become weights. Returns the factor of what was summed
// before.
template <int N, int LOW = 1, int HIGH = 4>
__device__ __forceinline__ float soften(float (&raw)[N], float factor, float& most, float& sum) {
    float top = raw[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, raw[i]);
#pragma unroll
    for (int d = LOW; d < HIGH; d *= 2) top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, d));
    const float next = fmaxf(most, ceilf(top * factor));
    // Nothing to see so far: any finite base gives weights of 0.
    const float base = (next == minus_infinity() ? 0.0f : next) - WEIGHT_SHIFT;
    const float keep = most == next ? 1.0f : exp2_fast(most - next);
    float added = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        raw[i] = exp2_fast(fmaf(raw[i], factor, -base));
        added += raw[i];
    }
    sum = fmaf(sum, keep, added);
    most = next;
    return keep;
}

// As above for the raw products with keys key + 8 (i / 2) + 2 (lane % 4) + i % 2, of which, if `hides`,
// the row does not see all.
template <int N>
__device__ __forceinline__ float soften(const Attention& a, float (&raw)[N], const Row& row, int key,
                                        bool hides, float& most, float& sum) {
    if (a.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < N; ++i) raw[i] = capped(a, raw[i], row.factor);
    }
    if (hides) {
        const int from = first_key(a, row.position);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int at = key + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
            if (at > row.position || at < from) raw[i] = minus_infinity();
        }
    }
    return soften(raw, a.softcap > 0.0f ? 1.0f : row.factor, most, sum);
}

// Writes the means of a row, of which this lane and its three neighbours have parts of the sum and
// columns 8 n + 2 (lane % 4), + 1 of the weighted values: values[n][2 h] and after, h being 0 or 1.
template <int N>
__device__ __forceinline__ void write_row(const Attention& a, int cell, float sum,
                                          const float (&values)[N][4], int h) {
    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
    const float n = normalizer(sum);
    if (cell < 0) return;
    float* to = a.out + (long long)cell * a.dim + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (8 * i >= a.dim) break;
        *reinterpret_cast<float2*>(to + 8 * i) =
            make_float2(values[i][2 * h] * n, values[i][2 * h + 1] * n);
    }
}
