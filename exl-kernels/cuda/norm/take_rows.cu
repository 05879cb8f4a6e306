// exl_take_rows: out[r, :] = table[index[r], :] * scale + add[r, :]. Embedding of tokens and positions,
// and the rows that need logits.
//
// table is F32, F16 or BF16 [limit, dim], index I32 [rows], out and add F32 [rows, dim]; add may be 0 or
// out. Rows whose index is not in 0..limit become NaN: nothing outside the table is read. Moves
// (4 + element) bytes an element, and 4 more where it adds; bound: memory at many rows, two dependent loads at one row. A block takes CHUNK
// elements of a row, eight per thread.

#include "common/common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int EACH = 8;
constexpr int CHUNK = THREADS * EACH;

// Eight elements from p on, which is aligned to 16 bytes.
__device__ __forceinline__ void load_8(float (&v)[EACH], const float* p) {
    float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void load_8(float (&v)[EACH], const __half* p) {
    uint4 w = *reinterpret_cast<const uint4*>(p);
    u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = __half22float2(*reinterpret_cast<__half2*>(&words[i]));
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void load_8(float (&v)[EACH], const __nv_bfloat16* p) {
    uint4 w = *reinterpret_cast<const uint4*>(p);
    u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// `vectors`: dim is a multiple of 8, table, add and out are aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void take_rows(const int* index, const T* table, const float* add,
                                          float* out, int limit, int dim, float scale,
                                          int vectors) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, first = blockIdx.y * CHUNK;
    const int from = index[row];
    const bool inside = u32(from) < u32(limit);
    const T* source = table + (long long)(inside ? from : 0) * dim;
    const long long start = (long long)row * dim;
    float* to = out + start;
    const float nan = __int_as_float(0x7fc00000);
    if (vectors) {
        const int at = first + EACH * threadIdx.x;
        if (at >= dim) return;
        float v[EACH], more[EACH] = {};
        if (inside) load_8(v, source + at);
        if (add) load_8(more, add + start + at);
#pragma unroll
        for (int i = 0; i < EACH; ++i) v[i] = inside ? fmaf(v[i], scale, more[i]) : nan;
        reinterpret_cast<float4*>(to + at)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(to + at)[1] = make_float4(v[4], v[5], v[6], v[7]);
        return;
    }
    const int end = min(first + CHUNK, dim);
    for (int at = first + threadIdx.x; at < end; at += THREADS) {
        const float more = add ? add[start + at] : 0.0f;
        to[at] = inside ? fmaf(to_float(source[at]), scale, more) : nan;
    }
}

}  // namespace

#define ENTRY(NAME, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        NAME(const int* index, const T* table, const float* add, float* out, int limit, int dim,   \
             float scale, int vectors) {                                                           \
        take_rows(index, table, add, out, limit, dim, scale, vectors);                             \
    }

ENTRY(exl_take_rows_f32, float)
ENTRY(exl_take_rows_f16, __half)
ENTRY(exl_take_rows_bf16, __nv_bfloat16)
