// exl_layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias for each row.
//
// x and y are F32 [rows, dim] and may coincide; weight and bias are F32, F16 or BF16 [groups, dim] or 0,
// row r takes theirs of row r % groups. The variance is that of the differences from the mean: a row is
// read once, summed twice. Moves 8 bytes an element (weights come from L2); bound: memory at many rows,
// latency of one load and two sums at one row.

#include "norm/norm.cuh"

namespace {

struct Norm {
    const float* x;
    const void *weight, *bias;   // or 0
    float* out;
    int rows, dim, groups, weight_type, bias_type;
    float eps;
};

template <int V>
__device__ __forceinline__ float sum_of(const float4 (&v)[V]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) sum += (v[j].x + v[j].y) + (v[j].z + v[j].w);
    return sum;
}

// Subtracts the mean, and gives the sum of the squares of what is left.
template <int STRIDE, int V>
__device__ __forceinline__ float centre(float4 (&v)[V], float mean, int at, int vectors) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        v[j] = make_float4(v[j].x - mean, v[j].y - mean, v[j].z - mean, v[j].w - mean);
        if (at + j * STRIDE < vectors) sum = add_squares(sum, v[j]);
    }
    return sum;
}

__device__ __forceinline__ float4 finished(float4 v, float factor, float4 w, float4 b) {
    return make_float4(fmaf(v.x * factor, w.x, b.x), fmaf(v.y * factor, w.y, b.y),
                       fmaf(v.z * factor, w.z, b.z), fmaf(v.w * factor, w.w, b.w));
}

template <int STRIDE, int V>
__device__ __forceinline__ void store_row(float* row, const float4 (&v)[V], const float4 (&w)[V],
                                          const float4 (&b)[V], int at, int vectors, float factor) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        int i = at + j * STRIDE;
        if (i < vectors) reinterpret_cast<float4*>(row)[i] = finished(v[j], factor, w[j], b[j]);
    }
}

template <int LANES, int V>
__device__ __forceinline__ void norm_lanes(const Norm& n) {
    pdl_launch();
    const int lane = threadIdx.x % LANES;
    const u32 row = blockIdx.x * u32(LANE_THREADS / LANES) + threadIdx.x / LANES;
    const long long first = (long long)(row % u32(n.groups)) * n.dim;
    float4 w[V], b[V], v[V];
    load_weights<LANES>(w, n.weight, n.weight_type, first, lane, n.dim / 4, 1.0f);
    load_weights<LANES>(b, n.bias, n.bias_type, first, lane, n.dim / 4, 0.0f);
    // Lanes without a row take part in the sums of their warp, with nothing.
    const int vectors = row < u32(n.rows) ? n.dim / 4 : 0;
    const long long start = (long long)row * n.dim;
    pdl_wait();
    load_vectors<LANES>(v, n.x + start, lane, vectors);
    const float mean = lanes_sum<LANES>(sum_of(v)) / float(n.dim);
    const float squares = lanes_sum<LANES>(centre<LANES>(v, mean, lane, vectors));
    store_row<LANES>(n.out + start, v, w, b, lane, vectors, factor_of(squares, n.dim, n.eps));
}

template <int T, int V>
__device__ __forceinline__ void norm_block(const Norm& n) {
    // The largest block has no registers for the whole bias beside all else.
    constexpr bool LATE = T == 1024;
    pdl_launch();
    const long long start = (long long)blockIdx.x * n.dim;
    const long long first = (long long)(blockIdx.x % u32(n.groups)) * n.dim;
    const int at = threadIdx.x, vectors = n.dim / 4;
    float4 w[V], b[V], v[V];
    load_weights<T>(w, n.weight, n.weight_type, first, at, vectors, 1.0f);
    if (!LATE) load_weights<T>(b, n.bias, n.bias_type, first, at, vectors, 0.0f);
    pdl_wait();
    load_vectors<T>(v, n.x + start, at, vectors);
    const float mean = block_sum<T, 0>(sum_of(v)) / float(n.dim);
    const float squares = block_sum<T, 1>(centre<T>(v, mean, at, vectors));
    const float factor = factor_of(squares, n.dim, n.eps);
    if constexpr (LATE) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float4 one[1];
            const int i = at + j * T;
            load_weights<T>(one, n.bias, n.bias_type, first, i, vectors, 0.0f);
            if (i < vectors) {
                reinterpret_cast<float4*>(n.out + start)[i] = finished(v[j], factor, w[j], one[0]);
            }
        }
    } else {
        store_row<T>(n.out + start, v, w, b, at, vectors, factor);
    }
}

__device__ __forceinline__ void norm_any(const Norm& n) {
    pdl_launch();
    const float* from = n.x + (long long)blockIdx.x * n.dim;
    float* to = n.out + (long long)blockIdx.x * n.dim;
    const long long first = (long long)(blockIdx.x % u32(n.groups)) * n.dim;
    pdl_wait();
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < n.dim; i += ANY_THREADS) sum += from[i];
    const float mean = block_sum<ANY_THREADS, 0>(sum) / float(n.dim);
    for (int i = threadIdx.x; i < n.dim; i += ANY_THREADS) {
        const float v = from[i] - mean;
        squares = fmaf(v, v, squares);
    }
    const float factor = factor_of(block_sum<ANY_THREADS, 1>(squares), n.dim, n.eps);
    for (int i = threadIdx.x; i < n.dim; i += ANY_THREADS) {
        const float w = n.weight ? load_1(n.weight, n.weight_type, first + i) : 1.0f;
        const float b = n.bias ? load_1(n.bias, n.bias_type, first + i) : 0.0f;
        to[i] = fmaf((from[i] - mean) * factor, w, b);
    }
}

}  // namespace

#define ENTRY(NAME, THREADS, BODY)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                       \
        NAME(const float* x, const void* weight, const void* bias, float* out, int rows, int dim,  \
             int groups, int weight_type, int bias_type, float eps) {                              \
        BODY(Norm{x, weight, bias, out, rows, dim, groups, weight_type, bias_type, eps});          \
    }

ENTRY(exl_layer_norm_16x2, LANE_THREADS, (norm_lanes<16, 2>))
ENTRY(exl_layer_norm_32x4, LANE_THREADS, (norm_lanes<32, 4>))
ENTRY(exl_layer_norm_32x8, LANE_THREADS, (norm_lanes<32, 8>))
ENTRY(exl_layer_norm_256x4, 256, (norm_block<256, 4>))
ENTRY(exl_layer_norm_512x4, 512, (norm_block<512, 4>))
ENTRY(exl_layer_norm_1024x4, 1024, (norm_block<1024, 4>))
ENTRY(exl_layer_norm_any, ANY_THREADS, norm_any)
