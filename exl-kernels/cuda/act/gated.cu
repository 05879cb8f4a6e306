// exl_gated: out = act(gate) * up, element by element; `out` may be one of the two, `up` may be 0: then
// it is act(gate).
//
// All is F32 [count]. Moves 8 to 12 bytes an element; bound: memory. Four elements per thread; the last
// thread has what is left of a vector.

#include "qgemm/epilogue.cuh"

namespace {

constexpr int THREADS = 256;

}  // namespace

// `vectors`: all are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_gated(const float* gate, const float* up, float* out, long long count, int act, int vectors) {
    pdl_launch();
    const long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    pdl_wait();
    if (first >= count) return;
    if (vectors && first + 4 <= count) {
        const float4 g = *reinterpret_cast<const float4*>(gate + first);
        float4 u = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        if (up) u = *reinterpret_cast<const float4*>(up + first);
        *reinterpret_cast<float4*>(out + first) =
            make_float4(activate(g.x, act) * u.x, activate(g.y, act) * u.y, activate(g.z, act) * u.z,
                        activate(g.w, act) * u.w);
        return;
    }
    const int end = int(min(4ll, count - first));
    for (int i = 0; i < end; ++i) {
        out[first + i] = activate(gate[first + i], act) * (up ? up[first + i] : 1.0f);
    }
}
