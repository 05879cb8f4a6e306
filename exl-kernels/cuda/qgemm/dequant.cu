// Quantized matrices as plain ones, with the format's own rounding of each weight to 16 bits.
//
// exl_dequant_f16_*: [columns, K] binary16 in packed row order, what the large products read: K N
// bits / 8 bytes in, 2 K N bytes out, bound by memory. One warp per tile; a lane writes 16 bytes
// of each of its four columns.
// exl_dequant_f32_*: [K, N] in original feature order, for checks.

#include "qgemm/tile.cuh"
#include "qgemm/scales.cuh"

namespace {

struct Place {
    int block, column, bits;
    u32 offset;   // of the block in its column tile
};

__device__ __forceinline__ Place place(const QMatrix& m, int tile, int first_column) {
    Place p;
    p.block = tile % m.blocks;
    p.column = first_column + tile / m.blocks;
    p.bits = run_of(m, p.block, p.offset).bits;
    return p;
}

// Four signed bytes as two pairs of 16-bit floats, times 2^(B - 8).
template <int B>
__device__ __forceinline__ void halves(u32 bytes, __half2& low, __half2& high) {
    const __half2 less = __float2half2_rn(-1152.0f);
    const __half2 f = __float2half2_rn(1.0f / float(1 << (8 - B)));
    bytes ^= 0x80808080u;
    low = __hmul2(__hadd2(as_half2(__byte_perm(bytes, 0x64646464u, 0x4140)), less), f);
    high = __hmul2(__hadd2(as_half2(__byte_perm(bytes, 0x64646464u, 0x4342)), less), f);
}

// The codes of the calling lane, centred: register q gives pairs 2q and 2q+1.
template <int B>
__device__ __forceinline__ void centred(const char* at, int lane, __half2 (&v)[16]) {
    u32 w[B], bytes[8];
    load_words<B>(w, at, lane);
    expand<B>(w, bytes);
#pragma unroll
    for (int q = 0; q < 8; ++q) halves<B>(bytes[q], v[2 * q], v[2 * q + 1]);
}

// The weights of the calling lane in the same order.
template <int KIND>
__device__ __forceinline__ void weights(const QMatrix& m, const Place& p, int lane,
                                        __half2 (&v)[16]) {
    const Scales<KIND> scales(
        ScaleCodes<KIND>::of(m, u32(p.column) * m.pieces, m.piece_of[p.block], lane >> 2));
    const char* at = m.tiles + m.column_bytes * p.column + p.offset;
    switch (p.bits) {
        case 2: centred<2>(at, lane, v); break;
        case 3: centred<3>(at, lane, v); break;
        case 4: centred<4>(at, lane, v); break;
        case 5: centred<5>(at, lane, v); break;
        case 6: centred<6>(at, lane, v); break;
        default: centred<8>(at, lane, v); break;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        int column = 2 * (i / 8) + (i / 2 & 1);
        if constexpr (KIND == KIND_GPTQ) {
            v[i] = __hadd2(v[i], __half2half2(__int2half_rn(scales.shift[column])));
        }
        // The scale is a 16-bit float, so the product is rounded once, as the format says.
        v[i] = __hmul2(v[i], __float2half2_rn(scales.s[column]));
    }
}

// Rows 8t..8t+7 of column g + 8 i.
__device__ __forceinline__ uint4 column_of(const __half2 (&v)[16], int i) {
    int first = 8 * (i >> 1) + 2 * (i & 1);
    return make_uint4(as_u32(v[first]), as_u32(v[first + 1]), as_u32(v[first + 4]),
                      as_u32(v[first + 5]));
}

template <int KIND>
__device__ __forceinline__ void dequant_f16(const QMatrix* matrix, __half* out, int first_column,
                                            int columns) {
    pdl_launch();
    const QMatrix& m = *matrix;
    int tile = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    bool any = tile < m.blocks * columns;
    Place p;
    __half2 v[16];
    if (any) {
        p = place(m, tile, first_column);
        weights<KIND>(m, p, lane, v);
    }
    pdl_wait();
    if (!any) return;
    long long k = (long long)m.blocks * 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        long long row = (p.column - first_column) * 32ll + (lane >> 2) + 8 * i;
        *reinterpret_cast<uint4*>(out + row * k + 32 * p.block + 8 * (lane & 3)) = column_of(v, i);
    }
}

template <int KIND>
__device__ __forceinline__ void dequant_f32(const QMatrix* matrix, float* out, int outputs) {
    pdl_launch();
    const QMatrix& m = *matrix;
    int tile = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    pdl_wait();
    if (tile >= m.blocks * m.columns) return;
    Place p = place(m, tile, 0);
    __half2 v[16];
    weights<KIND>(m, p, lane, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int column = p.column * 32 + (lane >> 2) + 8 * i;
        uint4 c = column_of(v, i);
        u32 words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int row = 32 * p.block + 8 * (lane & 3) + e;
            u32 feature = m.perm ? m.perm[row] : u32(row);
            __half2 pair = as_half2(words[e / 2]);
            float value = __half2float(e % 2 ? __high2half(pair) : __low2half(pair));
            if (column < outputs) out[(long long)feature * outputs + column] = value;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f16_exl2(const QMatrix* m, __half* out, int first_column, int columns) {
    dequant_f16<KIND_EXL2>(m, out, first_column, columns);
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f16_gptq(const QMatrix* m, __half* out, int first_column, int columns) {
    dequant_f16<KIND_GPTQ>(m, out, first_column, columns);
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_exl2(const QMatrix* m, float* out, int outputs) {
    dequant_f32<KIND_EXL2>(m, out, outputs);
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_gptq(const QMatrix* m, float* out, int outputs) {
    dequant_f32<KIND_GPTQ>(m, out, outputs);
}
