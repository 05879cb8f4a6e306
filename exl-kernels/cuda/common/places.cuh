// The order in which a quantized matrix has its inputs, by whoever computes those: a product that finds its input in
// order gathers nothing.
#pragma once

#include "common/common.cuh"

// Where four columns lie there.
struct Places {
    uint4 at;

    Places() = default;
    // `inverse`: of all columns, which never changes; 0: nowhere, and nothing may be stored.
    __device__ __forceinline__ Places(const u32* inverse, int column) : at() {
        if (inverse) at = __ldg(reinterpret_cast<const uint4*>(inverse + column));
    }
    __device__ __forceinline__ void store(float* to, const float4& v) const {
        to[at.x] = v.x;
        to[at.y] = v.y;
        to[at.z] = v.z;
        to[at.w] = v.w;
    }
};
