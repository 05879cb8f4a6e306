// exl_moe_row1_*: products of one row with its experts' quantized matrices, at the speed of the memory.
//
// What: gate and up with the activation between them, or down with the weighted sum of the experts'
// outputs and the residual. Reads the packed weights of the row's experts and no others; which ones is
// known on the GPU alone. Expected bound: memory, as qgemm/row.cu, whose arithmetic this is.
//
// A thread block has column tiles of one of the row's experts: it looks up the matrices in device
// memory, then goes on as a block of qgemm/row.cu.

#include "moe/task.cuh"
#include "qgemm/row.cuh"

namespace {

template <int KIND, bool ADDS>
__device__ __forceinline__ void row(const ExpertsTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<ADDS> Own;
    pdl_launch();
    Own& own = *reinterpret_cast<Own*>(shared);
    task.prefetch_descriptors();
    // As many blocks for every expert.
    const int each = gridDim.x / task.segments, s = blockIdx.x / each;
    const Share share = Share::even(blockIdx.x % each, task.columns, each);
    pdl_wait();
    if (own.take(task, {task.ids[s], s, 1, 0, 1})) {
        __syncthreads();
        RowProduct<KIND, Own> product(own, task.slots, task.inputs, shared + TASK_BYTES);
        product.run({share.from, share.to}, true);
    } else if (ADDS) {
        // No expert: the output shows it.
        for (int tile = share.from + threadIdx.x / WARP; tile < share.to; tile += ROW_WARPS) {
            add_segments(task, s, tile, threadIdx.x % WARP, __int_as_float(0x7fc00000));
        }
    }
}

}  // namespace

#define ENTRY(NAME, KIND, ADDS)                                                                   \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)                              \
        NAME(const __grid_constant__ ExpertsTask task) {                                          \
        row<KIND, ADDS>(task);                                                                    \
    }
ENTRY(exl_moe_row1_exl2, KIND_EXL2, false)
ENTRY(exl_moe_row1_gptq, KIND_GPTQ, false)
ENTRY(exl_moe_row1_add_exl2, KIND_EXL2, true)
