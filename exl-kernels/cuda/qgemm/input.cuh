// The input of the products of few rows: x rounded to 16-bit integers with one scale for each row and
// chunk of 128 packed columns, split into two signed bytes.
#pragma once

#include "common/common.cuh"

constexpr int X_CHUNK_BLOCKS = 4;   // blocks that share a scale of x: 128 columns
constexpr int X_ROW = 64;           // bytes of a row of x in a block: 32 high, 32 low

__device__ __forceinline__ int round_16(int bytes) { return (bytes + 15) & ~15; }

// Rounded x of `rows` rows: bytes [blocks][rows][2][32], the high bytes of a row before its low
// ones; scales [chunks][rows]; sums [blocks][rows]. Each array is padded to 16 bytes.
struct XBytes {
    int scales, sums, all;

    __device__ __forceinline__ XBytes(int rows, int inputs)
        : XBytes(inputs / 32 * rows * X_ROW, rows, inputs) {}
    // When the bytes take so much room.
    __device__ __forceinline__ XBytes(int bytes, int rows, int inputs) {
        int blocks = inputs / 32, chunks = (inputs + 127) / 128;
        scales = bytes;
        sums = scales + round_16(4 * chunks * rows);
        all = sums + round_16(4 * blocks * rows);
    }
};

// What `quantize_chunk` makes of four values of a lane: packed column 4 lane + i of the chunk.
struct Quantized {
    float scale;
    u32 high, low;   // four bytes each
    int sum;
};

// 1 / x within a unit in the last place, by one instruction.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One warp rounds up to 128 values to 16-bit integers with a common scale. Values beyond the input
// are 0. Anything that is not finite makes the scale so. Every thread block of a product does this for
// all of x, so instructions count here.
__device__ __forceinline__ Quantized quantize_chunk(const float (&v)[4]) {
    // Magnitudes are ordered like their bits, and what is not finite is above all.
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffffu);
    bits = __reduce_max_sync(FULL_MASK, bits);
    const float most = __uint_as_float(bits);
    Quantized q;
    // 127 * 256 + 127: what the two bytes can hold on both sides of 0.
    q.scale = most * (1.0f / 32639.0f);
    float inverse = 32639.0f * reciprocal(most);
    if (most < 1e-30f) inverse = q.scale = 0.0f;   // its inverse might overflow: as good as 0
    if (bits >= 0x7f800000u) q.scale = __int_as_float(0x7fc00000);
    // The sum with 1.5 2^23 has the rounded integer in its low bits.
    u32 n[4], above[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        n[i] = __float_as_uint(fmaf(v[i], inverse, 12582912.0f));
        above[i] = n[i] + 128;
    }
    q.low = __byte_perm(__byte_perm(n[0], n[1], 0x0040), __byte_perm(n[2], n[3], 0x0040), 0x5410);
    q.high = __byte_perm(__byte_perm(above[0], above[1], 0x0051),
                         __byte_perm(above[2], above[3], 0x0051), 0x5410);
    q.sum = int(n[0] + n[1] + n[2] + n[3] - 4u * 0x4b400000u);
    return q;
}

// Features of packed columns k..k+3.
__device__ __forceinline__ uint4 features(const u32* perm, int k, int inputs) {
    if (perm && k < inputs) return *reinterpret_cast<const uint4*>(perm + k);
    return make_uint4(k, k + 1, k + 2, k + 3);
}

__device__ __forceinline__ void gather(float (&v)[4], const float* x, uint4 p, int k, int inputs) {
    v[0] = k < inputs ? x[p.x] : 0.0f;
    v[1] = k < inputs ? x[p.y] : 0.0f;
    v[2] = k < inputs ? x[p.z] : 0.0f;
    v[3] = k < inputs ? x[p.w] : 0.0f;
}

// Sum over the eight lanes that share a block of 32 columns.
__device__ __forceinline__ int block_sum(int v) {
    v += __shfl_xor_sync(FULL_MASK, v, 1);
    v += __shfl_xor_sync(FULL_MASK, v, 2);
    return v + __shfl_xor_sync(FULL_MASK, v, 4);
}

// One row of x: the thread block puts it into shared memory in packed order, then rounds it in place:
// bytes [blocks][2][32] where the first half of the floats was, scales [chunks], and with SUMS sums
// [blocks].
constexpr int ROW_CHUNK = 512;   // bytes of the floats of a chunk

