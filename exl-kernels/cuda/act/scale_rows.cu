// exl_scale_rows: out[r] = factor * scales[r, column] * x[r] + add[r]; where factor times scale is 0
// nothing is taken of a row, not even what is no number. `out` may be `x` or `add`; `scales` and `add` may
// be 0: all scales are 1 then, nothing is added.
//
// All is F32, rows of `dim`. Moves 8 to 12 bytes an element; bound: memory. Four elements per thread;
// a block has up to 1024 elements of one row.

#include "common/common.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float taken(float v, float scale, float add) {
    return (scale == 0.0f ? 0.0f : v * scale) + add;
}

}  // namespace

// `vectors`: rows are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_scale_rows(const float* x, const float* scales, const float* add, float* out, int dim,
                   int columns, int column, float factor, int vectors) {
    pdl_launch();
    const int first = (blockIdx.y * THREADS + threadIdx.x) * 4;
    pdl_wait();
    if (first >= dim) return;
    const long long row = blockIdx.x, at = row * dim + first;
    const float scale = scales ? factor * scales[row * columns + column] : factor;
    if (vectors) {
        const float4 v = *reinterpret_cast<const float4*>(x + at);
        float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (add) a = *reinterpret_cast<const float4*>(add + at);
        *reinterpret_cast<float4*>(out + at) =
            make_float4(taken(v.x, scale, a.x), taken(v.y, scale, a.y), taken(v.z, scale, a.z),
                        taken(v.w, scale, a.w));
        return;
    }
    const int count = min(4, dim - first);
    for (int i = 0; i < count; ++i) out[at + i] = taken(x[at + i], scale, add ? add[at + i] : 0.0f);
}
