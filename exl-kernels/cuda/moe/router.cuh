// The norm of one row, the product with a router of up to eight experts and the choice of the row's experts, by
// one thread block: in a launch of its own (router.cu), or by every block of the experts' first product (row.cu).
//
// A thread keeps the router's weights of its columns in registers before x is there, and multiplies with them what is
// not yet divided by the row's length.
#pragma once

#include "common/types.cuh"
#include "moe/route.cuh"

namespace routing {

constexpr int THREADS = 512, WARPS = THREADS / WARP;
constexpr int EXPERTS = 8;

// The host fills this struct word by word: lower/moe/router.rs.
struct RouterTask {
    const float* x;       // [inputs]
    const void* scale;    // of the norm, [inputs]
    float* normed;        // [inputs]
    const void* router;   // [experts, inputs]
    float* logits;        // [experts]
    int* ids;             // [top_k]
    float* weights;       // [top_k]
    int inputs, experts;
    int top_k, type;      // type: of the norm's weights
    float eps, offset;
    float exponent;       // as that of choose()
    float share;          // 1 / inputs
};

// Sums of a block's threads: of x squared, and of x with each expert's weights.
struct Sums {
    float squares[WARPS];
    float dots[EXPERTS][WARPS];

    // Adds up those of a warp. What lanes have of an expert is halved with every exchange, until lanes 4e and
    // on have that of expert e.
    __device__ __forceinline__ void leave(float square, float (&dot)[EXPERTS]) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
        for (int n = EXPERTS / 2, d = WARP / 2; n > 0; n /= 2, d /= 2) {
            const bool high = lane & d;
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const float other = high ? dot[i] : dot[i + n];
                dot[i] = (high ? dot[i + n] : dot[i]) + __shfl_xor_sync(FULL_MASK, other, d);
            }
        }
        dot[0] += __shfl_xor_sync(FULL_MASK, dot[0], 2);
        dot[0] += __shfl_xor_sync(FULL_MASK, dot[0], 1);
        square = warp_sum(square);
        if (lane % 4 == 0) dots[lane / 4][warp] = dot[0];
        if (lane == 0) squares[warp] = square;
    }
    // Of the block, the same in all lanes.
    __device__ __forceinline__ float square() const {
        const int lane = threadIdx.x % WARP;
        return warp_sum(lane < WARPS ? squares[lane] : 0.0f);
    }
    // Of the block: in lane e that of expert e.
    __device__ __forceinline__ float dot() const {
        static_assert(WARPS == 16 && EXPERTS == 8, "four lanes for each expert, each with four sums");
        const int lane = threadIdx.x % WARP;
        const float* own = dots[lane / 4] + lane % 4 * 4;
        float s = (own[0] + own[1]) + (own[2] + own[3]);
        s += __shfl_xor_sync(FULL_MASK, s, 1);
        s += __shfl_xor_sync(FULL_MASK, s, 2);
        return __shfl_sync(FULL_MASK, s, lane * 4 % WARP);
    }
};

__device__ __forceinline__ float square_of(float4 v) {
    return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
}
__device__ __forceinline__ float4 product(float4 v, float4 s) {
    return make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
}

// The weights of a thread's columns, in groups of four.
template <typename W, int GROUPS>
struct Columns {
    uint2 router[GROUPS][EXPERTS];
    float4 scale[GROUPS];

    __device__ __forceinline__ static int first(int group) {
        return 4 * (threadIdx.x + group * THREADS);
    }
    __device__ __forceinline__ explicit Columns(const RouterTask& task) {
        const W* weights = static_cast<const W*>(task.router);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int k = first(g);
            const bool there = k < task.inputs;
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) {
                router[g][e] = uint2{};
                if (there && e < task.experts) {
                    router[g][e] = *reinterpret_cast<const uint2*>(weights + e * task.inputs + k);
                }
            }
            float4 s = float4{};
            if (there && task.type == TYPE_F16) s = load_4(static_cast<const __half*>(task.scale), k / 4);
            if (there && task.type == TYPE_BF16) {
                s = load_4(static_cast<const __nv_bfloat16*>(task.scale), k / 4);
            }
            scale[g] = make_float4(s.x + task.offset, s.y + task.offset, s.z + task.offset, s.w + task.offset);
        }
    }
    // Takes the sums of a thread's columns `v` of x, which are scaled. By the whole block; a barrier must follow.
    __device__ __forceinline__ void add_up(Sums& sums, float4 (&v)[GROUPS]) const {
        float square = 0.0f, dot[EXPERTS] = {};
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            square += square_of(v[g]);
            v[g] = product(v[g], scale[g]);
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) {
                const float4 w = load_4(reinterpret_cast<const W*>(&router[g][e]), 0);
                dot[e] = fmaf(w.x, v[g].x, fmaf(w.y, v[g].y, fmaf(w.z, v[g].z, fmaf(w.w, v[g].w, dot[e]))));
            }
        }
        sums.leave(square, dot);
    }
    // What is left to do with what add_up() has scaled, and was added up: the columns of the norm.
    __device__ __forceinline__ static void normalize(float4 (&v)[GROUPS], float factor) {
        const float4 all = make_float4(factor, factor, factor, factor);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) v[g] = product(v[g], all);
    }
    __device__ __forceinline__ static void store(const RouterTask& task, const float4 (&v)[GROUPS]) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int k = first(g);
            if (k < task.inputs) *reinterpret_cast<float4*>(task.normed + k) = v[g];
        }
    }
};

// What every value of x is multiplied with.
__device__ __forceinline__ float factor_of(const RouterTask& task, const Sums& sums) {
    return rsqrtf(fmaf(sums.square(), task.share, task.eps));
}
// The choice, when all is added up, and what it was made by. By a whole warp.
__device__ __forceinline__ void decide(const RouterTask& task, float logit) {
    const int lane = threadIdx.x % WARP;
    if (lane < task.experts) task.logits[lane] = logit;
    const Choice own = choose<true>(logit, task.experts, task.top_k, task.exponent);
    if (lane >= task.top_k) return;
    task.ids[lane] = own.id;
    task.weights[lane] = own.weight;
}

}  // namespace routing
