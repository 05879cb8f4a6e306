// Tiles: how quantized matrices lie in device memory.
//
// A matrix [K packed rows, N columns] is cut into column tiles of 32 columns, a column tile into
// blocks of 32 packed rows. Blocks of a column tile follow each other in memory, so a warp that
// walks down a column tile reads one contiguous stream. A block of B-bit codes takes 128 B bytes.
//
// Inside a block every lane owns 32 codes, in the operand order of mma.m16n8k32 with the weights
// as A (16 columns x 32 rows of 8-bit integers): lane 4g + t owns columns g, g+8, g+16, g+24 and
// rows 8t..8t+7, as eight registers of four rows each:
//
//   register q = 4 m + r:  column 16 m + 8 (r & 1) + g,  rows 8t + 4 (r >> 1) + {0, 1, 2, 3}
//
// which are the fragments of column half m. (The rows of a block may be visited in any order as
// long as x follows it; this order lets a lane read its eight values of x in one piece.) Codes are
// centred: what a register holds per byte is (q - zero) 2^(8 - B), with zero half of the code
// range, a signed byte whose low bits are 0. A lane's block is B words:
//
//   8 bits: word q = register q
//   4 bits: word w < 4 = register 2w in the high, 2w+1 in the low halves of the bytes
//   2 bits: word w < 2 = register 4w+j at bits 6-2j, 7-2j of the bytes
//
// Other widths fill the top of the bytes with as many whole codes as there is room for, so that most
// registers are one piece of a word; the codes that are left are cut into the bits below them:
//
//   6 bits: word w < 6 = register w at bits 2..7; register 6 at bits 0, 1 of words 0, 1, 2, its highest
//           bits first, register 7 at those of words 3, 4, 5
//   5 bits: word w < 5 = register w at bits 3..7; register 5 at bits 0..2 of word 0 and 1, 2 of word 3,
//           register 6 at bits 0..2 of word 1 and 1, 2 of word 4, register 7 at bits 0..2 of word 2 and
//           bit 0 of words 3 and 4
//   3 bits: word w < 3 = register 2w at bits 5..7, 2w+1 at bits 2..4; register 6 at bits 0, 1 of word 0
//           and bit 1 of word 2, register 7 at bits 0, 1 of word 1 and bit 0 of word 2
//
// The top bit is stored inverted (two's complement of the centred code). The words of the lanes are
// stored in sections, so that every load of a warp is contiguous and as wide as it can be: first
// words 0..3 of all lanes (16 bytes each), then words 4..7, then a pair of words (8 bytes), then a
// single one.
#pragma once

#include "common/common.cuh"

// How many sections of each width a block has, and its bytes.
template <int B>
struct Sections {
    static constexpr int QUADS = B / 4;         // sections of four words
    static constexpr int PAIR = (B % 4) / 2;    // one section of two words?
    static constexpr int SINGLE = B % 2;        // one section of one word?
    static constexpr int BYTES = 128 * B;       // a block
};

// A lane's words of the block at `block`, which is 16-byte aligned.
template <int B>
__device__ __forceinline__ void load_words(u32* w, const char* block, int lane) {
    typedef Sections<B> S;
#pragma unroll
    for (int i = 0; i < S::QUADS; ++i) {
        const uint4 v = *reinterpret_cast<const uint4*>(block + 512 * i + 16 * lane);
        w[4 * i] = v.x;
        w[4 * i + 1] = v.y;
        w[4 * i + 2] = v.z;
        w[4 * i + 3] = v.w;
    }
    if constexpr (S::PAIR) {
        const uint2 v = *reinterpret_cast<const uint2*>(block + 512 * S::QUADS + 8 * lane);
        w[4 * S::QUADS] = v.x;
        w[4 * S::QUADS + 1] = v.y;
    }
    if constexpr (S::SINGLE) {
        w[B - 1] = *reinterpret_cast<const u32*>(block + 128 * (B - 1) + 4 * lane);
    }
}

// Where word w of a lane lies in its block, in bytes.
template <int B>
__device__ __forceinline__ int word_offset(int w, int lane) {
    typedef Sections<B> S;
    if (w < 4 * S::QUADS) return 512 * (w / 4) + 16 * lane + 4 * (w % 4);
    if (S::PAIR && w < 4 * S::QUADS + 2) {
        return 512 * S::QUADS + 8 * lane + 4 * (w - 4 * S::QUADS);
    }
    return 128 * (B - 1) + 4 * lane;
}

