// exl_dense_*, exl_dense_gate_up_*: products with unquantized weights at full 32-bit accuracy.
//
// What: out[rows, outputs] = x W^T with W [outputs, inputs] in 32 or 16 bits. One warp computes one
// output column for up to eight rows: it streams the column's weights once and takes x, which the
// block's warps share, from the first-level cache. Of few columns (exl_dense_few_*: routers of experts)
// a block computes one. Bytes: the weights once per eight rows. Bound by memory up to eight rows, by 32-bit
// arithmetic beyond; of few columns by latency.

#include "gemm/dense.cuh"
#include "qgemm/epilogue.cuh"

namespace {

template <typename W>
__device__ __forceinline__ void dense(const float* x, const W* weight, const Epilogue& e, int rows,
                                      int inputs) {
    pdl_launch();
    pdl_wait();
    int column = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = blockIdx.y * ROWS;
    if (column >= e.n) return;
    const auto row = [&](int r) { return x + (long long)(first + r) * inputs; };
    float sum[ROWS];
    dots(sum, row, weight + (long long)column * inputs, rows - first, inputs, lane);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r < rows) finish_linear(e, first + r, column, sum[r]);
    }
}

constexpr int THREADS = 256;

template <typename W>
__device__ __forceinline__ void dense_few(const float* x, const W* weight, const Epilogue& e, int rows,
                                          int inputs) {
    __shared__ float parts[THREADS / WARP][ROWS];
    pdl_launch();
    pdl_wait();
    const int column = blockIdx.x, first = blockIdx.y * ROWS;
    const auto row = [&](int r) { return x + (long long)(first + r) * inputs; };
    float sum[ROWS];
    dots<THREADS>(sum, row, weight + (long long)column * inputs, rows - first, inputs, threadIdx.x);
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) parts[threadIdx.x / WARP][r] = sum[r];
    }
    __syncthreads();
    const int r = threadIdx.x;
    if (r >= ROWS || first + r >= rows) return;
    float all = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; ++warp) all += parts[warp][r];
    finish_linear(e, first + r, column, all);
}

template <typename W>
__device__ __forceinline__ void dense_gate_up(const float* x, const W* gate, const W* up,
                                              const Epilogue& e, const Epilogue& other, int act,
                                              int rows, int inputs) {
    pdl_launch();
    pdl_wait();
    int column = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = blockIdx.y * ROWS;
    if (column >= e.n) return;
    const auto row = [&](int r) { return x + (long long)(first + r) * inputs; };
    float g[ROWS], u[ROWS];
    dots(g, row, gate + (long long)column * inputs, rows - first, inputs, lane);
    dots(u, row, up + (long long)column * inputs, rows - first, inputs, lane);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r < rows) finish_gated(e, other, act, first + r, column, g[r], u[r]);
    }
}

}  // namespace

#define DENSE(SUFFIX, W)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2)                                          \
        exl_dense_##SUFFIX(const float* x, const W* weight, float* out, const void* bias,         \
                           int bias_type, const float* add, int rows, int inputs, int outputs) {  \
        dense(x, weight, {out, bias, add, outputs, bias_type}, rows, inputs);                     \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                      \
        exl_dense_few_##SUFFIX(const float* x, const W* weight, float* out, const void* bias,     \
                               int bias_type, const float* add, int rows, int inputs,             \
                               int outputs) {                                                     \
        dense_few(x, weight, {out, bias, add, outputs, bias_type}, rows, inputs);                 \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) exl_dense_gate_up_##SUFFIX(              \
        const float* x, const W* gate, const W* up, float* out, const void* gate_bias,            \
        int gate_bias_type, const void* up_bias, int up_bias_type, int act, int rows, int inputs, \
        int outputs) {                                                                            \
        dense_gate_up(x, gate, up, {out, gate_bias, nullptr, outputs, gate_bias_type},            \
                      {nullptr, up_bias, nullptr, 0, up_bias_type}, act, rows, inputs);           \
    }
DENSE(f32, float)
DENSE(f16, __half)
DENSE(bf16, __nv_bfloat16)
