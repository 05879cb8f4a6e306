// exl_prepare_x: activations as the first operand of the 16-bit products.
//
// out[row, i] = x[row, perm[i]] rounded to binary16, what exceeds its range becoming the largest
// finite value. Moves 6 bytes an element (and 4 bytes of perm from L2); bound: memory.
//
// Row-major, or in blocks (blocked.cuh) of which the last ones are filled with zeros.
//
// With a permutation a block takes whole rows: it reads a row in order, keeps it as binary16 in
// shared memory and gathers there, so that global memory sees only whole sectors. Rows that do not
// fit in shared memory are gathered from L2 by the other entry.

#include "gemm/blocked.cuh"

namespace {

__device__ __forceinline__ u32 pack(float a, float b) {
    return u32(__half_as_ushort(to_half_sat(a))) | u32(__half_as_ushort(to_half_sat(b))) << 16;
}

__device__ __forceinline__ float4 load_4(const float* from, int vectors) {
    if (vectors) return *reinterpret_cast<const float4*>(from);
    return make_float4(from[0], from[1], from[2], from[3]);
}

// The result: row-major when `blocks_k` is 0.
struct Result {
    char* at;
    int rows, k, blocks_k;

    __device__ __forceinline__ int padded_rows() const {
        return blocks_k ? (rows + BLOCK - 1) / BLOCK * BLOCK : rows;
    }
    __device__ __forceinline__ int padded_k() const { return blocks_k ? blocks_k * BLOCK : k; }
    // Puts 8 elements from column `from` on.
    __device__ __forceinline__ void put(int row, int from, uint4 v) const {
        const long long offset =
            blocks_k ? blocked_at(row, from, blocks_k) : 2 * ((long long)row * k + from);
        *reinterpret_cast<uint4*>(at + offset) = v;
    }
};

}  // namespace

// k is a multiple of 8, `perm` and `out` are aligned to 16 bytes; `vectors`: so is x.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_prepare_x(const float* x, const u32* perm, char* out, int rows, int k, int vectors,
                  int blocks_k) {
    pdl_launch();
    pdl_wait();
    const Result result = {out, rows, k, blocks_k};
    const int each = result.padded_k() / 8;
    for (int row = blockIdx.y; row < result.padded_rows(); row += gridDim.y) {
        const float* from = x + (long long)row * k;
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < each; i += gridDim.x * blockDim.x) {
            if (row >= rows || 8 * i >= k) {
                result.put(row, 8 * i, make_uint4(0, 0, 0, 0));
                continue;
            }
            float4 a, b;
            if (perm) {
                const uint4* p = reinterpret_cast<const uint4*>(perm + 8 * i);
                const uint4 low = p[0], high = p[1];
                a = make_float4(from[low.x], from[low.y], from[low.z], from[low.w]);
                b = make_float4(from[high.x], from[high.y], from[high.z], from[high.w]);
            } else {
                a = load_4(from + 8 * i, vectors);
                b = load_4(from + 8 * i + 4, vectors);
            }
            result.put(row, 8 * i,
                       make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w)));
        }
    }
}

// As above with a permutation; 2 k bytes of shared memory.
extern "C" __global__ void __launch_bounds__(256, 4)
    exl_prepare_x_staged(const float* x, const u32* perm, char* out, int rows, int k, int vectors,
                         int blocks_k) {
    extern __shared__ __align__(16) char shared[];
    pdl_launch();
    pdl_wait();
    const Result result = {out, rows, k, blocks_k};
    const u16* row_at = reinterpret_cast<const u16*>(shared);
    for (int row = blockIdx.x; row < result.padded_rows(); row += gridDim.x) {
        const float* from = x + (long long)row * k;
        __syncthreads();   // the row before has been read
        for (int i = threadIdx.x; row < rows && i < k / 4; i += blockDim.x) {
            float4 v = load_4(from + 4 * i, vectors);
            reinterpret_cast<uint2*>(shared)[i] = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < result.padded_k() / 8; i += blockDim.x) {
            u32 v[4] = {};
            if (row < rows && 8 * i < k) {
                const uint4* p = reinterpret_cast<const uint4*>(perm + 8 * i);
                const uint4 low = p[0], high = p[1];
                v[0] = row_at[low.x] | row_at[low.y] << 16;
                v[1] = row_at[low.z] | row_at[low.w] << 16;
                v[2] = row_at[high.x] | row_at[high.y] << 16;
                v[3] = row_at[high.z] | row_at[high.w] << 16;
            }
            result.put(row, 8 * i, make_uint4(v[0], v[1], v[2], v[3]));
        }
    }
}
