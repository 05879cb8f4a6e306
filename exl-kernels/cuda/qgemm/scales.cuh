// Scales and zero points of a lane's columns.
#pragma once

#include "qgemm/tile.cuh"

// Where the bases and the codes of one column tile are: shared or global memory.
struct Staged {
    const u16* bases;
    const u16* codes;
};

// Of columns g, g+8, g+16, g+24 of a piece: the scale, and for GPTQ what must be added to codes that
// are centred at 8.
template <int KIND>
struct Scales {
    float s[4];
    int shift[4];

    __device__ __forceinline__ void load(const Staged& st, int piece, int g) {
        if constexpr (KIND == KIND_EXL2) {
            u32 c = st.codes[piece * 8 + g];
            __half2 base = __half2half2(__ushort_as_half(st.bases[piece]));
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
            uint2 c = *reinterpret_cast<const uint2*>(st.codes + (piece * 8 + g) * 4);
            uint2 z = *reinterpret_cast<const uint2*>(st.bases + (piece * 8 + g) * 4);
            float2 low = __half22float2(as_half2(c.x)), high = __half22float2(as_half2(c.y));
            s[0] = low.x;
            s[1] = low.y;
            s[2] = high.x;
            s[3] = high.y;
            shift[0] = short(z.x);
            shift[1] = short(z.x >> 16);
            shift[2] = short(z.y);
            shift[3] = short(z.y >> 16);
        }
    }
};
