// The choice of a row's experts.
#pragma once

#include "moe/experts.cuh"

// A float as an integer of the same order; NaN is the smallest. Zeros of both signs are equal.
__device__ __forceinline__ int rank(float v) {
    if (v != v) return -0x7fffffff - 1;
    const int bits = __float_as_int(v + 0.0f);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// What route.cu computes, of up to 32 experts, one of each lane, whose logit is `v`: ids and weights of a row
// stay in registers until all are known. By a whole warp.
__device__ __forceinline__ void choose(float v, int experts, int top_k, float exponent, int* ids,
                                       float* weights) {
    const int lane = threadIdx.x % WARP;
    const bool there = lane < experts;
    const float most = warp_max(there ? v : __int_as_float(0xff800000));
    const float sum = warp_sum(there ? expf(v - most) : 0.0f);
    // What is left, and the choice of this lane's number.
    bool left = there;
    int id = 0;
    float weight = 0.0f, norm = 0.0f;
    for (int j = 0; j < top_k; ++j) {
        const int own = left ? rank(v) : -0x7fffffff - 1;
        const int top = __reduce_max_sync(FULL_MASK, own);
        const int expert = __reduce_min_sync(FULL_MASK, left && own == top ? lane : WARP - 1);
        if (lane == expert) left = false;
        const float w = expf(__shfl_sync(FULL_MASK, v, expert) - most) / sum;
        if (exponent == 1.0f) norm += w;
        if (exponent > 0.0f && exponent != 1.0f) norm += powf(w, exponent);
        if (lane == j) {
            id = expert;
            weight = w;
        }
    }
    if (exponent > 0.0f && exponent != 1.0f) norm = powf(norm, 1.0f / exponent);
    if (lane >= top_k) return;
    ids[lane] = id;
    weights[lane] = exponent > 0.0f ? weight / norm : weight;
}
