// exl_moe_row1_*: products of one row with its experts' quantized matrices, at the speed of the memory.
//
// exl: spills-allowed exl_moe_row1_exl2 on 8.x, before the loop over weights
// exl: spills-allowed exl_moe_row1_gptq before the loop over weights, and behind it
// exl: spills-allowed exl_moe_row1_add_exl2 before the loop over weights
// exl: spills-allowed exl_moe_row1_add_split_exl2 before the loop over weights
//
// What: gate and up with the activation between them, or down with the weighted sum of the experts'
// outputs and the residual. Reads the packed weights of the row's experts and no others; which ones is
// known on the GPU alone. Expected bound: memory, as qgemm/row.cu, whose arithmetic this is.
//
// A thread block has column tiles of one of the row's experts: it looks up the matrices in device
// memory, then goes on as a block of qgemm/row.cu. Nothing of the weights can be asked for before it is known
// which expert's they are, so that must not take long: where experts are few, all descriptors are in shared
// memory by then; and down, which comes behind gate and up, knows the experts before it has its input. Its
// input is long, so four blocks divide the rows of the same columns, each with the part of the input that it
// needs.

#include "moe/task.cuh"
#include "qgemm/row.cuh"

namespace {

// Asks for the permutations of all experts, which are known sooner than the experts of the row.
__device__ __forceinline__ void prefetch_permutations(const ExpertsTask& task, const Experts& experts) {
    const int lines = task.inputs / WARP;   // of 128 bytes
    for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < task.experts * lines;
         i += gridDim.x * blockDim.x) {
        const QMatrix& m = experts.staged[i / lines * experts.parts];
        // Their inverses, behind them, are what gathers x.
        if (m.perm) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(m.perm + task.inputs + i % lines * WARP));
        }
    }
}

// Copies all descriptors to shared memory. By the whole block.
__device__ __forceinline__ Experts stage_descriptors(const ExpertsTask& task, char* to) {
    constexpr int WORDS = sizeof(QMatrix) / 8;
    const int parts = task.gated ? 2 : 1;
    u64* all = reinterpret_cast<u64*>(to);
    for (int i = threadIdx.x; i < task.experts * parts * WORDS; i += blockDim.x) {
        const QMatrix* from = task.table[i / WORDS];
        all[i] = from ? reinterpret_cast<const u64*>(from)[i % WORDS] : 0;
    }
    __syncthreads();
    return {task.table, reinterpret_cast<const QMatrix*>(to), parts};
}

template <int KIND, bool ADDS, int SPLIT>
__device__ __forceinline__ void row(const ExpertsTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<ADDS, SPLIT> Own;
    if (ADDS) pdl_launch();
    Own& own = *reinterpret_cast<Own*>(shared);
    Experts experts = {task.table, nullptr, task.gated ? 2 : 1};
    if (task.staged) {
        experts = stage_descriptors(task, shared + TASK_BYTES);
        if (!ADDS) prefetch_permutations(task, experts);
    } else {
        task.prefetch_descriptors();
    }
    // As many blocks for every expert.
    const int each = gridDim.x / (task.segments * SPLIT), group = blockIdx.x / each;
    const int s = group / SPLIT, rank = group % SPLIT;
    const Share share = Share::even(blockIdx.x % each, task.columns, each);
    if (!task.early) pdl_wait();
    // What follows gate and up may rely on the ids: they were there before it could begin.
    if (!ADDS) pdl_launch();
    const int expert = __ldcg(task.ids + s);
    if (own.take(task, {expert, s, 1, 0, 1}, experts, rank)) {
#if __CUDA_ARCH__ >= 900
        shared_written();   // the rings will be where descriptors were
#endif
        __syncthreads();
        const int held = SPLIT > 1 ? task.held : task.inputs;
        RowProduct<KIND, Own> product(own, task.slots, task.inputs, held, shared + TASK_BYTES);
        product.run({share.from, share.to}, true);
    } else if (ADDS) {
        // No expert: the output shows it.
        pdl_wait();
        for (int tile = share.from + threadIdx.x / WARP; tile < share.to; tile += ROW_WARPS) {
            add_segments<SPLIT>(task, group, tile, threadIdx.x % WARP, __int_as_float(0x7fc00000));
        }
    }
}

}  // namespace

#define ENTRY(NAME, KIND, ADDS, SPLIT)                                                             \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)                              \
        NAME(const __grid_constant__ ExpertsTask task) {                                          \
        row<KIND, ADDS, SPLIT>(task);                                                             \
    }
ENTRY(exl_moe_row1_exl2, KIND_EXL2, false, 1)
ENTRY(exl_moe_row1_gptq, KIND_GPTQ, false, 1)
ENTRY(exl_moe_row1_add_exl2, KIND_EXL2, true, 1)
ENTRY(exl_moe_row1_add_split_exl2, KIND_EXL2, true, 4)
