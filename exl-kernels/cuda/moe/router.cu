// exl_moe_router_*: the norm of one row, the product with a router of up to eight experts and the choice of
// the row's experts.
//
// What: what exl_rms_norm, exl_dense_narrow and exl_moe_route do one after the other, with all their outputs.
// Norm and router have weights of 16 bits. One block: its threads keep the router's weights of eight
// columns, or twice eight, in registers before x is there, and multiply with them what is not yet divided by
// the row's length. Bytes: the router's weights. Bound by latency: that of one launch instead of three.

#include "common/types.cuh"
#include "moe/route.cuh"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / WARP;
constexpr int EXPERTS = 8;
constexpr int COLUMNS = 8;   // of a thread at a time: 16 bytes of weights

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

// The weights of a thread's columns.
template <typename W, int GROUPS>
struct Columns {
    uint4 router[GROUPS][EXPERTS];
    float4 scale[GROUPS][2];

    __device__ __forceinline__ static int first(int group) {
        return COLUMNS * (threadIdx.x + group * THREADS);
    }
    __device__ __forceinline__ explicit Columns(const RouterTask& task) {
        const W* weights = static_cast<const W*>(task.router);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int k = first(g);
            const bool there = k < task.inputs;
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) {
                router[g][e] = uint4{};
                if (there && e < task.experts) {
                    router[g][e] = *reinterpret_cast<const uint4*>(weights + e * task.inputs + k);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = k / 4 + i;
                float4 s = float4{};
                if (there && task.type == TYPE_F16) s = load_4(static_cast<const __half*>(task.scale), at);
                if (there && task.type == TYPE_BF16) {
                    s = load_4(static_cast<const __nv_bfloat16*>(task.scale), at);
                }
                scale[g][i] = make_float4(s.x + task.offset, s.y + task.offset, s.z + task.offset,
                                          s.w + task.offset);
            }
        }
    }
    // Adds the products of a group's columns with every expert's weights.
    __device__ __forceinline__ void multiply(float (&dot)[EXPERTS], int g, float4 a, float4 b) const {
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
            const W* row = reinterpret_cast<const W*>(&router[g][e]);
            const float4 low = load_4(row, 0), high = load_4(row, 1);
            dot[e] = fmaf(low.x, a.x, fmaf(low.y, a.y, fmaf(low.z, a.z, fmaf(low.w, a.w, dot[e]))));
            dot[e] = fmaf(high.x, b.x, fmaf(high.y, b.y, fmaf(high.z, b.z, fmaf(high.w, b.w, dot[e]))));
        }
    }
};

__device__ __forceinline__ float square_of(float4 v) {
    return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
}
__device__ __forceinline__ float4 product(float4 v, float4 s) {
    return make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
}

template <typename W, int GROUPS>
__device__ __forceinline__ void router(const RouterTask& task) {
    __shared__ Sums sums;
    pdl_launch();
    const Columns<W, GROUPS> columns(task);
    pdl_wait();
    float4 v[GROUPS][2];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int k = columns.first(g);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            v[g][i] = k < task.inputs ? load_4(task.x, k / 4 + i) : float4{};
        }
    }
    float square = 0.0f, dot[EXPERTS] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        square += square_of(v[g][0]) + square_of(v[g][1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) v[g][i] = product(v[g][i], columns.scale[g][i]);
        columns.multiply(dot, g, v[g][0], v[g][1]);
    }
    sums.leave(square, dot);
    __syncthreads();

    const float factor = 1.0f / sqrtf(sums.square() / float(task.inputs) + task.eps);
    if (threadIdx.x < WARP) {
        const float logit = sums.dot() * factor;
        if (int(threadIdx.x) < task.experts) task.logits[threadIdx.x] = logit;
        choose(logit, task.experts, task.top_k, task.exponent, task.ids, task.weights);
    }
    const float4 all = make_float4(factor, factor, factor, factor);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int k = columns.first(g);
        if (k >= task.inputs) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            *reinterpret_cast<float4*>(task.normed + k + 4 * i) = product(v[g][i], all);
        }
    }
}

}  // namespace

#define ENTRY(NAME, W, GROUPS)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        NAME(const __grid_constant__ RouterTask task) {                                           \
        router<W, GROUPS>(task);                                                                  \
    }
// Up to 4096 and 8192 inputs.
ENTRY(exl_moe_router_f16, __half, 1)
ENTRY(exl_moe_router_bf16, __nv_bfloat16, 1)
ENTRY(exl_moe_router_long_f16, __half, 2)
ENTRY(exl_moe_router_long_bf16, __nv_bfloat16, 2)
