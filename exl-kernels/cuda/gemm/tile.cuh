// Tiles of row-major 16-bit matrices [rows, k] in shared memory, for ldmatrix and mma.sync.
//
// A tile is ROWS rows of BK elements, cut into 16-byte chunks. Chunk c of row r lies at
//     r * 2 BK + 16 * (c ^ s(r)),   s(r) = r & 7 (BK = 64, rows of 128 bytes)
//                                   s(r) = (r >> 1) & 3 (BK = 32, two rows in 128 bytes)
// so that the 8 rows of an 8x8 matrix that ldmatrix reads (same c) fill all 32 banks once:
//     BK = 64: bank group (c ^ r) takes 8 values as r does;
//     BK = 32: 4 (r & 1) + (c ^ (r >> 1)) takes 8 values.
// The 8 lanes of a phase of cp.async write one row (BK = 64) or two rows (BK = 32): also all banks.
#pragma once

#include "common/common.cuh"

template <int BK>
__device__ __forceinline__ int swizzle(int row) {
    static_assert(BK == 32 || BK == 64, "rows of 64 or 128 bytes");
    return BK == 64 ? row & 7 : (row >> 1) & 3;
}

template <int ROWS, int BK>
constexpr int tile_bytes() { return ROWS * BK * 2; }

// Copies of one thread: chunk t % (BK / 8) of rows t / (BK / 8) + i * STEP. STEP is a multiple of
// 8, so the swizzle of a thread's chunks is one number.
template <int ROWS, int BK, int THREADS>
struct TileLoader {
    static constexpr int CHUNKS = BK / 8;
    static constexpr int STEP = THREADS / CHUNKS;
    static constexpr int COUNT = ROWS / STEP;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "every thread copies the same");

    const char* from;       // the thread's chunk column of the tile's first row
    u32 offset[COUNT];      // of its rows from there
    u32 to;                 // within the tile
    int k_left;             // elements from the thread's chunk to the end of k

    // Rows at and beyond `limit` are read from row limit - 1: their products are not stored.
    __device__ __forceinline__ void init(const void* matrix, int row0, int limit, int k) {
        const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
        from = static_cast<const char*>(matrix) + (long long)row0 * k * 2 + chunk * 16;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            offset[i] = u32(min(row + i * STEP, limit - 1 - row0)) * u32(2 * k);
        }
        to = u32(row * (2 * BK) + ((chunk ^ swizzle<BK>(row)) << 4));
        k_left = k - chunk * 8;
    }

    // Starts copying the next BK columns to the tile at `tile`; columns beyond k become zeros (k is
    // a multiple of 32, so a chunk is whole or absent, and with BK = 32 never absent).
    __device__ __forceinline__ void next(char* tile) {
        const int bytes = k_left > 0 ? 16 : 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            char* at = tile + to + i * STEP * (2 * BK);
            if constexpr (BK == 32) {
                cp_async_16(at, from + offset[i]);
            } else {
                cp_async_16_zfill(at, from + offset[i], bytes);
            }
        }
        from += 2 * BK;
        k_left -= BK;
    }
};

// Shared-memory address of a lane's row for ldmatrix.x4 of a 16 x 16 block of operand A whose first
// row is `row` (a multiple of 8): matrices 0..3 are (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15),
// (8-15, 8-15), the order of a0..a3. Lane l names row l % 16 at chunk l / 16.
// XOR with 32 * s moves to the s-th 16 columns: chunk 2 s + h is stored at (2 s) ^ (h ^ swizzle).
template <int BK>
__device__ __forceinline__ u32 lane_address_a(u32 tile, int row) {
    const int lane = threadIdx.x % WARP;
    const int r = row + (lane & 15);
    return tile + u32(r * (2 * BK) + (((lane >> 4) ^ swizzle<BK>(r)) << 4));
}

// The same for operand B, stored [n, k]: matrices 0..3 are (n 0-7, k 0-7), (0-7, 8-15),
// (8-15, 0-7), (8-15, 8-15): b0, b1 of columns 0-7, then b0, b1 of columns 8-15. Lane l names row
// l % 8 + 8 (l / 16) at chunk (l / 8) % 2.
template <int BK>
__device__ __forceinline__ u32 lane_address_b(u32 tile, int row) {
    const int lane = threadIdx.x % WARP;
    const int r = row + (lane & 7) + ((lane >> 4) << 3);
    return tile + u32(r * (2 * BK) + ((((lane >> 3) & 1) ^ swizzle<BK>(r)) << 4));
}

struct TileIndex {
    int m, n;
};

// Order of the output tiles: columns of RASTER row tiles, so that the blocks that run at one time
// share rows of both operands in L2.
constexpr int RASTER = 8;

__device__ __forceinline__ TileIndex raster(int id, int tiles_m, int tiles_n) {
    const int band = id / (RASTER * tiles_n);
    const int first = band * RASTER;
    const int height = min(RASTER, tiles_m - first);
    const int within = id - band * RASTER * tiles_n;
    return {first + within % height, within / height};
}
