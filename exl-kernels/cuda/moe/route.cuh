// The choice of a row's experts.
#pragma once

#include "moe/experts.cuh"

// A float as an integer of the same order; NaN is the smallest. Zeros of both signs are equal.
__device__ __forceinline__ int rank(float v) {
    if (v != v) return -0x7fffffff - 1;
    const int bits = __float_as_int(v + 0.0f);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Of an expert of a row: its number, and what its output is multiplied with.
struct Choice {
    int id;
    float weight;
};

// What route.cu computes, of up to 32 experts, one of each lane, whose logit is `v`: in lane j the row's expert j,
// unless WEIGHTS without its weight. By a whole warp.
template <bool WEIGHTS>
__device__ __forceinline__ Choice choose(float v, int experts, int top_k, float exponent) {
    const int lane = threadIdx.x % WARP;
    const bool there = lane < experts;
    const float most = WEIGHTS ? warp_max(there ? v : __int_as_float(0xff800000)) : 0.0f;
    const float sum = WEIGHTS ? warp_sum(there ? expf(v - most) : 0.0f) : 1.0f;
    // What is left, and the choice of this lane's number.
    bool left = there;
    Choice choice = {0, 0.0f};
    float norm = 0.0f;
#pragma unroll 1
    for (int j = 0; j < top_k; ++j) {
        const int own = left ? rank(v) : -0x7fffffff - 1;
        const int top = __reduce_max_sync(FULL_MASK, own);
        const int expert = __reduce_min_sync(FULL_MASK, left && own == top ? lane : WARP - 1);
        if (lane == expert) left = false;
        if (lane == j) choice.id = expert;
        if constexpr (WEIGHTS) {
            const float w = expf(__shfl_sync(FULL_MASK, v, expert) - most) / sum;
            if (exponent == 1.0f) norm += w;
            if (exponent > 0.0f && exponent != 1.0f) norm += powf(w, exponent);
            if (lane == j) choice.weight = w;
        }
    }
    if (WEIGHTS && exponent > 0.0f) {
        choice.weight /= exponent == 1.0f ? norm : powf(norm, 1.0f / exponent);
    }
    return choice;
}
