// A warp's ring in shared memory: what it will read next is copied there while it works on what came
// before. The copy engine does it where there is one (compute capability 9.0 and up), else all lanes
// copy 16 bytes at a time.
//
// What goes through a ring are weights, which a step reads once and which are far more than L2 has room for.
// There they make room first, so that what every layer needs again is not lost between two layers: the
// kernels' code, small weights, tables.
#pragma once

#include "common/common.cuh"
#if __CUDA_ARCH__ >= 900
#include "common/bulk.cuh"
#endif

// SMALL: leaves room for other things, at more instructions for the same bytes.
template <bool SMALL>
struct Ring {
    // The large GPUs want 32 KB under way on each multiprocessor, and have the room.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
    static constexpr u32 SLOT = SMALL ? 2048 : 4096, SLOTS = SMALL ? 3 : 2;
#else
    static constexpr u32 SLOT = 1024, SLOTS = 2;
#endif
    // Bytes of shared memory for a warp: slots, and a barrier for each.
    static constexpr u32 BYTES = SLOTS * SLOT + 32;

    // Which slot, and in which turn through all of them.
    struct Place {
        u32 slot = 0, turn = 0;

        __device__ __forceinline__ void pass() {
            if (++slot == SLOTS) {
                slot = 0;
                turn ^= 1;
            }
        }
    };

    char* base;
    int lane;

    __device__ __forceinline__ Ring(char* base, int lane) : base(base), lane(lane) {}
    // By all lanes, before the first copy.
    __device__ __forceinline__ void begin() const {
#if __CUDA_ARCH__ >= 900
        if (lane < SLOTS) barrier_init(barrier(lane), 1);
        barrier_init_done();
        __syncwarp();
#endif
    }
#if __CUDA_ARCH__ >= 900
    __device__ __forceinline__ u32 barrier(u32 slot) const {
        return smem_address(base + SLOTS * SLOT) + 8 * slot;
    }
#endif
    // Starts a copy to a slot that nobody reads any more; `bytes` is a multiple of 16.
    __device__ __forceinline__ void copy(u32 slot, const char* from, u32 bytes) const {
        char* to = base + slot * SLOT;
#if __CUDA_ARCH__ >= 900
        if (elect()) {
            barrier_expect(barrier(slot), bytes);
            bulk_copy_once(smem_address(to), from, bytes, barrier(slot));
        }
#else
#pragma unroll 1
        for (u32 o = 16 * lane; o < bytes; o += 16 * WARP) cp_async_weights(to + o, from + o);
#endif
    }
    // After each slot's copy, and where there was none left to start.
    __device__ __forceinline__ void asked() const {
#if __CUDA_ARCH__ < 900
        cp_async_commit();
#endif
    }
    // Waits for a slot's copy; where its bytes are.
    __device__ __forceinline__ const char* wait(const Place& at) const {
#if __CUDA_ARCH__ >= 900
        barrier_wait(barrier(at.slot), at.turn);
#else
        cp_async_wait<SLOTS - 1>();
        __syncwarp();
#endif
        return base + at.slot * SLOT;
    }
};
