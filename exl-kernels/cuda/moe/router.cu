// exl_moe_router_*: the norm of one row, the product with a router of up to eight experts and the choice of
// the row's experts.
//
// What: what exl_rms_norm, exl_dense_narrow and exl_moe_route do one after the other, with all their outputs.
// Norm and router have weights of 16 bits. One block. Bytes: the router's weights. Bound by latency: that of one
// launch instead of three.

#include "moe/router.cuh"

namespace {

using namespace routing;

template <typename W, int GROUPS>
__device__ __forceinline__ void router(const RouterTask& task) {
    __shared__ Sums sums;
    pdl_launch();
    const Columns<W, GROUPS> columns(task);
    pdl_wait();
    float4 v[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int k = columns.first(g);
        v[g] = k < task.inputs ? load_4(task.x, k / 4) : float4{};
    }
    columns.add_up(task, sums, v);
    __syncthreads();
    const float factor = factor_of(task, sums.square());
    if (threadIdx.x < WARP) decide(task, sums.dot() * factor);
    columns.normalize(v, factor);
    columns.store(task, v);
}

}  // namespace

#define ENTRY(NAME, W, GROUPS)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        NAME(const __grid_constant__ RouterTask task) {                                           \
        router<W, GROUPS>(task);                                                                  \
    }
// Up to 4096 and 8192 inputs.
ENTRY(exl_moe_router_f16, __half, 2)
ENTRY(exl_moe_router_bf16, __nv_bfloat16, 2)
ENTRY(exl_moe_router_long_f16, __half, 4)
ENTRY(exl_moe_router_long_bf16, __nv_bfloat16, 4)
