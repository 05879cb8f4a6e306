// exl_clamp: x = min(max(x, -limit), limit) in place; what is no number stays so.
//
// x is F32 [count]. Moves 8 bytes an element; bound: memory. Four elements per thread; the last
// thread has what is left of a vector.

#include "common/common.cuh"

namespace {

constexpr int THREADS = 256;

// Comparisons with NaN are false.
__device__ __forceinline__ float clamped(float v, float limit) {
    return v > limit ? limit : v < -limit ? -limit : v;
}

}  // namespace

// `vectors`: x is aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_clamp(float* x, long long count, float limit, int vectors) {
    pdl_launch();
    const long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    pdl_wait();
    if (first >= count) return;
    if (vectors && first + 4 <= count) {
        const float4 v = *reinterpret_cast<const float4*>(x + first);
        *reinterpret_cast<float4*>(x + first) =
            make_float4(clamped(v.x, limit), clamped(v.y, limit), clamped(v.z, limit),
                        clamped(v.w, limit));
        return;
    }
    const int end = int(min(4ll, count - first));
    for (int i = 0; i < end; ++i) x[first + i] = clamped(x[first + i], limit);
}
