// exl_qgemm_row1_*: products of one row with quantized matrices, at the speed of the memory.
//
// exl: spills-allowed exl_qgemm_row1_gptq between column tiles, not in the loop over weights
//
// What: up to three matrices with one input (q, k, v), or gate and up with the activation between
// them. Reads every packed weight once: K N bits / 8 bytes, plus scale codes (1/32 byte per weight
// and group of 128). Expected bound: memory; 1.2 to 1.6 instructions for a lane's share of 32 weights.
//
// Numbers: those of decode.cu, whose sums come in another order (row_walk.cuh): a row's result is the
// same to the bit in every call of this kernel, but not in products of several rows.

#include "qgemm/row.cuh"

namespace {

template <int KIND>
__device__ __forceinline__ void qgemm(const Task& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    RowProduct<KIND, Task> product(task, task.slots, task.inputs, shared);
    // The thread block's tiles are consecutive, so that most belong to one matrix.
    product.run(Turn::of(blockIdx.x, task.tiles, task.each, gridDim.x), true);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_exl2(const __grid_constant__ Task task) {
    qgemm<KIND_EXL2>(task);
}
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_gptq(const __grid_constant__ Task task) {
    qgemm<KIND_GPTQ>(task);
}
