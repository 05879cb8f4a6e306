// The norm of one row, the product with a router of up to eight experts and the choice of the row's experts, by
// one thread block: in a launch of its own (router.cu), or by every block of the experts' first product (row.cu).
//
// A thread keeps the router's weights of its columns in registers before x is there, and multiplies with them what is
// not yet divided by the row's length.
#pragma once

#include "common/types.cuh"
#include "moe/route.cuh"
#include "qgemm/router_sums.cuh"

namespace routing {

constexpr int THREADS = 512, WARPS = THREADS / WARP;
constexpr int EXPERTS = ROUTER_EXPERTS;

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
    const float* sums;    // row.cu: what the product in front has left (RouterSums)
};

// Sums of a block's threads: of x squared, and of x with each expert's weights.
struct Sums {
    float squares[WARPS];
    float dots[EXPERTS][WARPS];

    // Adds up those of a warp.
    __device__ __forceinline__ void leave(float square, float (&dot)[EXPERTS]) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const float sum = dots_of_warp(dot);
        square = warp_sum(square);
        if (lane % 4 == 0) dots[lane / 4][warp] = sum;
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

// A thread's columns of the norm, in groups of four.
template <int GROUPS>
struct NormColumns {
    uint2 weights[GROUPS];   // of 16 bits

    __device__ __forceinline__ static int first(int group) {
        return 4 * (threadIdx.x + group * THREADS);
    }
    __device__ __forceinline__ explicit NormColumns(const RouterTask& task) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            weights[g] = uint2{};
            if (first(g) < task.inputs) weights[g] = static_cast<const uint2*>(task.scale)[first(g) / 4];
        }
    }
    // What columns of a group are multiplied with.
    __device__ __forceinline__ float4 scale(const RouterTask& task, int group) const {
        const uint2* own = weights + group;
        const float4 s = task.type == TYPE_F16 ? load_4(reinterpret_cast<const __half*>(own), 0)
                                               : load_4(reinterpret_cast<const __nv_bfloat16*>(own), 0);
        return make_float4(s.x + task.offset, s.y + task.offset, s.z + task.offset, s.w + task.offset);
    }
    // What is left to do with columns that are scaled.
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

// The same with the router's weights.
template <typename W, int GROUPS>
struct Columns : NormColumns<GROUPS> {
    uint2 router[GROUPS][EXPERTS];

    __device__ __forceinline__ explicit Columns(const RouterTask& task) : NormColumns<GROUPS>(task) {
        const W* weights = static_cast<const W*>(task.router);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int k = this->first(g);
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) {
                router[g][e] = uint2{};
                if (k < task.inputs && e < task.experts) {
                    router[g][e] = *reinterpret_cast<const uint2*>(weights + e * task.inputs + k);
                }
            }
        }
    }
    // Takes the sums of a thread's columns `v` of x, which are scaled. By the whole block; a barrier must follow.
    __device__ __forceinline__ void add_up(const RouterTask& task, Sums& sums, float4 (&v)[GROUPS]) const {
        float square = 0.0f, dot[EXPERTS] = {};
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            square += square_of(v[g]);
            v[g] = product(v[g], this->scale(task, g));
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) {
                const float4 w = load_4(reinterpret_cast<const W*>(&router[g][e]), 0);
                dot[e] = fmaf(w.x, v[g].x, fmaf(w.y, v[g].y, fmaf(w.z, v[g].z, fmaf(w.w, v[g].w, dot[e]))));
            }
        }
        sums.leave(square, dot);
    }
};

// The sums that the product in front has left (qgemm/router_sums.cuh), over all its column tiles.
struct TileSums {
    static constexpr int LOADS = 4;   // for up to 4096 columns

    float all[1 + EXPERTS];   // shared

    // What a lane has of one of them: that of its warp.
    struct Own {
        float parts[LOADS];
    };
    __device__ __forceinline__ static Own load(const RouterTask& task) {
        static_assert(1 + EXPERTS <= WARPS, "a warp for each");
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = (task.inputs + 31) / 32;
        Own own = {};
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int tile = lane + i * WARP;
            if (warp <= EXPERTS && tile < tiles) own.parts[i] = __ldcg(task.sums + warp * tiles + tile);
        }
        return own;
    }
    // By the whole block; a barrier must follow.
    __device__ __forceinline__ void add_up(const Own& own) {
        const float s = warp_sum((own.parts[0] + own.parts[1]) + (own.parts[2] + own.parts[3]));
        if (threadIdx.x % WARP == 0 && threadIdx.x / WARP <= EXPERTS) all[threadIdx.x / WARP] = s;
    }
    __device__ __forceinline__ float square() const { return all[0]; }
    // In lane e that of expert e.
    __device__ __forceinline__ float dot() const { return all[1 + threadIdx.x % EXPERTS]; }
};

// What every value of x is multiplied with.
__device__ __forceinline__ float factor_of(const RouterTask& task, float square) {
    return rsqrtf(fmaf(square, task.share, task.eps));
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
