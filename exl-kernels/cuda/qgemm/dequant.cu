// Quantized matrices as plain ones, with the format's own rounding of each weight to 16 bits.
//
// exl_dequant_f16_*: [columns, K] binary16 in packed row order, what the large products read: K N
// bits / 8 bytes in, 2 K N bytes out, bound by memory. One warp per tile; a lane writes 16 bytes
// of each of its four columns. Row-major, or in blocks (gemm/blocked.cuh).
// exl_dequant_f32_*: [K, N] in original feature order, for checks.

#include "gemm/blocked.cuh"
#include "qgemm/half.cuh"

namespace {

struct Place {
    int block, column, bits, piece;
    u32 offset;   // of the block in its column tile
};

__device__ __forceinline__ Place place(const QMatrix& m, int tile, int first_column) {
    const int block = tile % m.blocks;
    const Run run = run_of(m, block);
    return {block, first_column + tile / m.blocks, run.bits, piece_of(m, run, block),
            offset_of(run, block)};
}

// The codes of the calling lane, centred: register q gives pairs 2q and 2q+1.
template <int B>
__device__ __forceinline__ void centred(const char* at, int lane, __half2 (&v)[16]) {
    u32 w[B], bytes[8];
    load_words<B>(w, at, lane);
    expand<B>(w, bytes);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
        v[2 * q] = half_pair<B, 0, 1>(bytes[q]);
        v[2 * q + 1] = half_pair<B, 2, 3>(bytes[q]);
    }
}

// The weights of the calling lane in the same order.
template <int KIND>
__device__ __forceinline__ void weights(const QMatrix& m, const Place& p, int lane,
                                        __half2 (&v)[16]) {
    const HalfScales<KIND> scales(
        ScaleCodes<KIND>::of(m, u32(p.column) * m.pieces, p.piece, lane >> 2));
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
    for (int i = 0; i < 16; ++i) v[i] = scales.weight(v[i], 2 * (i / 8) + (i / 2 & 1));
}

// Rows 8t..8t+7 of column g + 8 i.
__device__ __forceinline__ uint4 column_of(const __half2 (&v)[16], int i) {
    int first = 8 * (i >> 1) + 2 * (i & 1);
    return make_uint4(as_u32(v[first]), as_u32(v[first + 1]), as_u32(v[first + 4]),
                      as_u32(v[first + 5]));
}

// Where columns of a matrix go in an output of several: `group` at a time to every `pitch` rows of the
// output, from row `first` on. Row-major when `blocks_k` is 0.
struct Blocked {
    int blocks_k, first, group, pitch;

    __device__ __forceinline__ char* at(char* out, int column, int k) const {
        const int row = first + column / group * pitch + column % group;
        return out + blocked_at(row, k, blocks_k);
    }
};

template <int KIND>
__device__ __forceinline__ void dequant_f16(const QMatrix& m, char* out, int first_column,
                                            int columns, const Blocked& blocked) {
    pdl_launch();
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
    const int k = 32 * p.block + 8 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = (p.column - first_column) * 32 + (lane >> 2) + 8 * i;
        if (blocked.blocks_k == 0) {
            const long long row_bytes = 64ll * m.blocks;
            *reinterpret_cast<uint4*>(out + row_bytes * column + 2 * k) = column_of(v, i);
            continue;
        }
        *reinterpret_cast<uint4*>(blocked.at(out, column, k)) = column_of(v, i);
        if (p.block + 1 == m.blocks && m.blocks % 2) {   // the other half of the last block
            *reinterpret_cast<uint4*>(blocked.at(out, column, k + 32)) = make_uint4(0, 0, 0, 0);
        }
    }
}

template <int KIND>
__device__ __forceinline__ void dequant_f32(const QMatrix& m, float* out, int outputs) {
    pdl_launch();
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
    exl_dequant_f16_exl2(const __grid_constant__ QMatrix m, char* out, int first_column,
                         int columns, int blocks_k, int first, int group, int pitch) {
    dequant_f16<KIND_EXL2>(m, out, first_column, columns, {blocks_k, first, group, pitch});
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f16_gptq(const __grid_constant__ QMatrix m, char* out, int first_column,
                         int columns, int blocks_k, int first, int group, int pitch) {
    dequant_f16<KIND_GPTQ>(m, out, first_column, columns, {blocks_k, first, group, pitch});
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_exl2(const __grid_constant__ QMatrix m, float* out, int outputs) {
    dequant_f32<KIND_EXL2>(m, out, outputs);
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_gptq(const __grid_constant__ QMatrix m, float* out, int outputs) {
    dequant_f32<KIND_GPTQ>(m, out, outputs);
}
