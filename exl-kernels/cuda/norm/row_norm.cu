// exl_row_norm, exl_row_norm_long: exl_rms_norm of one row that is left in the order of the product behind it as well,
// with up to 4096 and 8192 columns.
//
// exl: arch sm_90a, sm_100
//
// What: y = x / sqrt(mean(x^2) + eps) * (weight + offset). Every block adds up the whole row and leaves its part: what
// one multiprocessor scatters takes its time, and blocks that wait for each other take as long. Bytes: 12 for each
// column, 4 more for each block, from L2. Bound by latency: that of one launch.

#include "norm/row.cuh"

namespace {

// As lower/rows/row.rs.
constexpr int NORM_BLOCKS = 8, NORM_VECTORS = 4;

// The host fills this struct word by word: lower/rows/row.rs.
struct NormTask {
    RowNorm norm;
    const float* x;   // [n], not what is normed
    int rehearses;    // the launch in front takes longer than a rehearsal
};

template <int THREADS>
__device__ __forceinline__ void row_norm(const NormTask& task) {
    pdl_launch();
    const RowNorm& norm = task.norm;
    const int vectors = norm.n / 4, own = threadIdx.x % NORM_BLOCKS == blockIdx.x ? vectors : 0;
    float4 w[NORM_VECTORS], v[NORM_VECTORS];
    load_weights<THREADS>(w, norm.scale, norm.type, 0, threadIdx.x, own, 0.0f);
    Places to[NORM_VECTORS];
#pragma unroll
    for (int j = 0; j < NORM_VECTORS; ++j) {
        const int i = threadIdx.x + j * THREADS;
        if (i < own) to[j] = Places(norm.order, 4 * i);
    }
    // With a rehearsal first, as attention (attn/decode.cuh): what is loaded comes from L2.
#pragma unroll 1
    for (bool real = !task.rehearses;; real = true) {
        if (real) pdl_wait();
#pragma unroll
        for (int j = 0; j < NORM_VECTORS; ++j) {
            const int i = threadIdx.x + j * THREADS;
            v[j] = i < vectors ? __ldcg(reinterpret_cast<const float4*>(task.x) + i) : float4{};
        }
        const float factor = factor_of(block_sum<THREADS>(squares_of(v)), norm.n, norm.eps);
#pragma unroll
        for (int j = 0; j < NORM_VECTORS; ++j) {
            const int i = threadIdx.x + j * THREADS;
            if (i >= own || !real) continue;
            const float4 normed = scaled(v[j], factor, w[j], norm.offset);
            to[j].store(norm.ordered, normed);
            reinterpret_cast<float4*>(norm.normed)[i] = normed;
        }
        if (real) return;
        __syncthreads();
    }
}

}  // namespace

#define ENTRY(NAME, THREADS)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        NAME(const __grid_constant__ NormTask task) {                                             \
        row_norm<THREADS>(task);                                                                  \
    }
ENTRY(exl_row_norm, 256)
ENTRY(exl_row_norm_long, 512)
