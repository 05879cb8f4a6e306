// Products by warpgroups: four warps multiply 64 rows with operands in shared memory. sm_90a only.
#pragma once

#include "common/common.cuh"

// Describes an operand of 128-byte rows with the 128-byte swizzle: groups of 8 rows lie 1024 bytes
// apart. 16 columns further is 32 bytes further, 2 in the descriptor.
__device__ __forceinline__ u64 operand(u32 address) {
    const u64 rows_8 = 1024 >> 4, swizzle_128 = 1;
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | rows_8 << 32 | swizzle_128 << 62;
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

// d += a b: 64 rows of a, 128 rows of b, 16 columns of both, in shared memory. `keep` 0: d = a b.
__device__ __forceinline__ void wgmma(float (&d)[16][4], u64 a, u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}"
        : D4(d, 0), D4(d, 1), D4(d, 2), D4(d, 3), D4(d, 4), D4(d, 5),
          D4(d, 6), D4(d, 7), D4(d, 8), D4(d, 9), D4(d, 10), D4(d, 11),
          D4(d, 12), D4(d, 13), D4(d, 14), D4(d, 15)
        : "l"(a), "l"(b), "r"(keep));
}

// d += a b: 64 rows of a, 256 rows of b, 16 columns of both, in shared memory. `keep` 0: d = a b.
__device__ __forceinline__ void wgmma(float (&d)[32][4], u64 a, u64 b, int keep) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, "
        "%88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, "
        "%104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, "
        "%120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, 0, 0;\n"
        "}"
        : D4(d, 0), D4(d, 1), D4(d, 2), D4(d, 3), D4(d, 4), D4(d, 5),
          D4(d, 6), D4(d, 7), D4(d, 8), D4(d, 9), D4(d, 10), D4(d, 11),
          D4(d, 12), D4(d, 13), D4(d, 14), D4(d, 15), D4(d, 16), D4(d, 17),
          D4(d, 18), D4(d, 19), D4(d, 20), D4(d, 21), D4(d, 22), D4(d, 23),
          D4(d, 24), D4(d, 25), D4(d, 26), D4(d, 27), D4(d, 28), D4(d, 29),
          D4(d, 30), D4(d, 31)
        : "l"(a), "l"(b), "r"(keep));
}

#undef D4
