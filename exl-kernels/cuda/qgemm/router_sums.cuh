// What a router needs of the outputs of the product in front of it, by that product: the experts of a row are known as
// soon as whoever needs them has added up a few numbers, and nobody else reads the router's weights.
#pragma once

#include "common/types.cuh"

constexpr int ROUTER_EXPERTS = 8;   // most (lower/moe/router.rs: EXPERTS)

// Sums of each dot over a warp: lanes 4e and on have that of expert e. What lanes have of an expert is halved with
// every exchange.
__device__ __forceinline__ float dots_of_warp(float (&dot)[ROUTER_EXPERTS]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = ROUTER_EXPERTS / 2, d = WARP / 2; n > 0; n /= 2, d /= 2) {
        const bool high = lane & d;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float other = high ? dot[i] : dot[i + n];
            dot[i] = (high ? dot[i + n] : dot[i]) + __shfl_xor_sync(FULL_MASK, other, d);
        }
    }
    dot[0] += __shfl_xor_sync(FULL_MASK, dot[0], 2);
    return dot[0] + __shfl_xor_sync(FULL_MASK, dot[0], 1);
}

struct RouterKind {
    u8 experts;                    // 0: nobody wants anything
    u8 bf16;                       // the router's weights: binary16 or bfloat16
    u8 scale_type, scale_offset;   // of the norm's weights; what is added to them
};

// A column tile among all.
struct TileOf {
    int index, count;
};

// Of one row of `n` outputs, whose norm goes through a router.
struct RouterSums {
    const void* router;   // [experts, n], of 16 bits
    const void* scale;    // of the norm, [n]
    float* sums;          // [1 + ROUTER_EXPERTS, column tiles]: of squares, and of products with each expert's weights

    // Brings what column tile `tile` needs to L1. By a whole warp.
    __device__ __forceinline__ void prefetch(const RouterKind& kind, int n, int tile) const {
        const int lane = threadIdx.x % WARP;
        const bool weights = lane < kind.experts;
        const int bytes = weights || kind.scale_type != TYPE_F32 ? 2 : 4;
        const char* at = static_cast<const char*>(weights ? router : scale) + bytes * 32 * tile;
        if (weights) at += 2ll * lane * n;
        if (weights || lane == ROUTER_EXPERTS) asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
    }
    // Leaves the sums of a column tile, whose output in the lane's column is `v`. By a whole warp.
    __device__ __forceinline__ void leave(const RouterKind& kind, int n, const TileOf& tile, float v) const {
        const int lane = threadIdx.x % WARP, column = tile.index * 32 + lane;
        const bool there = column < n;
        float dot[ROUTER_EXPERTS];
#pragma unroll
        for (int e = 0; e < ROUTER_EXPERTS; ++e) {
            const u32 w = there && e < kind.experts ? static_cast<const u16*>(router)[e * n + column] : 0;
            dot[e] = kind.bf16 ? __uint_as_float(w << 16) : __half2float(__ushort_as_half(w));
        }
        const float scaled = there ? v * (load_1(scale, kind.scale_type, column) + kind.scale_offset) : 0.0f;
#pragma unroll
        for (int e = 0; e < ROUTER_EXPERTS; ++e) dot[e] *= scaled;
        const float sum = dots_of_warp(dot), square = warp_sum(there ? v * v : 0.0f);
        if (lane % 4 == 0) sums[(1 + lane / 4) * tile.count + tile.index] = sum;
        if (lane == 0) sums[tile.index] = square;
    }
};
