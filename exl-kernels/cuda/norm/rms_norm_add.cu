// exl_rms_norm_add: y = x / sqrt(mean(x^2) + eps) * (weight + offset) + residual for each row.
//
// All but the weight are F32 [rows, dim], and y may be x or the residual; weight is F32, F16 or BF16
// [dim]. Moves 12 bytes an element (the weight comes from L2); bound: memory at many rows, latency of one
// load at one row. The residual is loaded together with the row.

#include "norm/norm.cuh"

namespace {

struct Norm {
    const float* x;
    const void* weight;
    const float* residual;
    float* out;
    int rows, dim;
    float eps, offset;
    int type;
};

__device__ __forceinline__ float added(float v, float factor, float w, float offset, float residual) {
    return fmaf(v * factor, w + offset, residual);
}

template <int STRIDE, int V>
__device__ __forceinline__ void store_row(float* row, const float4 (&v)[V], const float4 (&w)[V],
                                          const float4 (&r)[V], int at, int vectors, float factor,
                                          float offset) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        int i = at + j * STRIDE;
        if (i < vectors) {
            reinterpret_cast<float4*>(row)[i] =
                make_float4(added(v[j].x, factor, w[j].x, offset, r[j].x),
                            added(v[j].y, factor, w[j].y, offset, r[j].y),
                            added(v[j].z, factor, w[j].z, offset, r[j].z),
                            added(v[j].w, factor, w[j].w, offset, r[j].w));
        }
    }
}

template <int LANES, int V>
__device__ __forceinline__ void norm_lanes(const Norm& n) {
    pdl_launch();
    const int lane = threadIdx.x % LANES;
    const u32 row = blockIdx.x * u32(LANE_THREADS / LANES) + threadIdx.x / LANES;
    float4 w[V], r[V], v[V];
    load_weights<LANES>(w, n.weight, n.type, 0, lane, n.dim / 4, 0.0f);
    // Lanes without a row take part in the sums of their warp, with nothing.
    const int vectors = row < u32(n.rows) ? n.dim / 4 : 0;
    const long long start = (long long)row * n.dim;
    pdl_wait();
    load_vectors<LANES>(v, n.x + start, lane, vectors);
    load_vectors<LANES>(r, n.residual + start, lane, vectors);
    const float factor = factor_of(lanes_sum<LANES>(squares_of(v)), n.dim, n.eps);
    store_row<LANES>(n.out + start, v, w, r, lane, vectors, factor, n.offset);
}

template <int T, int V>
__device__ __forceinline__ void norm_block(const Norm& n) {
    pdl_launch();
    const long long start = (long long)blockIdx.x * n.dim;
    const int at = threadIdx.x, vectors = n.dim / 4;
    float4 w[V], r[V], v[V];
    load_weights<T>(w, n.weight, n.type, 0, at, vectors, 0.0f);
    pdl_wait();
    load_vectors<T>(v, n.x + start, at, vectors);
    load_vectors<T>(r, n.residual + start, at, vectors);
    const float factor = factor_of(block_sum<T>(squares_of(v)), n.dim, n.eps);
    store_row<T>(n.out + start, v, w, r, at, vectors, factor, n.offset);
}

__device__ __forceinline__ void norm_any(const Norm& n) {
    pdl_launch();
    const long long start = (long long)blockIdx.x * n.dim;
    const float *from = n.x + start, *residual = n.residual + start;
    float* to = n.out + start;
    pdl_wait();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n.dim; i += ANY_THREADS) sum = fmaf(from[i], from[i], sum);
    const float factor = factor_of(block_sum<ANY_THREADS>(sum), n.dim, n.eps);
    for (int i = threadIdx.x; i < n.dim; i += ANY_THREADS) {
        to[i] = added(from[i], factor, load_1(n.weight, n.type, i), n.offset, residual[i]);
    }
}

}  // namespace

#define ENTRY(NAME, THREADS, BODY)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        NAME(const float* x, const void* weight, const float* residual, float* out, int rows,      \
             int dim, float eps, float offset, int type) {                                         \
        BODY(Norm{x, weight, residual, out, rows, dim, eps, offset, type});                        \
    }

ENTRY(exl_rms_norm_add_16x2, LANE_THREADS, (norm_lanes<16, 2>))
ENTRY(exl_rms_norm_add_32x4, LANE_THREADS, (norm_lanes<32, 4>))
ENTRY(exl_rms_norm_add_32x8, LANE_THREADS, (norm_lanes<32, 8>))
ENTRY(exl_rms_norm_add_256x4, 256, (norm_block<256, 4>))
ENTRY(exl_rms_norm_add_512x4, 512, (norm_block<512, 4>))
ENTRY(exl_rms_norm_add_1024x4, 1024, (norm_block<1024, 4>))
ENTRY(exl_rms_norm_add_any, ANY_THREADS, norm_any)
