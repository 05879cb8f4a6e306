// exl_moe_route: the experts of each row and their weights, from the router's logits.
//
// logits F32 [rows, experts], ids I32 [rows, top_k], weights F32 [rows, top_k]. One warp per row; a lane
// keeps every 32nd logit in a register. Each choice is the largest logit that is left, of equal ones
// that with the lowest number; NaN is below all. Bytes: the logits once. Bound by latency. One row behind a
// norm and a router of few experts: router.cu.

#include "moe/route.cuh"

namespace {

constexpr int WARPS = 4;

// EACH: logits of a lane. `exponent`: of the norm that weights are divided by, 0 for none.
template <int EACH>
__device__ __forceinline__ void route(const float* logits, int* ids, float* weights, int rows,
                                      int experts, int top_k, float exponent) {
    pdl_launch();
    const int lane = threadIdx.x % WARP, row = blockIdx.x * WARPS + threadIdx.x / WARP;
    pdl_wait();
    if (row >= rows) return;
    const float* from = logits + (long long)row * experts;
    float v[EACH], most = __int_as_float(0xff800000);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int e = i * WARP + lane;
        v[i] = e < experts ? from[e] : __int_as_float(0xff800000);
        most = fmaxf(most, v[i]);
    }
    most = warp_max(most);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i * WARP + lane < experts) sum += expf(v[i] - most);
    }
    sum = warp_sum(sum);

    u32 taken = 0;       // the lane's logits that are chosen
    float norm = 0.0f;   // sum of powers
    for (int j = 0; j < top_k; ++j) {
        // The lane's best, then the warp's.
        int best = 0, place = -1;
        float value = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const bool left = i * WARP + lane < experts && !(taken >> i & 1);
            if (left && (place < 0 || rank(v[i]) > best)) {
                best = rank(v[i]);
                place = i;
                value = v[i];
            }
        }
        int expert = place < 0 ? MOST_EXPERTS : place * WARP + lane;
        const int own = expert;
        if (place < 0) best = -0x7fffffff - 1;
        const int top = __reduce_max_sync(FULL_MASK, best);
        expert = __reduce_min_sync(FULL_MASK, best == top ? expert : MOST_EXPERTS);
        if (own == expert) taken |= 1u << place;
        value = __shfl_sync(FULL_MASK, value, expert % WARP);
        const float w = expf(value - most) / sum;
        if (exponent == 1.0f) norm += w;
        if (exponent > 0.0f && exponent != 1.0f) norm += powf(w, exponent);
        if (lane == 0) {
            ids[(long long)row * top_k + j] = expert;
            weights[(long long)row * top_k + j] = w;
        }
    }
    if (exponent <= 0.0f) return;
    if (exponent != 1.0f) norm = powf(norm, 1.0f / exponent);
    __syncwarp();
    for (int j = lane; j < top_k; j += WARP) weights[(long long)row * top_k + j] /= norm;
}

}  // namespace

#define ENTRY(EACH)                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                     \
        exl_moe_route_##EACH(const float* logits, int* ids, float* weights, int rows, int experts, \
                             int top_k, float exponent) {                                         \
        route<EACH>(logits, ids, weights, rows, experts, top_k, exponent);                        \
    }
// Up to 32, 256 and 1024 experts.
ENTRY(1)
ENTRY(8)
ENTRY(32)
