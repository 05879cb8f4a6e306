// The norm of one row that is left in the order of the product behind it as well, and how one cluster of blocks computes
// it, or one block where there are no clusters: what a multiprocessor has to load and to scatter takes its time.
#pragma once

#include "common/places.cuh"
#include "norm/norm.cuh"
#if __CUDA_ARCH__ >= 900
#include "common/bulk.cuh"
#endif

// As lower/moe/sum.rs.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
#define ROW_CLUSTER __cluster_dims__(8, 1, 1)
constexpr int ROW_BLOCKS = 8;
#else
#define ROW_CLUSTER
constexpr int ROW_BLOCKS = 1;
#endif
constexpr int ROW_STRIDE = 1024, ROW_THREADS = ROW_STRIDE / ROW_BLOCKS;

// The host fills this struct word by word: lower/rows/row.rs.
struct RowNorm {
    const void* scale;   // the norm's weights, [n]
    float* normed;       // [n]
    const u32* order;    // where the product behind this one has them, [n]; 0: they are not left for one
    float* ordered;      // [n], what that reads
    int n, type;         // of the norm's weights
    float eps, offset;
};

// The sum over all blocks, in their order.
__device__ __forceinline__ float sum_of_blocks(float own) {
    if constexpr (ROW_BLOCKS == 1) return own;
#if __CUDA_ARCH__ >= 900
    __shared__ float all[ROW_BLOCKS];
    if (threadIdx.x < ROW_BLOCKS) store_at(smem_address(all + cluster_rank()), threadIdx.x, own);
    cluster_sync();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS; ++i) sum += all[i];
    return sum;
#endif
}

// All blocks, of which nobody goes on before others are there.
__device__ __forceinline__ void meet() {
    if constexpr (ROW_BLOCKS == 1) __syncthreads();
#if __CUDA_ARCH__ >= 900
    if constexpr (ROW_BLOCKS > 1) cluster_meet();
#endif
}

// The norm of a row whose vector `i` is `value(i)`; keep(i, that) may store it. What `value` loads, it loads from L2: a
// rehearsal has loaded what was there before. VECTORS: of a thread, at most.
template <int VECTORS, class Value, class Keep>
__device__ __forceinline__ void norm_row(const RowNorm& task, const Value& value, const Keep& keep) {
    pdl_launch();
    const int vectors = task.n / 4, first = blockIdx.x * ROW_THREADS + threadIdx.x;
    float4 w[VECTORS], v[VECTORS];
    load_weights<ROW_STRIDE>(w, task.scale, task.type, 0, first, vectors, 0.0f);
    // First a rehearsal, as that of attention (attn/decode.cuh): this launch begins before it has anything to do.
#pragma unroll 1
    for (bool real = false;; real = true) {
        meet();   // all have begun; all have read what they exchange
        if (real) pdl_wait();
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) {
            const int i = first + j * ROW_STRIDE;
            v[j] = i < vectors ? value(i) : float4{};
        }
        const float sum = sum_of_blocks(block_sum<ROW_THREADS>(squares_of(v)));
        const float factor = factor_of(sum, task.n, task.eps);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) {
            const int i = first + j * ROW_STRIDE;
            if (i >= vectors) continue;
            const Places to(task.order, 4 * i);
            if (!real) continue;
            const float4 normed = scaled(v[j], factor, w[j], task.offset);
            if (task.order) to.store(task.ordered, normed);
            reinterpret_cast<float4*>(task.normed)[i] = normed;
            keep(i, v[j]);
        }
        if (real) return;
    }
}
