// What happens to a finished sum: bias, residual, or the gate's activation.
#pragma once

#include "common/types.cuh"

constexpr int ACT_SILU = 0;
constexpr int ACT_GELU_TANH = 1;
constexpr int ACT_GELU = 2;
constexpr int ACT_SIGMOID = 3;
constexpr int ACT_RELU2 = 4;

struct Epilogue {
    float* out;          // [rows, n]
    const void* bias;    // [n] or 0
    const float* add;    // [rows, n], added; may be `out`
    int n;               // columns beyond are padding
    int bias_type;
};

__device__ __forceinline__ float bias_at(const void* bias, int type, int i) {
    return bias ? load_1(bias, type, i) : 0.0f;
}

__device__ __forceinline__ float activate(float v, int act) {
    if (act == ACT_SILU) return v / (1.0f + expf(-v));
    if (act == ACT_GELU_TANH) {
        float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
        return 0.5f * v * (1.0f + tanhf(u));
    }
    if (act == ACT_SIGMOID) return 1.0f / (1.0f + expf(-v));
    // NaN stays NaN, which `fmaxf` would not keep.
    if (act == ACT_RELU2) return v <= 0.0f ? 0.0f : v * v;
    return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
}

__device__ __forceinline__ void finish_linear(const Epilogue& e, int row, int column, float s) {
    if (column >= e.n) return;
    long long at = (long long)row * e.n + column;
    float v = s + bias_at(e.bias, e.bias_type, column);
    if (e.add) v += e.add[at];
    e.out[at] = v;
}

// `e` is the gate's; `up` has the bias of the other branch. Returns the output.
__device__ __forceinline__ float finish_gated(const Epilogue& e, const Epilogue& other, int act,
                                              int row, int column, float gate, float up) {
    if (column >= e.n) return 0.0f;
    gate += bias_at(e.bias, e.bias_type, column);
    up += bias_at(other.bias, other.bias_type, column);
    return e.out[(long long)row * e.n + column] = activate(gate, act) * up;
}

// Four columns from `column` on, a multiple of four. Where a row of the output has a multiple of four
// columns they go out together.
__device__ __forceinline__ void finish_linear(const Epilogue& e, int row, int column, float4 s) {
    const long long at = (long long)row * e.n + column;
    if (column >= e.n) return;
    if (e.n % 4 != 0 || e.bias) {
        finish_linear(e, row, column, s.x);
        finish_linear(e, row, column + 1, s.y);
        finish_linear(e, row, column + 2, s.z);
        finish_linear(e, row, column + 3, s.w);
        return;
    }
    if (e.add) {
        const float4 a = *reinterpret_cast<const float4*>(e.add + at);
        s = make_float4(s.x + a.x, s.y + a.y, s.z + a.z, s.w + a.w);
    }
    *reinterpret_cast<float4*>(e.out + at) = s;
}
__device__ __forceinline__ void finish_gated(const Epilogue& e, const Epilogue& other, int act,
                                             int row, int column, float4 gate, float4 up) {
    if (column >= e.n) return;
    if (e.n % 4 != 0 || e.bias || other.bias) {
        finish_gated(e, other, act, row, column, gate.x, up.x);
        finish_gated(e, other, act, row, column + 1, gate.y, up.y);
        finish_gated(e, other, act, row, column + 2, gate.z, up.z);
        finish_gated(e, other, act, row, column + 3, gate.w, up.w);
        return;
    }
    *reinterpret_cast<float4*>(e.out + (long long)row * e.n + column) =
        make_float4(activate(gate.x, act) * up.x, activate(gate.y, act) * up.y,
                    activate(gate.z, act) * up.z, activate(gate.w, act) * up.w);
}
