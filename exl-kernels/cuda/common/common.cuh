// The vocabulary that kernels share: integer names, loads, conversions, reductions, mma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/pdl.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;
// Tokens in a page of the KV cache (ops.rs: PAGE_TOKENS).
constexpr int PAGE_TOKENS = 256;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ __half2 as_half2(u32 v) { return *reinterpret_cast<__half2*>(&v); }
__device__ __forceinline__ u32 as_u32(__half2 v) { return *reinterpret_cast<u32*>(&v); }
// (a & mask) | b
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

// Nearest 16-bit float; what lies beyond its range becomes the largest finite value, NaN stays.
__device__ __forceinline__ __half to_half_sat(float v) {
    u16 h;
    float c = v > 65504.0f ? 65504.0f : (v < -65504.0f ? -65504.0f : v);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(c));
    return __ushort_as_half(h);
}

// The same in all lanes, and known to be.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(FULL_MASK, v, 0); }
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) v += __shfl_xor_sync(FULL_MASK, v, d);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, d));
    return v;
}

__device__ __forceinline__ u32 smem_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void cp_async_16(void* smem, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)),
                 "l"(global));
}
// For what is read once, in order: the lines that follow come to L2 with it.
__device__ __forceinline__ void cp_async_weights(void* smem, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(smem_address(smem)),
                 "l"(global));
}
__device__ __forceinline__ void cp_async_8(void* smem, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(smem_address(smem)), "l"(global));
}
__device__ __forceinline__ void cp_async_4(void* smem, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(smem)), "l"(global));
}
// Copies `bytes` (0..16) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void cp_async_16_zfill(u32 smem, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global),
                 "r"(bytes));
}
__device__ __forceinline__ void cp_async_16_zfill(void* smem, const void* global, int bytes) {
    cp_async_16_zfill(smem_address(smem), global, bytes);
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

// d += a b: m16n8k16, fp16 operands, fp32 accumulators. Fragment layouts: PTX ISA, "Matrix
// fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b: m16n8k32, signed 8-bit operands, 32-bit integer accumulators.
__device__ __forceinline__ void mma_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                       u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
