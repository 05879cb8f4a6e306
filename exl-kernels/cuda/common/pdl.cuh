// Programmatic dependent launch: a kernel may start while the one before it still runs.
//
// pdl_wait() returns when every earlier kernel of the stream has finished and its writes are
// visible: each of them must call it too, in at least one thread. pdl_launch() lets the next kernel
// start as soon as all blocks of this one have called it or ended. Both do nothing before compute
// capability 9.0, where launches do not overlap.
#pragma once

__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}
