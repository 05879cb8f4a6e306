// exl_prepare_x: activations as the first operand of the 16-bit products.
//
// out[row, i] = x[row, perm[i]] rounded to binary16, what exceeds its range becoming the largest
// finite value. Moves 6 bytes an element (and 4 bytes of perm from L2); bound: memory.
//
// With a permutation a block takes whole rows: it reads a row in order, keeps it as binary16 in
// shared memory and gathers there, so that global memory sees only whole sectors. Rows that do not
// fit in shared memory are gathered from L2 by the other entry.

#include "common/common.cuh"

namespace {

__device__ __forceinline__ u32 pack(float a, float b) {
    return u32(__half_as_ushort(to_half_sat(a))) | u32(__half_as_ushort(to_half_sat(b))) << 16;
}

__device__ __forceinline__ float4 load_4(const float* from, int vectors) {
    if (vectors) return *reinterpret_cast<const float4*>(from);
    return make_float4(from[0], from[1], from[2], from[3]);
}

}  // namespace

// k is a multiple of 8, `out` is aligned to 16 bytes; `vectors`: so is x.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_prepare_x(const float* x, const u32* perm, __half* out, int rows, int k, int vectors) {
    pdl_launch();
    pdl_wait();
    const u32 each = u32(k) / 8;
    for (u32 row = blockIdx.y; row < u32(rows); row += gridDim.y) {
        const float* from = x + (long long)row * k;
        uint4* to = reinterpret_cast<uint4*>(out + (long long)row * k);
        for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < each; i += gridDim.x * blockDim.x) {
            float4 a, b;
            if (perm) {
                const u32* p = perm + 8 * i;
                a = make_float4(from[p[0]], from[p[1]], from[p[2]], from[p[3]]);
                b = make_float4(from[p[4]], from[p[5]], from[p[6]], from[p[7]]);
            } else {
                a = load_4(from + 8 * i, vectors);
                b = load_4(from + 8 * i + 4, vectors);
            }
            to[i] = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        }
    }
}

// As above with a permutation; 2 k bytes of shared memory.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_prepare_x_staged(const float* x, const u32* perm, __half* out, int rows, int k,
                         int vectors) {
    extern __shared__ __align__(16) char shared[];
    pdl_launch();
    pdl_wait();
    const u16* row_at = reinterpret_cast<const u16*>(shared);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const float* from = x + (long long)row * k;
        uint4* to = reinterpret_cast<uint4*>(out + (long long)row * k);
        __syncthreads();   // the row before has been read
        for (int i = threadIdx.x; i < k / 4; i += blockDim.x) {
            float4 v = load_4(from + 4 * i, vectors);
            reinterpret_cast<uint2*>(shared)[i] = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < k / 8; i += blockDim.x) {
            u32 v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 low = row_at[perm[8 * i + 2 * j]], high = row_at[perm[8 * i + 2 * j + 1]];
                v[j] = low | high << 16;
            }
            to[i] = make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}
