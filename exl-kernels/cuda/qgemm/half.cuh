// Quantized weights as 16-bit floats, rounded as the format says.
#pragma once

#include "qgemm/scales.cuh"

// Four signed bytes as two pairs of 16-bit floats, times 2^(B - 8).
template <int B>
__device__ __forceinline__ void halves(u32 bytes, __half2& low, __half2& high) {
    // The byte in the low bits of 1024 stands for 1024 + it; everything here is exact.
    constexpr float f = 1.0f / float(1 << (8 - B));
    const __half2 factor = __float2half2_rn(f), less = __float2half2_rn(-1152.0f * f);
    bytes ^= 0x80808080u;
    low = __hfma2(as_half2(__byte_perm(bytes, MAGIC, 0x5150)), factor, less);
    high = __hfma2(as_half2(__byte_perm(bytes, MAGIC, 0x5352)), factor, less);
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
};
