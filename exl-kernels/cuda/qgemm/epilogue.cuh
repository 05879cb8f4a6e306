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

// What is added to a sum, which can be loaded before the sum is known: the bias, and what the output is added to;
// of gate and up the biases of both.
struct Addends {
    float bias, other;
};

__device__ __forceinline__ Addends addends_of(const Epilogue& e, int row, int column) {
    if (column >= e.n) return {};
    const float other = e.add ? e.add[(long long)row * e.n + column] : 0.0f;
    return {bias_at(e.bias, e.bias_type, column), other};
}
// `other` as in finish_gated.
__device__ __forceinline__ Addends addends_of(const Epilogue& e, const Epilogue& other, int column) {
    if (column >= e.n) return {};
    return {bias_at(e.bias, e.bias_type, column), bias_at(other.bias, other.bias_type, column)};
}

// Returns the output.
__device__ __forceinline__ float finish_linear(const Epilogue& e, int row, int column, float s,
                                               const Addends& addends) {
    if (column >= e.n) return 0.0f;
    float v = s + addends.bias;
    if (e.add) v += addends.other;
    return e.out[(long long)row * e.n + column] = v;
}
__device__ __forceinline__ void finish_linear(const Epilogue& e, int row, int column, float s) {
    finish_linear(e, row, column, s, addends_of(e, row, column));
}

// Returns the output.
__device__ __forceinline__ float finish_gated(const Epilogue& e, int act, int row, int column,
                                              float gate, float up, const Addends& biases) {
    if (column >= e.n) return 0.0f;
    return e.out[(long long)row * e.n + column] = activate(gate + biases.bias, act) * (up + biases.other);
}
// `e` is the gate's; `other` has the bias of the other branch.
__device__ __forceinline__ void finish_gated(const Epilogue& e, const Epilogue& other, int act,
                                             int row, int column, float gate, float up) {
    finish_gated(e, act, row, column, gate, up, addends_of(e, other, column));
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
