// exl_dense_*, exl_dense_narrow_*, exl_dense_gate_up_*: products with unquantized weights at full 32-bit
// accuracy.
//
// What: out[rows, outputs] = x W^T with W [outputs, inputs] in 32 or 16 bits. One warp computes one
// output column for up to eight rows: it streams the column's weights once and takes x, which the
// block's warps share, from the first-level cache. Bytes: the weights once per eight rows. Bound by
// memory up to eight rows, by 32-bit arithmetic beyond.
//
// The narrow ones are for few rows and few columns (routers, adapters): a whole block computes a column,
// whose weights are on their way before x is there. Bound by latency.

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

constexpr int NARROW_THREADS = 256;
constexpr int FIRST = 2;   // loads of weights before x is there

template <typename W>
__device__ __forceinline__ void dense_narrow(const float* x, const W* weight, const Epilogue& e,
                                             int rows, int inputs) {
    constexpr int WARPS = NARROW_THREADS / WARP;
    __shared__ float sums[WARPS][ROWS];
    pdl_launch();
    const int column = blockIdx.x, first = blockIdx.y * ROWS;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const W* w = weight + (long long)column * inputs;
    float a[FIRST][8];
#pragma unroll
    for (int i = 0; i < FIRST; ++i) {
        const int k = 8 * (threadIdx.x + i * NARROW_THREADS);
        if (k < inputs) load_row(a[i], w + k);
    }
    pdl_wait();
    float sum[ROWS] = {};
    const auto add = [&](const float (&a)[8], int k) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (first + r < rows) {
                float b[8];
                load_row(b, x + (long long)(first + r) * inputs + k);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[r] = fmaf(a[i], b[i], sum[r]);
            }
        }
    };
#pragma unroll
    for (int i = 0; i < FIRST; ++i) {
        const int k = 8 * (threadIdx.x + i * NARROW_THREADS);
        if (k < inputs) add(a[i], k);
    }
    for (int k = 8 * (threadIdx.x + FIRST * NARROW_THREADS); k < inputs; k += 8 * NARROW_THREADS) {
        load_row(a[0], w + k);
        add(a[0], k);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sum[r] = warp_sum(sum[r]);
        if (lane == 0) sums[warp][r] = sum[r];
    }
    __syncthreads();
    const int r = threadIdx.x;
    if (r >= ROWS || first + r >= rows) return;
    float s = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) s += sums[i][r];
    finish_linear(e, first + r, column, s);
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
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS, 2) exl_dense_narrow_##SUFFIX(    \
        const float* x, const W* weight, float* out, const void* bias, int bias_type,             \
        const float* add, int rows, int inputs, int outputs) {                                    \
        dense_narrow(x, weight, {out, bias, add, outputs, bias_type}, rows, inputs);              \
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
