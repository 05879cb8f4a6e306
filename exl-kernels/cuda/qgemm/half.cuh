// Quantized weights as 16-bit floats, rounded as the format says.
#pragma once

#include "qgemm/scales.cuh"

// Signed bytes LOW and HIGH of four as a pair of 16-bit floats, times 2^(B - 8).
template <int B, int LOW, int HIGH>
__device__ __forceinline__ __half2 half_pair(u32 bytes) {
    // The byte in the low bits of 1024 stands for 1024 + it; everything here is exact.
    constexpr float f = 1.0f / float(1 << (8 - B));
    const __half2 factor = __float2half2_rn(f), less = __float2half2_rn(-1152.0f * f);
    const u32 pair = __byte_perm(bytes ^ 0x80808080u, MAGIC, 0x5050 | HIGH << 8 | LOW);
    return __hfma2(as_half2(pair), factor, less);
}

// The order in which `expand_halves` leaves four rows: pairs of rows 0 and 2, 1 and 3. What is
// multiplied with them has the same order.
__device__ __forceinline__ int half_place(int row) { return (row & 1) << 1 | (row & 2) >> 1; }

// The weights of a lane's block without their scale: register q (tile.cuh) becomes v[q][0], rows 0 and
// 2, and v[q][1], rows 1 and 3.
template <int B>
__device__ __forceinline__ void expand_halves(const u32* words, __half2 (&v)[8][2]) {
    if constexpr (B == 4) {
        // Register 2i in the high, 2i + 1 in the low halves of the bytes; top bits are inverted. In the
        // low bits of 1024 the high ones stand for sixteen times themselves.
        const __half2 less = __float2half2_rn(-1032.0f), less_16 = __float2half2_rn(-72.0f);
        const __half2 sixteenth = __float2half2_rn(0.0625f);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 w = words[i] >> (8 * j);
                v[2 * i][j] = __hfma2(as_half2(and_xor(w, 0x00f000f0u, 0x64806480u)), sixteenth,
                                      less_16);
                v[2 * i + 1][j] = __hadd2(as_half2(and_xor(w, 0x000f000fu, 0x64086408u)), less);
            }
        }
    } else {
        u32 bytes[8];
        expand<B>(words, bytes);
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            v[q][0] = half_pair<B, 0, 2>(bytes[q]);
            v[q][1] = half_pair<B, 1, 3>(bytes[q]);
        }
    }
}

// Scales of columns g, g+8, g+16, g+24 of a piece.
template <int KIND>
struct HalfScales {
    __half2 s[4];
    __half2 shift[4];   // GPTQ: what must be added to codes that are centred at 8

    __device__ __forceinline__ explicit HalfScales(const ScaleCodes<KIND>& from) {
        const Scales<KIND> scales(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[i] = __float2half2_rn(scales.s[i]);
            if (KIND == KIND_GPTQ) shift[i] = __half2half2(__int2half_rn(scales.shift[i]));
        }
    }
    // A pair of weights of one of the columns. The scale is a 16-bit float, so the product is rounded
    // once, as the format says.
    __device__ __forceinline__ __half2 weight(__half2 code, int column) const {
        if (KIND == KIND_GPTQ) code = __hadd2(code, shift[column]);
        return __hmul2(code, s[column]);
    }
    // The weights of a lane's block (expand_halves) as first operands of mma.m16n8k16, [column half][step of
    // 16 rows].
    __device__ __forceinline__ void operands(const __half2 (&v)[8][2], u32 (&a)[2][2][4]) const {
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const int column = 2 * (q >> 2) + (q & 1);
            u32(&to)[4] = a[q >> 2][q >> 1 & 1];
            to[q & 1] = as_u32(weight(v[q][0], column));
            to[2 + (q & 1)] = as_u32(weight(v[q][1], column));
        }
    }
};
