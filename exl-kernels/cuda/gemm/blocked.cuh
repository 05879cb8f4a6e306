// Operands of the products by warpgroups: 16-bit matrices [rows, k] cut into blocks of 64 rows by 64
// columns, each 8 KB in one piece, those of 64 rows one behind the other. A copy of the copy engine
// brings a block to shared memory as wgmma wants it, without a tensor map.
//
// 16-byte chunk c of row r of a block lies at 128 r + 16 (c ^ (r & 7)): the 128-byte swizzle of wgmma's
// shared-memory operands.
#pragma once

#include "common/common.cuh"

constexpr int BLOCK = 64;                 // rows and columns
constexpr int BLOCK_BYTES = 2 * BLOCK * BLOCK;

// Byte offset of 8 elements from column `k`, a multiple of 8, of a row, in a matrix of `blocks_k`
// blocks side by side.
__device__ __forceinline__ long long blocked_at(int row, int k, int blocks_k) {
    const long long block = (long long)(row / BLOCK) * blocks_k + k / BLOCK;
    const int r = row % BLOCK, c = k % BLOCK / 8;
    return block * BLOCK_BYTES + (r * 128 + ((c ^ (r & 7)) << 4));
}
