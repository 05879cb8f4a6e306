// Scales and zero points of a lane's columns.
#pragma once

#include "qgemm/tile.cuh"

// What a lane reads for a piece of a column tile; and BYTES in shared memory where the whole tile's
// lie. `place` is column tile * pieces.
template <int KIND>
struct ScaleCodes;

template <>
struct ScaleCodes<KIND_EXL2> {
    static constexpr int BYTES = 32;   // codes [8], base

    u16 codes;   // of columns g + 8 i at bit 4 i
    u16 base;

    __device__ __forceinline__ static ScaleCodes at(const char* shared, int g) {
        return {reinterpret_cast<const u16*>(shared)[g], reinterpret_cast<const u16*>(shared)[8]};
    }
    __device__ __forceinline__ static ScaleCodes of(const QMatrix& m, u32 place, int piece, int g) {
        return {m.codes[u64(place + piece) * 8 + g], m.bases[2 * piece]};
    }
    __device__ __forceinline__ static void load(char* shared, const QMatrix& m, u32 place, int piece,
                                                int lane) {
        if (lane == 0) cp_async_16(shared, m.codes + u64(place + piece) * 8);
        if (lane == 1) cp_async_4(shared + 16, m.bases + 2 * piece);
    }
};

template <>
struct ScaleCodes<KIND_GPTQ> {
    static constexpr int BYTES = 128;   // scales [8][4], shifts [8][4]

    uint2 scales, shifts;   // four 16-bit values each

    __device__ __forceinline__ static ScaleCodes at(const char* shared, int g) {
        const uint2* all = reinterpret_cast<const uint2*>(shared);
        return {all[g], all[8 + g]};
    }
    __device__ __forceinline__ static ScaleCodes of(const QMatrix& m, u32 place, int piece, int g) {
        const u64 i = u64(place + piece) * 8 + g;
        return {reinterpret_cast<const uint2*>(m.codes)[i], reinterpret_cast<const uint2*>(m.bases)[i]};
    }
    __device__ __forceinline__ static void load(char* shared, const QMatrix& m, u32 place, int piece,
                                                int lane) {
        const u64 first = u64(place + piece) * 32;
        if (lane < 8) {
            cp_async_16(shared + 16 * lane, (lane < 4 ? m.codes : m.bases) + first + lane % 4 * 8);
        }
    }
};

// Of columns g, g+8, g+16, g+24 of a piece: the scale, and for GPTQ what must be added to codes that
// are centred at 8.
template <int KIND>
struct Scales {
    float s[4];
    int shift[4];

    __device__ __forceinline__ explicit Scales(const ScaleCodes<KIND>& from) {
        if constexpr (KIND == KIND_EXL2) {
            u32 c = from.codes;
            __half2 base = __half2half2(__ushort_as_half(from.base));
            // Two codes per register: nibbles 0 and 1, then 2 and 3.
            const __half2 less = __float2half2_rn(-1023.0f);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                __half2 root = __hadd2(as_half2(and_or(c | c << 12, 0x000f000fu, MAGIC)), less);
                // The file's rule: the product is rounded to 16 bits (decode.rs: scale_table).
                float2 f = __half22float2(__hmul2(__hmul2(root, root), base));
                s[2 * i] = f.x;
                s[2 * i + 1] = f.y;
                c >>= 8;
            }
        } else {
            float2 low = __half22float2(as_half2(from.scales.x));
            float2 high = __half22float2(as_half2(from.scales.y));
            s[0] = low.x;
            s[1] = low.y;
            s[2] = high.x;
            s[3] = high.y;
            shift[0] = short(from.shifts.x);
            shift[1] = short(from.shifts.x >> 16);
            shift[2] = short(from.shifts.y);
            shift[3] = short(from.shifts.y >> 16);
        }
    }
};
