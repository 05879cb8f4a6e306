// exl_scale_logits: x = softcap(x * scale) in place, softcap(x) = cap tanh(x / cap) for cap > 0.
//
// x is F32 [count]. Moves 8 bytes an element; bound: memory. Four elements per thread; the last
// thread has what is left of a vector.

#include "common/common.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float capped(float v, float scale, float cap) {
    v *= scale;
    return cap > 0.0f ? cap * tanhf(v / cap) : v;
}

}  // namespace

// `vectors`: x is aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_scale_logits(float* x, long long count, float scale, float cap, int vectors) {
    pdl_launch();
    const long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    pdl_wait();
    if (first >= count) return;
    if (vectors && first + 4 <= count) {
        float4 v = *reinterpret_cast<float4*>(x + first);
        v.x = capped(v.x, scale, cap);
        v.y = capped(v.y, scale, cap);
        v.z = capped(v.z, scale, cap);
        v.w = capped(v.w, scale, cap);
        *reinterpret_cast<float4*>(x + first) = v;
        return;
    }
    const int end = int(min(4ll, count - first));
    for (int i = 0; i < end; ++i) x[first + i] = capped(x[first + i], scale, cap);
}
