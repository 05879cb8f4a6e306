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
// memory by then, and x is loaded as soon as they are known; and down, which comes behind gate and up, knows the
// experts before it has its input. Its input is long, so four blocks divide the rows of the same columns, each
// with the part of the input that it needs. Behind gate and up of up to ten experts that lies together: those
// leave what they compute in the order of down as well, so that nobody gathers it.

#include "moe/task.cuh"
#include "qgemm/row.cuh"

namespace {

// Asks for the permutations of all experts, which are known sooner than the experts of the row: of the inputs,
// and of a block's outputs those that down has.
__device__ __forceinline__ void prefetch_permutations(const ExpertsTask& task, const Experts& experts,
                                                      const Share& share) {
    const int tiles = share.to - share.from;
    for (int i = threadIdx.x; experts.inverses && i < task.experts * tiles; i += blockDim.x) {
        const u32* inverse = experts.inverses[i / tiles];
        const int column = (share.from + i % tiles) * 32;
        if (inverse && column < task.n) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(inverse + column));
        }
    }
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

// Copies all descriptors to shared memory. GATE_UP: also, in front of them at the end of the task's bytes, where
// the matrices of down, whose table follows that of gate and up, have their inputs. By the whole block.
template <bool GATE_UP>
__device__ __forceinline__ Experts stage_descriptors(const ExpertsTask& task, char* to) {
    constexpr int WORDS = sizeof(QMatrix) / 8;
    const int parts = task.gated ? 2 : 1;
    const bool orders = GATE_UP && task.ordered;
    const u32** inverses = reinterpret_cast<const u32**>(to) - MOST_ORDERED;
    if (orders && threadIdx.x < task.experts) {
        const QMatrix* down = task.table[task.experts * parts + threadIdx.x];
        inverses[threadIdx.x] = down && down->perm ? down->perm + task.n : nullptr;
    }
    u64* all = reinterpret_cast<u64*>(to);
    for (int i = threadIdx.x; i < task.experts * parts * WORDS; i += blockDim.x) {
        const QMatrix* from = task.table[i / WORDS];
        all[i] = from ? reinterpret_cast<const u64*>(from)[i % WORDS] : 0;
    }
    __syncthreads();
    return {task.table, reinterpret_cast<const QMatrix*>(to), parts, orders ? inverses : nullptr};
}

template <int KIND, bool ADDS, int SPLIT>
__device__ __forceinline__ void row(const ExpertsTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<ADDS, SPLIT> Own;
    if (ADDS) pdl_launch();
    Own& own = *reinterpret_cast<Own*>(shared);
    // As many blocks for every expert.
    const int each = gridDim.x / (task.segments * SPLIT), group = blockIdx.x / each;
    const int s = group / SPLIT, rank = group % SPLIT;
    const Share share = Share::even(blockIdx.x % each, task.columns, each);
    Experts experts = {task.table, nullptr, task.gated ? 2 : 1, nullptr};
    if (task.staged) {
        experts = stage_descriptors<!ADDS>(task, shared + TASK_BYTES);
        if (!ADDS) prefetch_permutations(task, experts, share);
    } else {
        task.prefetch_descriptors();
    }
    if (!task.early) pdl_wait();
    // What follows gate and up may rely on the ids: they were there before it could begin.
    if (!ADDS) pdl_launch();
    const int expert = __ldcg(task.ids + s);
    // x is there as well.
    typename RowInput<KIND, Own>::Row x;
    x.inputs = task.inputs;
    if (Own::X_THERE) x.load(task.x + (task.by_slot ? (long long)s * task.inputs : 0));
    if (own.take(task, {expert, s, 1, 0, 1}, experts, rank)) {
#if __CUDA_ARCH__ >= 900
        shared_written();   // the rings will be where descriptors were
#endif
        __syncthreads();
        const int held = SPLIT > 1 ? task.held : task.inputs;
        RowProduct<KIND, Own> product(own, task.slots, task.inputs, held, shared + TASK_BYTES);
        if constexpr (Own::X_THERE) product.input.row = x;
        product.run({share.from, share.to});
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
