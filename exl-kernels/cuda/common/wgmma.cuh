// Products by warpgroups: four warps multiply 64 rows with operands in shared memory, the first one in
// registers where wanted. sm_90a only.
#pragma once

#include "common/common.cuh"

constexpr int GROUP = 128;   // threads of a warpgroup

// Waits for the other threads of warpgroup `group` of the block.
__device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP) : "memory");
}

// Describes an operand of 128-byte rows with the 128-byte swizzle: groups of 8 rows lie 1024 bytes
// apart. 16 columns further is 32 bytes further, 2 in the descriptor.
__device__ __forceinline__ u64 operand(u32 address) {
    const u64 rows_8 = 1024 >> 4, swizzle_128 = 1;
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | rows_8 << 32 | swizzle_128 << 62;
}

// Describes a second operand that lies as rows of 64 values each, further columns `panel` bytes apart,
// so that what is summed over goes from row to row, with the same swizzle. 16 rows further is 2048
// bytes further, 128 in the descriptor.
__device__ __forceinline__ u64 operand_across(u32 address, u32 panel) {
    const u64 rows_8 = 1024 >> 4, swizzle_128 = 1;
    return u64((address & 0x3ffff) >> 4) | u64(panel >> 4) << 16 | rows_8 << 32 | swizzle_128 << 62;
}

// Registers and shared memory are in order before the first product of a batch.
__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N batches are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D32(d, i)                                                                       \
    D4(d, i), D4(d, i + 1), D4(d, i + 2), D4(d, i + 3), D4(d, i + 4), D4(d, i + 5), D4(d, i + 6), \
        D4(d, i + 7)
// Names of the first 32, 64, 128 arguments.
#define R32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 \
    R32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R128 \
    R64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d += a b^T: 64 rows of a, 8 for each entry of d rows of b, 16 columns of both, in shared memory.
// `keep` 0: d = a b^T. Lane 4g + t of warp w has rows 16 w + g and + 8, columns 8 j + 2 t and + 1 at d[j].
__device__ __forceinline__ void wgmma(float (&d)[8][4], u64 a, u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" R32 "}, "
        "%32, %33, p, 1, 1, 0, 0;\n"
        "}"
        : D32(d, 0)
        : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void wgmma(float (&d)[16][4], u64 a, u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" R64 "}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}"
        : D32(d, 0), D32(d, 8)
        : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void wgmma(float (&d)[32][4], u64 a, u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" R128 "}, "
        "%128, %129, p, 1, 1, 0, 0;\n"
        "}"
        : D32(d, 0), D32(d, 8), D32(d, 16), D32(d, 24)
        : "l"(a), "l"(b), "r"(keep));
}

// d += a b^T: as above with 64 rows of a in registers: each warp has 16 rows as those of mma.m16n8k16.
__device__ __forceinline__ void wgmma(float (&d)[8][4], const u32 (&a)[4], u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" R32 "}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
        "}"
        : D32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
__device__ __forceinline__ void wgmma(float (&d)[16][4], const u32 (&a)[4], u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" R64 "}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n"
        "}"
        : D32(d, 0), D32(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}

// d += a b: 64 rows of a in registers, as d but of 16-bit pairs, and 16 rows of b (operand_across).
__device__ __forceinline__ void wgmma_across(float (&d)[8][4], const u32 (&a)[4], u64 b,
                                             int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" R32 "}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n"
        "}"
        : D32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
__device__ __forceinline__ void wgmma_across(float (&d)[16][4], const u32 (&a)[4], u64 b,
                                             int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" R64 "}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n"
        "}"
        : D32(d, 0), D32(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
__device__ __forceinline__ void wgmma_across(float (&d)[32][4], const u32 (&a)[4], u64 b,
                                             int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" R128 "}, "
        "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n"
        "}"
        : D32(d, 0), D32(d, 8), D32(d, 16), D32(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}

#undef R128
#undef R64
#undef R32
#undef D32
#undef D4
