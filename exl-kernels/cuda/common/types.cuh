// Element types of weights that a kernel is told at run time.
#pragma once

#include "common/common.cuh"

// As lower/linear.rs numbers them: dtype_code.
constexpr int TYPE_F32 = 0;
constexpr int TYPE_F16 = 1;
constexpr int TYPE_BF16 = 2;

// Four weights from place 4 i.
__device__ __forceinline__ float4 load_4(const float* p, int i) {
    return reinterpret_cast<const float4*>(p)[i];
}
__device__ __forceinline__ float4 load_4(const __half* p, int i) {
    uint2 v = reinterpret_cast<const uint2*>(p)[i];
    float2 a = __half22float2(*reinterpret_cast<__half2*>(&v.x));
    float2 b = __half22float2(*reinterpret_cast<__half2*>(&v.y));
    return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ float4 load_4(const __nv_bfloat16* p, int i) {
    uint2 v = reinterpret_cast<const uint2*>(p)[i];
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
                       __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
}

// Element i of weights of a type known at run time.
__device__ __forceinline__ float load_1(const void* p, int type, long long i) {
    if (type == TYPE_F16) return __half2float(static_cast<const __half*>(p)[i]);
    if (type == TYPE_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}
