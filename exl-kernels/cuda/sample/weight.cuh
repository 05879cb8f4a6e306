// exp((x - most) / temperature) as a fixed-point number.
//
// Weights are integers, so that their sums are exact and the same in every order, and they are made
// without 64-bit floats, which most GPUs compute slowly. The exponent is taken in base two with 40
// bits behind the point: 2^-(n + j/64 + g) = 2^-n * table[j] * (1 - z + z^2/2 - ...), z = g ln 2.
// The result's relative error is below 2^-35, or half a unit when that is more.
#pragma once

#include "common/common.cuh"

constexpr int EXP2_STEPS = 64;

// 2^63 * 2^(-j/64), rounded.
static __device__ const u64 EXP2_TABLE[EXP2_STEPS] = {
    0x8000000000000000ull, 0x7e9f06067a4360baull, 0x7d41d96db915019dull, 0x7be86fb985689ddcull,
    0x7a92be8a92436616ull, 0x7940bb9e2cffd89dull, 0x77f25ccdee6d7ae6ull, 0x76a7980f6cca15c2ull,
    0x75606373ee921c97ull, 0x741cb5281e25ee34ull, 0x72dc8373be41a454ull, 0x719fc4b95f452d29ull,
    0x70666f76154a7089ull, 0x6f307a412f074892ull, 0x6dfddbcbed791babull, 0x6cce8ae13c57ebdbull,
    0x6ba27e656b4eb57aull, 0x6a79ad55e7f6fd10ull, 0x69540ec8f895722dull, 0x683199ed779592caull,
    0x6712460a8fc24072ull, 0x65f60a7f79393e2eull, 0x64dcdec3371793d1ull, 0x63c6ba6455dcd8aeull,
    0x62b39508aa836d6full, 0x61a3666d124bb204ull, 0x6096266533384a2bull, 0x5f8bccdb3d398841ull,
    0x5e8451cfac061b5full, 0x5d7fad59099f22feull, 0x5c7dd7a3b17dcf75ull, 0x5b7ec8f19468bbc9ull,
    0x5a827999fcef3242ull, 0x5988e20954889245ull, 0x5891fac0e95612c8ull, 0x579dbc56b48521baull,
    0x56ac1f752150a563ull, 0x55bd1cdad49f699cull, 0x54d0ad5a753e077cull, 0x53e6c9da74b29ab5ull,
    0x52ff6b54d8a89c75ull, 0x521a8ad704f3404full, 0x513821818624b40cull, 0x50582887dcb8a7e1ull,
    0x4f7a993048d088d7ull, 0x4e9f6cd3967fdba8ull, 0x4dc69cdceaa72a9cull, 0x4cf022c9905bfd32ull,
    0x4c1bf828c6dc54b8ull, 0x4b4a169b900c2d00ull, 0x4a7a77d47f7b84b1ull, 0x49ad159789f37496ull,
    0x48e1e9b9d588e19bull, 0x4818ee218a3358eeull, 0x47521cc5a2e6a9e0ull, 0x468d6fadbf2dd4f3ull,
    0x45cae0f1f545eb73ull, 0x450a6abaa4b77ecdull, 0x444c0740496d4294ull, 0x438fb0cb4f468808ull,
    0x42d561b3e6243d8aull, 0x421d1461d66f2023ull, 0x4166c34c5615d0ecull, 0x40b268f9de0183baull
};

struct Weights {
    float most;          // the largest logit
    float high, low;     // log2(e) / temperature as two floats
    int one_bits;        // the weight of the largest logit is 2^one_bits, at most 2^44
    const u64* table;    // EXP2_TABLE in fast memory

    // `high` and `low` in one word.
    __device__ __forceinline__ static u64 scale_of(float temperature) {
        double scale = 1.4426950408889634 / double(temperature);
        float high = float(scale), low = float(scale - double(high));
        return u64(__float_as_uint(high)) << 32 | __float_as_uint(low);
    }

    __device__ __forceinline__ u64 of(float x) const {
        if (x == most) return 1ull << one_bits;
        // most - x as d + rest, exactly (Knuth's two-sum).
        float d = __fsub_rn(most, x);
        float back = __fsub_rn(d, most);
        float rest = __fsub_rn(__fsub_rn(most, __fsub_rn(d, back)), __fadd_rn(x, back));
        float y = __fmul_rn(d, high);
        // Also what is not a number: infinite logits. Weights below 2^-44 are zero.
        if (!(y < 45.0f)) return 0;
        float z = __fmaf_rn(d, high, -y);
        z = __fmaf_rn(d, low, z);
        z = __fmaf_rn(rest, high, z);
        constexpr float POINT = 1099511627776.0f;   // 2^40
        long long fixed = __float2ll_rn(y * POINT) + __float2ll_rn(z * POINT);
        u64 exponent = fixed > 0 ? u64(fixed) : 0;
        int n = int(exponent >> 40);
        if (n > one_bits) return 0;
        u32 g = u32(exponent >> 2);                 // below 2^-6, in units of 2^-38
        u32 linear = __umulhi(g, 0xb17217f8u);      // g ln 2
        float f = float(linear) * 3.637978807091713e-12f;
        float curve = __fmaf_rn(f, __fmaf_rn(f, 0.041666667f, -0.16666667f), 0.5f);
        curve = __fmul_rn(__fmul_rn(f, f), curve);
        u64 factor = (1ull << 38) - linear + __float2uint_rn(curve * 274877906944.0f);
        u64 product = __umul64hi(table[u32(exponent >> 34) % EXP2_STEPS], factor << 25);
        return ((product >> (61 - one_bits + n)) + 1) >> 1;
    }
};
