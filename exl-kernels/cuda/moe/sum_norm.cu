// exl: spills-allowed exl_moe_sum_norm_long_4 on 12.0, whose one block has 1024 threads
// exl: spills-allowed exl_moe_sum_norm_4 the same
//
// exl_moe_sum_norm_*: the weighted sum of a row's experts, with the residual, and the norm of that.
//
// What: what down of one row (row.cu) leaves to whoever comes last of the thread blocks that have the same columns,
// and exl_rms_norm behind it. Here nobody counts who comes last: the launch begins when all have ended. Sums are
// those of add_segments, to the bit. One cluster of blocks, where there are clusters, else one block. Bytes: 4 for
// each column, expert of the row and block that divides the rows, from L2. Bound by latency: that of one launch, and
// what a multiprocessor loads.

#include "norm/norm.cuh"
#if __CUDA_ARCH__ >= 900
#include "common/bulk.cuh"
#endif

namespace {

// As lower/moe/sum.rs.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
#define CLUSTER __cluster_dims__(4, 1, 1)
constexpr int BLOCKS = 4;
#else
#define CLUSTER
constexpr int BLOCKS = 1;
#endif
constexpr int STRIDE = 1024, THREADS = STRIDE / BLOCKS;

// The host fills this struct word by word: lower/moe/sum.rs.
struct SumTask {
    const float* parts;      // [segments, SPLIT, n]
    const float* weights;    // [segments]
    const float* residual;   // [n], or 0; may be `sum`
    float* sum;              // [n]
    const void* scale;       // of the norm, [n]
    float* normed;           // [n]
    int n, segments;
    int type;                // of the norm's weights
    float eps, offset;
};

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Vector `i` of the sum.
template <int SPLIT>
__device__ __forceinline__ float4 sum_at(const SumTask& task, int i) {
    const int stride = task.n / 4;
    const float4* parts = reinterpret_cast<const float4*>(task.parts) + i;
    // All from L2: a rehearsal has loaded what was there before.
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

// The sum over all blocks, in their order.
__device__ __forceinline__ float sum_of_blocks(float own) {
    if constexpr (BLOCKS == 1) return own;
#if __CUDA_ARCH__ >= 900
    __shared__ float all[4];
    if (threadIdx.x < BLOCKS) store_at(smem_address(all + cluster_rank()), threadIdx.x, own);
    cluster_sync();
    return (all[0] + all[1]) + (all[2] + all[3]);
#endif
}

// All blocks, of which nobody goes on before others are there.
__device__ __forceinline__ void meet() {
    if constexpr (BLOCKS == 1) __syncthreads();
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) cluster_meet();
#endif
}

template <int SPLIT, int VECTORS>
__device__ __forceinline__ void sum_norm(const SumTask& task) {
    pdl_launch();
    const int vectors = task.n / 4, first = blockIdx.x * THREADS + threadIdx.x;
    float4 w[VECTORS], v[VECTORS];
    load_weights<STRIDE>(w, task.scale, task.type, 0, first, vectors, 0.0f);
    // First a rehearsal, as that of attention (attn/decode.cuh): this launch begins before it has anything to do.
#pragma unroll 1
    for (bool real = false;; real = true) {
        meet();   // all have begun; all have read what they exchange
        if (real) pdl_wait();
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) {
            const int i = first + j * STRIDE;
            v[j] = i < vectors ? sum_at<SPLIT>(task, i) : float4{};
        }
        const float sum = sum_of_blocks(block_sum<THREADS>(squares_of(v)));
        const float factor = factor_of(sum, task.n, task.eps);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) {
            const int i = first + j * STRIDE;
            if (i >= vectors || !real) continue;
            reinterpret_cast<float4*>(task.normed)[i] = scaled(v[j], factor, w[j], task.offset);
            reinterpret_cast<float4*>(task.sum)[i] = v[j];
        }
        if (real) return;
    }
}

}  // namespace

#define ENTRY(NAME, SPLIT, VECTORS)                                                                \
    extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)                              \
        NAME(const __grid_constant__ SumTask task) {                                              \
        sum_norm<SPLIT, VECTORS>(task);                                                           \
    }
// By blocks that divide the rows; up to 4096 and 8192 columns.
ENTRY(exl_moe_sum_norm_1, 1, 1)
ENTRY(exl_moe_sum_norm_4, 4, 1)
ENTRY(exl_moe_sum_norm_long_1, 1, 2)
ENTRY(exl_moe_sum_norm_long_4, 4, 2)
