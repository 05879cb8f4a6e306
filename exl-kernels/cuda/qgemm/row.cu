// exl_qgemm_row1_*: products of one row with quantized matrices, at the speed of the memory.
//
// exl: spills-allowed exl_qgemm_row1_exl2 between column tiles, not in the loop over weights
// exl: spills-allowed exl_qgemm_row1_gptq between column tiles, not in the loop over weights
//
// What: up to three matrices with one input (q, k, v), or gate and up with the activation between
// them. Reads every packed weight once: K N bits / 8 bytes, plus scale codes (1/32 byte per weight
// and group of 128). Expected bound: memory, with 19 to 25 instructions for 1024 weights in the loop over
// them, and some 150 for a column tile and share of the rows.
//
// Numbers: those of decode.cu, whose sums come in another order (row_walk.cuh): a row's result is the
// same to the bit in every call of this kernel, but not in products of several rows.

#include "qgemm/row.cuh"

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_exl2(const __grid_constant__ Task task) {
    multiply_row<KIND_EXL2, Ring<false>>(task);
}
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_ordered_exl2(const __grid_constant__ OrderedTask task) {
    multiply_row<KIND_EXL2, Ring<false>>(task);
}
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_gptq(const __grid_constant__ Task task) {
    multiply_row<KIND_GPTQ, Ring<false>>(task);
}
