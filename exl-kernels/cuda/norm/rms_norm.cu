// exl_rms_norm: y = x / sqrt(mean(x^2) + eps) * (weight + offset) for each row. With a residual it is
// rms_norm_add.cu.
//
// x and y are F32 [rows, dim] and may coincide; weight is F32, F16 or BF16 [dim]. Moves 8 bytes an
// element (the weight comes from L2); bound: memory at many rows, latency of one load at one row.
// A row is read once and stays in registers, or twice where it is odd or too long (norm.cuh).

#include "norm/norm.cuh"

namespace {

template <int STRIDE, int V>
__device__ __forceinline__ float load_row(float4 (&v)[V], const float* row, int at, int vectors) {
    load_vectors<STRIDE>(v, row, at, vectors);
    return squares_of(v);
}

template <int STRIDE, int V>
__device__ __forceinline__ void store_row(float* row, const float4 (&v)[V], const float4 (&w)[V],
                                          int at, int vectors, float factor, float offset) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        int i = at + j * STRIDE;
        if (i < vectors) {
            reinterpret_cast<float4*>(row)[i] = scaled(v[j], factor, w[j], offset);
        }
    }
}

template <int LANES, int V, typename W>
__device__ __forceinline__ void rms_lanes(const float* x, const W* weight, float* out, int rows,
                                          int dim, float eps, float offset) {
    pdl_launch();
    const int lane = threadIdx.x % LANES;
    const u32 row = blockIdx.x * u32(LANE_THREADS / LANES) + threadIdx.x / LANES;
    float4 w[V], v[V];
    load_weights<LANES>(w, weight, lane, dim / 4);
    // Lanes without a row take part in the sums of their warp, with nothing.
    const int vectors = row < u32(rows) ? dim / 4 : 0;
    const long long start = (long long)row * dim;
    pdl_wait();
    float sum = lanes_sum<LANES>(load_row<LANES>(v, x + start, lane, vectors));
    store_row<LANES>(out + start, v, w, lane, vectors, factor_of(sum, dim, eps), offset);
}

template <int T, int V, typename W>
__device__ __forceinline__ void rms_block(const float* x, const W* weight, float* out, int dim,
                                          float eps, float offset) {
    pdl_launch();
    const long long start = (long long)blockIdx.x * dim;
    float4 w[V], v[V];
    load_weights<T>(w, weight, threadIdx.x, dim / 4);
    pdl_wait();
    float sum = block_sum<T>(load_row<T>(v, x + start, threadIdx.x, dim / 4));
    store_row<T>(out + start, v, w, threadIdx.x, dim / 4, factor_of(sum, dim, eps), offset);
}

template <typename W>
__device__ __forceinline__ void rms_any(const float* x, const W* weight, float* out, int dim,
                                        float eps, float offset) {
    pdl_launch();
    const float* from = x + (long long)blockIdx.x * dim;
    float* to = out + (long long)blockIdx.x * dim;
    pdl_wait();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < dim; i += ANY_THREADS) sum = fmaf(from[i], from[i], sum);
    float factor = factor_of(block_sum<ANY_THREADS>(sum), dim, eps);
    for (int i = threadIdx.x; i < dim; i += ANY_THREADS) {
        to[i] = from[i] * factor * (to_float(weight[i]) + offset);
    }
}

}  // namespace

#define LANES(NAME, L, V, W)                                                                       \
    extern "C" __global__ void __launch_bounds__(LANE_THREADS)                                     \
        NAME(const float* x, const W* weight, float* out, int rows, int dim, float eps,            \
             float offset) {                                                                       \
        rms_lanes<L, V>(x, weight, out, rows, dim, eps, offset);                                   \
    }
#define BLOCK(NAME, T, V, W)                                                                       \
    extern "C" __global__ void __launch_bounds__(T)                                                \
        NAME(const float* x, const W* weight, float* out, int rows, int dim, float eps,            \
             float offset) {                                                                       \
        rms_block<T, V>(x, weight, out, dim, eps, offset);                                         \
    }
#define ANY(NAME, W)                                                                               \
    extern "C" __global__ void __launch_bounds__(ANY_THREADS)                                      \
        NAME(const float* x, const W* weight, float* out, int rows, int dim, float eps,            \
             float offset) {                                                                       \
        rms_any(x, weight, out, dim, eps, offset);                                                 \
    }

LANES(exl_rms_norm_16x2_f32, 16, 2, float)
LANES(exl_rms_norm_16x2_f16, 16, 2, __half)
LANES(exl_rms_norm_16x2_bf16, 16, 2, __nv_bfloat16)
LANES(exl_rms_norm_32x4_f32, 32, 4, float)
LANES(exl_rms_norm_32x4_f16, 32, 4, __half)
LANES(exl_rms_norm_32x4_bf16, 32, 4, __nv_bfloat16)
LANES(exl_rms_norm_32x8_f32, 32, 8, float)
LANES(exl_rms_norm_32x8_f16, 32, 8, __half)
LANES(exl_rms_norm_32x8_bf16, 32, 8, __nv_bfloat16)
BLOCK(exl_rms_norm_256x4_f32, 256, 4, float)
BLOCK(exl_rms_norm_256x4_f16, 256, 4, __half)
BLOCK(exl_rms_norm_256x4_bf16, 256, 4, __nv_bfloat16)
BLOCK(exl_rms_norm_512x4_f32, 512, 4, float)
BLOCK(exl_rms_norm_512x4_f16, 512, 4, __half)
BLOCK(exl_rms_norm_512x4_bf16, 512, 4, __nv_bfloat16)
BLOCK(exl_rms_norm_1024x4_f32, 1024, 4, float)
BLOCK(exl_rms_norm_1024x4_f16, 1024, 4, __half)
BLOCK(exl_rms_norm_1024x4_bf16, 1024, 4, __nv_bfloat16)
ANY(exl_rms_norm_any_f32, float)
ANY(exl_rms_norm_any_f16, __half)
ANY(exl_rms_norm_any_bf16, __nv_bfloat16)
