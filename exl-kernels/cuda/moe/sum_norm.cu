// exl: spills-allowed exl_moe_sum_norm_long_4 on 12.0, whose one block has 1024 threads
// exl: spills-allowed exl_moe_sum_norm_4 the same
//
// exl_moe_sum_norm_*: the weighted sum of a row's experts, with the residual, and the norm of that.
//
// What: what down of one row (row.cu) leaves to whoever comes last of the thread blocks that have the same columns,
// and exl_row_norm behind it. Here nobody counts who comes last: the launch begins when all have ended. Sums are
// those of add_segments, to the bit. Bytes: 4 for each column, expert of the row and block that divides the rows, from
// L2. Bound by latency: that of one launch, and what a multiprocessor loads.

#include "norm/row.cuh"

namespace {

// The host fills this struct word by word: lower/moe/sum.rs.
struct SumTask {
    RowNorm norm;            // of n columns
    const float* parts;      // [segments, SPLIT, n]
    const float* weights;    // [segments]
    const float* residual;   // [n], or 0; may be `sum`
    float* sum;              // [n]
    int segments;
};

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Vector `i` of the sum.
template <int SPLIT>
__device__ __forceinline__ float4 sum_at(const SumTask& task, int i) {
    const int stride = task.norm.n / 4;
    const float4* parts = reinterpret_cast<const float4*>(task.parts) + i;
    const float4* before = reinterpret_cast<const float4*>(task.residual) + i;
    const float4 residual = task.residual ? __ldcg(before) : float4{};
    float4 sum = float4{};
    // Two at a time: this is all latency.
#pragma unroll 1
    for (int from = 0; from < task.segments; from += 2) {
        float weight[2];
        float4 part[2][SPLIT];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (from + s >= task.segments) break;
#pragma unroll
            for (int r = 0; r < SPLIT; ++r) part[s][r] = __ldcg(parts + ((from + s) * SPLIT + r) * stride);
            weight[s] = __ldcg(task.weights + from + s);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (from + s >= task.segments) break;
            float4 all = part[s][0];
#pragma unroll
            for (int r = 1; r < SPLIT; ++r) all = add(all, part[s][r]);
            sum = make_float4(fmaf(weight[s], all.x, sum.x), fmaf(weight[s], all.y, sum.y),
                              fmaf(weight[s], all.z, sum.z), fmaf(weight[s], all.w, sum.w));
        }
    }
    return add(sum, residual);
}

template <int SPLIT, int VECTORS>
__device__ __forceinline__ void sum_norm(const SumTask& task) {
    norm_row<VECTORS>(
        task.norm, [&](int i) { return sum_at<SPLIT>(task, i); },
        [&](int i, const float4& v) { reinterpret_cast<float4*>(task.sum)[i] = v; });
}

}  // namespace

#define ENTRY(NAME, SPLIT, VECTORS)                                                                \
    extern "C" __global__ void ROW_CLUSTER __launch_bounds__(ROW_THREADS, 1)                      \
        NAME(const __grid_constant__ SumTask task) {                                              \
        sum_norm<SPLIT, VECTORS>(task);                                                           \
    }
// By blocks that divide the rows; up to 4096 and 8192 columns.
ENTRY(exl_moe_sum_norm_1, 1, 1)
ENTRY(exl_moe_sum_norm_4, 4, 1)
ENTRY(exl_moe_sum_norm_long_1, 1, 2)
ENTRY(exl_moe_sum_norm_long_4, 4, 2)