// ROUNDS: loads of a thread that overlap, and chunks of a warp. KEEPS: what it loads of x lies in registers
// until places are known.
template <int ROUNDS, bool KEEPS>
struct RowStage {
    static constexpr int LOADS = ROUNDS;

    int inputs;
    uint4 first[ROUNDS];   // places of the first features, known before x is
    float4 values[KEEPS ? ROUNDS : 1];

    __device__ __forceinline__ int feature(int round) const {
        return 4 * (threadIdx.x + round * blockDim.x);
    }
    // Whether any thread has features in a round.
    __device__ __forceinline__ bool any(int round) const {
        return 4 * round * int(blockDim.x) < inputs;
    }
    __device__ __forceinline__ uint4 places(const u32* inverse, int i) const {
        return features(inverse, i, inputs);
    }
    // `perm`: of a matrix (QMatrix::perm).
    __device__ __forceinline__ void prepare(const u32* perm) {
        const u32* inverse = perm ? perm + inputs : nullptr;
#pragma unroll
        for (int r = 0; r < ROUNDS && any(r); ++r) first[r] = places(inverse, feature(r));
        if (!inverse) return;
        for (int r = ROUNDS; feature(r) < inputs; ++r) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(inverse + feature(r)));
        }
    }
    __device__ __forceinline__ float4 value(const float* x, int i) const {
        return i < inputs ? *reinterpret_cast<const float4*>(x + i) : float4{};
    }
    // KEEPS: as soon as x is there.
    __device__ __forceinline__ void load(const float* x) {
#pragma unroll
        for (int r = 0; r < ROUNDS && any(r); ++r) values[r] = value(x, feature(r));
    }
    __device__ __forceinline__ void gather(const float* x, const u32* perm, float* to) const {
        const u32* inverse = perm ? perm + inputs : nullptr;
        for (int base = 0; any(base); base += ROUNDS) {
            float4 v[ROUNDS];
            uint4 at[ROUNDS];
#pragma unroll
            for (int r = 0; r < ROUNDS && any(base + r); ++r) {
                const int i = feature(base + r);
                v[r] = KEEPS && base == 0 ? values[r] : value(x, i);
                at[r] = base == 0 ? first[r] : places(inverse, i);
            }
#pragma unroll
            for (int r = 0; r < ROUNDS && any(base + r); ++r) {
                if (feature(base + r) >= inputs) break;
                to[at[r].x] = v[r].x;
                to[at[r].y] = v[r].y;
                to[at[r].z] = v[r].z;
                to[at[r].w] = v[r].w;
            }
        }
    }
    // By the whole block, after a barrier; another one must follow. `from`: packed columns, which may lie where the
    // result will; `loaded()` is called when the first ones have been loaded.
    template <bool SUMS, bool IN_PLACE, class Loaded>
    __device__ __forceinline__ void round(const float* from, float* at, float* scales, int* sums,
                                          const Loaded& loaded) const {
        const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
        const int chunks = (inputs + 127) / 128;
        for (int base = 0; base < chunks; base += ROUNDS * warps) {
            float4 v[ROUNDS];
#pragma unroll
            for (int r = 0; r < ROUNDS; ++r) {
                const int k = 128 * (base + r * warps + warp) + 4 * lane;
                v[r] = k < inputs ? *reinterpret_cast<const float4*>(from + k) : float4{};
            }
            if (base == 0) loaded();
            // What is written lies before what is read later, on what has been read by now.
            if (IN_PLACE) __syncthreads();
#pragma unroll
            for (int r = 0; r < ROUNDS && base + r * warps < chunks; ++r) {
                const int chunk = base + r * warps + warp, k = 128 * chunk + 4 * lane;
                const Quantized q = quantize_chunk({v[r].x, v[r].y, v[r].z, v[r].w});
                const int sum = SUMS ? block_sum(q.sum) : 0;
                if (k >= inputs) continue;
                char* to = reinterpret_cast<char*>(at) + k / 32 * X_ROW + lane % 8 * 4;
                *reinterpret_cast<u32*>(to) = q.high;
                *reinterpret_cast<u32*>(to + 32) = q.low;
                if (lane == 0) scales[chunk] = q.scale;
                if (SUMS && lane % 8 == 0) sums[k / 32] = sum;
            }
        }
    }
};