// (a & mask) ^ b
__device__ __forceinline__ u32 and_xor(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

constexpr u32 MAGIC = 0x64006400u;

// The registers of a lane: (q - zero) 2^(8 - B) per byte.
template <int B>
__device__ __forceinline__ void expand(const u32* w, u32 (&v)[8]) {
    if constexpr (B == 8) {
#pragma unroll
        for (int q = 0; q < 8; ++q) v[q] = w[q];
    } else if constexpr (B == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = w[i] & 0xf0f0f0f0u;
            v[2 * i + 1] = w[i] << 4 & 0xf0f0f0f0u;
        }
    } else if constexpr (B == 2) {
#pragma unroll
        for (int q = 0; q < 8; ++q) v[q] = (w[q / 4] << (2 * (q % 4))) & 0xc0c0c0c0u;
    } else if constexpr (B == 6) {
#pragma unroll
        for (int q = 0; q < 6; ++q) v[q] = w[q] & 0xfcfcfcfcu;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const u32 low = and_or(w[3 * q + 1] << 4, 0x30303030u, w[3 * q + 2] << 2 & 0x0c0c0c0cu);
            v[6 + q] = and_or(w[3 * q] << 6, 0xc0c0c0c0u, low);
        }
    } else if constexpr (B == 5) {
#pragma unroll
        for (int q = 0; q < 5; ++q) v[q] = w[q] & 0xf8f8f8f8u;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            v[5 + q] = and_or(w[q] << 5, 0xe0e0e0e0u, w[3 + q] << 2 & 0x18181818u);
        }
        const u32 low = and_or(w[3] << 4, 0x10101010u, w[4] << 3 & 0x08080808u);
        v[7] = and_or(w[2] << 5, 0xe0e0e0e0u, low);
    } else {
        static_assert(B == 3, "2, 3, 4, 5, 6 or 8 bits");
#pragma unroll
        for (int q = 0; q < 6; q += 2) {
            v[q] = w[q / 2] & 0xe0e0e0e0u;
            v[q + 1] = w[q / 2] << 3 & 0xe0e0e0e0u;
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            v[6 + q] = and_or(w[q] << 6, 0xc0c0c0c0u, w[2] << (4 + q) & 0x20202020u);
        }
    }
}

// Consecutive blocks [first, end) of one width. Piece p of a regular run has 2^shift blocks, the last
// perhaps fewer.
struct __align__(16) Run {
    u16 first, end;
    u16 piece;    // of its first block
    u8 bits;
    u8 shift;     // IRREGULAR: look into `piece_of`
    u32 offset;   // where it begins in a column tile
    u8 fold;      // blocks whose integer sums may be added up: 1, 2 or 4 (walk.cuh)
    u8 own_fold;  // the same where chunks of x begin with the runs (row_slice.cuh)
    u16 chunk;    // number of its first chunk there
};

constexpr int IRREGULAR = 255;
constexpr int RUNS = 6;

// A quantized matrix in device memory (matrix.rs writes this struct). Pieces are the groups of
// the packed rows that share a scale; blocks never straddle pieces.
struct QMatrix {
    const char* tiles;       // column tiles, `column_bytes` each
    const u16* codes;        // EXL2: [column tiles][pieces][8]: scale codes of columns g + 8 i at bit 4 i
                             // GPTQ: [column tiles][pieces][8][4]: bits of binary16 scales of g + 8 i
    const u16* bases;        // EXL2: [pieces][2]: binary16 factor of the squared scale codes, and 0
                             // GPTQ: [column tiles][pieces][8][4]: 8 - zero point as an integer
    const u16* piece_of;     // [blocks]
    const u32* perm;         // [K]: feature of each packed row, then its inverse; 0 when they are in
                             // order
    u64 column_bytes;
    int blocks;              // K / 32
    int pieces;
    int columns;             // column tiles
    int kind;                // 0 EXL2, 1 GPTQ
    int runs;
    int padding;
    u16 shares[20];          // SHARES + 1: the first block of each share of the rows, whole chunks of
                             // four blocks of a run; about the same bytes in each
    Run run[RUNS];
};

constexpr int SHARES = 16;

constexpr int KIND_EXL2 = 0;
constexpr int KIND_GPTQ = 1;

// The run that has a block.
__device__ __forceinline__ Run run_of(const QMatrix& m, int block) {
    int r = 0;
#pragma unroll 1
    while (block >= m.run[r].end) ++r;
    return m.run[r];
}

// Where a block of a run begins in a column tile.
__device__ __forceinline__ u32 offset_of(const Run& run, int block) {
    return run.offset + (block - run.first) * (128 * run.bits);
}

// The piece that has a block of a run.
__device__ __forceinline__ int piece_of(const QMatrix& m, const Run& run, int block) {
    return run.shift == IRREGULAR ? m.piece_of[block]
                                  : run.piece + ((block - run.first) >> run.shift);
}
