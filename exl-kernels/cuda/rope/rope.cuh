// How far pairs of values turn.
#pragma once

#include "common/common.cuh"

// Angles are position * frequency in 64-bit floats, brought to one turn, so that sine and cosine are exact
// to 32 bits at any position.
__device__ __forceinline__ float2 rotation(int position, float frequency, float factor) {
    const double turns = double(position) * double(frequency) * 0.15915494309189535;
    float sine, cosine;
    sincospif(float(2.0 * (turns - rint(turns))), &sine, &cosine);
    return make_float2(cosine * factor, sine * factor);
}

// A pair of values, turned.
__device__ __forceinline__ float2 turned(float x, float y, float2 turn) {
    return make_float2(__fmaf_rn(x, turn.x, -__fmul_rn(y, turn.y)),
                       __fmaf_rn(y, turn.x, __fmul_rn(x, turn.y)));
}

// Four values as the cache keeps them.
__device__ __forceinline__ uint2 four_halves(float x, float y, float z, float w) {
    return make_uint2(as_u32(__floats2half2_rn(x, y)), as_u32(__floats2half2_rn(z, w)));
}

// Positions are [axes, rows]. Frequencies from `second` and from `third` on go by the position on the
// second and on the third axis; where there is one axis they are larger than any.
struct Positions {
    const int* all;
    int rows, second, third;

    __device__ __forceinline__ int at(int row, int frequency) const {
        const int axis = int(frequency >= second) + int(frequency >= third);
        return all[axis * rows + row];
    }
};
