// Quantized matrices as plain ones, with the format's own rounding of each weight to 16 bits.
//
// exl_dequant_f16_*: [columns, K] binary16 in packed row order, what the large products read: K N
// bits / 8 bytes in, 2 K N bytes out, bound by memory. A lane writes 16 bytes of each of its
// four columns of a block. Row-major, or in blocks (gemm/blocked.cuh).
// exl_dequant_f32_*: [K, N] in original feature order, for checks.

#include "gemm/blocked.cuh"
#include "qgemm/half.cuh"

namespace {

struct Place {
    int block, column, bits, piece;
    u32 offset;   // of the block in its column tile
};

__device__ __forceinline__ Place place(const QMatrix& m, int block, int column) {
    const Run run = run_of(m, block);
    return {block, column, run.bits, piece_of(m, run, block), offset_of(run, block)};
}

// Blocks of a column tile that a warp expands one after the other.
constexpr int IN_TURN = 4;

// A warp's first block, and its column tile among those of the launch: the grid's second dimension.
__device__ __forceinline__ int first_block() {
    return IN_TURN * (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP);
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
// output, from row `first` on, all of them multiples of 32. Row-major when `blocks_k` is 0.
struct Blocked {
    int blocks_k, first, group, pitch;

    // Of the first of 32 columns.
    __device__ __forceinline__ int row(int column) const {
        const int turn = column / group;
        return first + turn * pitch + (column - turn * group);
    }
};

template <int KIND>
__device__ __forceinline__ void dequant_f16(const QMatrix& m, char* out, int first_column,
                                            const Blocked& blocked) {
    pdl_launch();
    const int lane = threadIdx.x % WARP, first = first_block();
    if (first >= m.blocks) return pdl_wait();
    // The lane's column g and rows 8t.. of the first block; columns g + 8 i lie `step` further.
    const int column = 32 * blockIdx.y, g = lane >> 2, k = 32 * first + 8 * (lane & 3);
    const bool plain = blocked.blocks_k == 0;
    const long long row_bytes = 64ll * m.blocks, step = plain ? 8 * row_bytes : 8 * 128;
    const int row = plain ? 0 : blocked.row(column) + g;
#pragma unroll 1
    for (int i = 0; i < IN_TURN && first + i < m.blocks; ++i) {
        const Place p = place(m, first + i, first_column + blockIdx.y);
        __half2 v[16];
        weights<KIND>(m, p, lane, v);
        if (i == 0) pdl_wait();
        const int here = k + 32 * i;
        char* to = out + (plain ? row_bytes * (column + g) + 2 * here
                                : blocked_at(row, here, blocked.blocks_k));
#pragma unroll
        for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(to + n * step) = column_of(v, n);
        if (plain || p.block + 1 < m.blocks || m.blocks % 2 == 0) continue;
        // The other half of the last block of the output.
        to = out + blocked_at(row, here + 32, blocked.blocks_k);
#pragma unroll
        for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(to + n * step) = uint4{};
    }
}

template <int KIND>
__device__ __forceinline__ void dequant_f32(const QMatrix& m, float* out, int outputs) {
    pdl_launch();
    const int lane = threadIdx.x % WARP, first = first_block();
    pdl_wait();
#pragma unroll 1
    for (int block = first; block < min(first + IN_TURN, m.blocks); ++block) {
        const Place p = place(m, block, blockIdx.y);
        __half2 v[16];
        weights<KIND>(m, p, lane, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = p.column * 32 + (lane >> 2) + 8 * i;
            const uint4 c = column_of(v, i);
            const u32 words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int row = 32 * block + 8 * (lane & 3) + e;
                const u32 feature = m.perm ? m.perm[row] : u32(row);
                const __half2 pair = as_half2(words[e / 2]);
                const float value = __half2float(e % 2 ? __high2half(pair) : __low2half(pair));
                if (column < outputs) out[(long long)feature * outputs + column] = value;
            }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f16_exl2(const __grid_constant__ QMatrix m, char* out, int first_column,
                         int blocks_k, int first, int group, int pitch) {
    dequant_f16<KIND_EXL2>(m, out, first_column, {blocks_k, first, group, pitch});
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f16_gptq(const __grid_constant__ QMatrix m, char* out, int first_column,
                         int blocks_k, int first, int group, int pitch) {
    dequant_f16<KIND_GPTQ>(m, out, first_column, {blocks_k, first, group, pitch});
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_exl2(const __grid_constant__ QMatrix m, float* out, int outputs) {
    dequant_f32<KIND_EXL2>(m, out, outputs);
}
extern "C" __global__ void __launch_bounds__(256, 3)
    exl_dequant_f32_gptq(const __grid_constant__ QMatrix m, float* out, int outputs) {
    dequant_f32<KIND_GPTQ>(m, out, outputs);
}
