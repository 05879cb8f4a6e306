// exl_qgemm_row1_long_*: products of one row that is so long that large rings find no room beside it.
//
// exl: arch sm_90a, sm_100
// exl: spills-allowed exl_qgemm_row1_long_exl2 between column tiles, not in the loop over weights
// exl: spills-allowed exl_qgemm_row1_long_gptq between column tiles, not in the loop over weights
//
// What and how: row.cu.

#include "qgemm/row.cuh"

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_long_exl2(const __grid_constant__ Task task) {
    multiply_row<KIND_EXL2, Ring<true>>(task);
}
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_qgemm_row1_long_gptq(const __grid_constant__ Task task) {
    multiply_row<KIND_GPTQ, Ring<true>>(task);
}
