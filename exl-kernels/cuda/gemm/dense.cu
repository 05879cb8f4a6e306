// exl_dense_*, exl_dense_gate_up_*: products with unquantized weights at full 32-bit accuracy.
//
// What: out[rows, outputs] = x W^T with W [outputs, inputs] in 32 or 16 bits. One warp computes one
// output column for up to eight rows: it streams the column's weights once and takes x, which the
// block's warps share, from the first-level cache. Bytes: the weights once per eight rows. Bound by
// memory up to eight rows, by 32-bit arithmetic beyond.

#include "common/common.cuh"
#include "qgemm/epilogue.cuh"

namespace {

constexpr int ROWS = 8;

__device__ __forceinline__ void load_row(float (&v)[8], const float* p) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 f = *reinterpret_cast<const float4*>(p + i);
        v[i] = f.x;
        v[i + 1] = f.y;
        v[i + 2] = f.z;
        v[i + 3] = f.w;
    }
}
template <typename T>
__device__ __forceinline__ void load_row(float (&v)[8], const T* p) {
    uint4 w = *reinterpret_cast<const uint4*>(p);
    const T* t = reinterpret_cast<const T*>(&w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(t[i]);
}

// Sums of rows first..first+7 with one column of weights, complete in lane 0.
template <typename W>
__device__ __forceinline__ void dots(float (&sum)[ROWS], const float* x, const W* w, int first,
                                     int rows, int inputs, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = 0.0f;
    if (inputs % 8 == 0) {
        for (int k = 8 * lane; k < inputs; k += 8 * WARP) {
            float a[8];
            load_row(a, w + k);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (first + r < rows) {
                    float b[8];
                    load_row(b, x + (long long)(first + r) * inputs + k);
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[r] = fmaf(a[i], b[i], sum[r]);
                }
            }
        }
    } else {
        for (int k = lane; k < inputs; k += WARP) {
            float a = to_float(w[k]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (first + r < rows) {
                    sum[r] = fmaf(a, x[(long long)(first + r) * inputs + k], sum[r]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = warp_sum(sum[r]);
}

template <typename W>
__device__ __forceinline__ void dense(const float* x, const W* weight, const Epilogue& e, int rows,
                                      int inputs) {
    pdl_launch();
    pdl_wait();
    int column = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = blockIdx.y * ROWS;
    if (column >= e.n) return;
    float sum[ROWS];
    dots(sum, x, weight + (long long)column * inputs, first, rows, inputs, lane);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r < rows) finish_linear(e, first + r, column, sum[r]);
    }
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
    float g[ROWS], u[ROWS];
    dots(g, x, gate + (long long)column * inputs, first, rows, inputs, lane);
    dots(u, x, up + (long long)column * inputs, first, rows, inputs, lane);
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
