// exl_repack: from the CPU's packed form (quant/pack.rs: panels of 16 columns, blocks of 32 rows,
// eight vectors of 64 codes) to tiles (tile.cuh). Runs once per matrix when it is loaded; reads and
// writes every code once. One warp per tile.

#include "qgemm/tile.cuh"

namespace {

// The four codes of rows 4i..4i+3 of a column (c < 16) of a panel's block, one per byte.
__device__ __forceinline__ u32 plane8(const char* p, int i, int c) {
    return *reinterpret_cast<const u32*>(p + 64 * i + 4 * c);
}
__device__ __forceinline__ u32 plane4(const char* p, int i, int c) {
    return (*reinterpret_cast<const u32*>(p + 64 * (i / 2) + 4 * c) >> (4 * (i & 1))) & 0x0f0f0f0fu;
}
__device__ __forceinline__ u32 plane2(const char* p, int i, int c) {
    return (*reinterpret_cast<const u32*>(p + 64 * (i / 4) + 4 * c) >> (2 * (i & 3))) & 0x03030303u;
}
__device__ __forceinline__ u32 plane1(const char* p, int i, int c) {
    u32 n = (*reinterpret_cast<const u32*>(p + 8 * i + 4 * (c / 8)) >> (4 * (c % 8))) & 15u;
    return (n & 1) | (n & 2) << 7 | (n & 4) << 14 | (n & 8) << 21;
}

__device__ __forceinline__ u32 codes(const char* p, int bits, int i, int c) {
    switch (bits) {
        case 2: return plane2(p, i, c);
        case 3: return plane2(p, i, c) | plane1(p + 128, i, c) << 2;
        case 4: return plane4(p, i, c);
        case 5: return plane4(p, i, c) | plane1(p + 256, i, c) << 4;
        case 6: return plane4(p, i, c) | plane2(p + 256, i, c) << 4;
        default: return plane8(p, i, c);
    }
}

// Bits `from` and up of the codes, as many as `mask` has.
__device__ __forceinline__ u32 piece(u32 codes, int from, u32 mask) {
    return codes >> from & mask * 0x01010101u;
}

// `v` are the codes of the registers, one per byte.
template <int B>
__device__ __forceinline__ void pack(char* block, int lane, u32 (&v)[8]) {
    constexpr u32 top = 0x01010101u << (B - 1);
    u32 w[B] = {};
#pragma unroll
    for (int q = 0; q < 8; ++q) v[q] ^= top;   // two's complement of the centred code
    // Whole codes, from the top of the bytes down; the words in the order of tile.cuh.
    constexpr int WHOLE = 8 / B;
#pragma unroll
    for (int q = 0; q < WHOLE * B; ++q) w[q / WHOLE] |= v[q] << (8 - B - q % WHOLE * B);
    if constexpr (B == 6) {
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] |= piece(v[6 + i / 3], 4 - i % 3 * 2, 3);
    } else if constexpr (B == 5) {
#pragma unroll
        for (int i = 0; i < 3; ++i) w[i] |= piece(v[5 + i], 2, 7);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[3 + i] |= piece(v[5 + i], 0, 3) << 1 | piece(v[7], 1 - i, 1);
        }
    } else if constexpr (B == 3) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[i] |= piece(v[6 + i], 1, 3);
            w[2] |= piece(v[6 + i], 0, 1) << (1 - i);
        }
    }
#pragma unroll
    for (int i = 0; i < B; ++i) *reinterpret_cast<u32*>(block + word_offset<B>(i, lane)) = w[i];
}

}  // namespace

// `panels`: `panel_count` panels of `panel_bytes`. One warp per block and column tile.
extern "C" __global__ void __launch_bounds__(256, 2)
    exl_repack(const QMatrix* matrix, const char* panels, u64 panel_bytes, int panel_count) {
    const QMatrix& m = *matrix;
    int tile = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (tile >= m.blocks * m.columns) return;
    int block = tile % m.blocks, column = tile / m.blocks;
    const Run run = run_of(m, block);
    const int bits = run.bits;
    const u32 offset = offset_of(run, block);
    int lane = threadIdx.x % WARP, g = lane >> 2, t = lane & 3;
    // Register q: rows 8t + 4 (r >> 1).. of column 16 m + 8 (r & 1) + g, panel m of the tile.
    u32 v[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
        int panel = 2 * column + q / 4;
        // A missing panel is padding: its scales are zero, the codes do not matter.
        v[q] = panel < panel_count
                   ? codes(panels + panel * panel_bytes + offset / 2, bits, 2 * t + (q % 4) / 2,
                           8 * (q & 1) + g)
                   : 0u;
    }
    char* at = const_cast<char*>(m.tiles) + m.column_bytes * column + offset;
    switch (bits) {
        case 2: pack<2>(at, lane, v); break;
        case 3: pack<3>(at, lane, v); break;
        case 4: pack<4>(at, lane, v); break;
        case 5: pack<5>(at, lane, v); break;
        case 6: pack<6>(at, lane, v); break;
        default: pack<8>(at, lane, v); break;
    }
}
