// exl_moe_row1_*: products of one row with its experts' quantized matrices, at the speed of the memory.
//
// exl: spills-allowed exl_moe_row1_exl2 before the loop over weights
// exl: spills-allowed exl_moe_row1_gptq before the loop over weights, and behind it
// exl: spills-allowed exl_moe_row1_routed before the loop over weights
// exl: spills-allowed exl_moe_row1_add_exl2 before the loop over weights
// exl: spills-allowed exl_moe_row1_add_split_exl2 before the loop over weights
//
// What: gate and up with the activation between them, or down with the weighted sum of the experts'
// outputs and the residual. Reads the packed weights of the row's experts and no others; which ones is
// known on the GPU alone. Expected bound: memory, as qgemm/row.cu, whose arithmetic this is.
//
// exl_moe_row1_routed: gate and up with what exl_moe_router_* does before them, where the product in front leaves what
// that needs of its outputs (qgemm/router_sums.cuh).
//
// A thread block has column tiles of one of the row's experts: it looks up the matrices in device
// memory, then goes on as a block of qgemm/row.cu. Nothing of the weights can be asked for before it is known
// which expert's they are, so that must not take long: where experts are few, all descriptors are in shared
// memory by then, and x is loaded as soon as they are known; and down, which comes behind gate and up, knows the
// experts before it has its input. Its input is long, so four blocks divide the rows of the same columns, each
// with the part of the input that it needs. Behind gate and up of up to 16 experts that lies together: those
// leave what they compute in the order of down as well, so that nobody gathers it.

#include "moe/router.cuh"
#include "moe/task.cuh"
#include "qgemm/row.cuh"

namespace {

// Asks for the permutations of all experts, which are known sooner than the experts of the row: of the inputs,
// and of a block's outputs those that down has.
__device__ __forceinline__ void prefetch_permutations(const ExpertsTask& task, const Experts& experts,
                                                      const Share& share) {
    const int tiles = share.to - share.from;
    for (int i = threadIdx.x; experts.perms && i < task.experts * tiles; i += blockDim.x) {
        const u32* inverse = experts.inverse(i / tiles);
        const int column = (share.from + i % tiles) * 32;
        if (inverse && column < task.n) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(inverse + column));
        }
    }
    const int lines = task.inputs / WARP;   // of 128 bytes
    const int blocks = gridDim.x * gridDim.y;
    for (int i = blockIdx.y * gridDim.x + blockIdx.x + threadIdx.x * blocks; i < task.experts * lines;
         i += blocks * blockDim.x) {
        const QMatrix& m = experts.staged[i / lines * experts.parts];
        // Their inverses, behind them, are what gathers x.
        if (m.perm) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(m.perm + task.inputs + i % lines * WARP));
        }
    }
}

// Begins to copy all descriptors to shared memory. GATE_UP: also, in front of them at the end of the task's bytes, the
// permutations of the matrices of down, whose table follows that of gate and up. By the whole block; whoever reads
// them waits for the copies, and for a barrier.
template <bool GATE_UP>
__device__ __forceinline__ Experts stage_descriptors(const ExpertsTask& task, char* to) {
    static_assert(sizeof(QMatrix) % 16 == 0, "16 bytes at a time");
    const int parts = task.parts();
    const bool orders = GATE_UP && task.ordered;
    const u32** perms = reinterpret_cast<const u32**>(to) - MOST_STAGED;
    if (orders && threadIdx.x < task.experts) {
        cp_async_8(perms + threadIdx.x, &task.records[task.experts * parts + threadIdx.x].perm);
    }
    const char* from = reinterpret_cast<const char*>(task.records);
    const int bytes = task.experts * parts * int(sizeof(QMatrix));
    for (int i = 16 * threadIdx.x; i < bytes; i += 16 * blockDim.x) cp_async_16(to + i, from + i);
    cp_async_commit();
    return {nullptr, reinterpret_cast<const QMatrix*>(to), parts, orders ? perms : nullptr, task.n};
}

// What a thread block has: column tiles of one of the row's experts, which have as many blocks each: those of a row of
// the grid.
template <int SPLIT>
struct Block {
    int group;       // of those with the same columns
    int s, rank;     // of the row's experts; of the SPLIT that divide the rows
    Share share;

    __device__ __forceinline__ explicit Block(const ExpertsTask& task)
        : group(blockIdx.y), s(group / SPLIT), rank(group % SPLIT) {
        const int i = blockIdx.x, more = task.columns - task.each * gridDim.x, from = i * task.each + min(i, more);
        share = {from, from + task.each + (i < more ? 1 : 0)};
    }
    __device__ __forceinline__ static bool is_last() {
        return blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1;
    }
};

// Where what a product has in shared memory begins: behind the task and what is staged.
__device__ __forceinline__ char* product_space(const ExpertsTask& task, char* shared) {
    return shared + TASK_BYTES + (task.staged ? task.experts * task.parts() * int(sizeof(QMatrix)) : 0);
}

template <int KIND, bool ADDS, int SPLIT>
__device__ __forceinline__ void row(const ExpertsTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<ADDS, SPLIT> Own;
    if (ADDS) pdl_launch();
    Own& own = *reinterpret_cast<Own*>(shared);
    const Block<SPLIT> block(task);
    const Share share = block.share;
    own.begin(task, block.s, 1, block.rank);
    // Beside the descriptors.
    int expert = task.early ? __ldcg(task.ids + block.s) : 0;
    RowProduct<KIND, Own>::begin(task.slots, product_space(task, shared));
    Experts experts = {task.table, nullptr, task.parts(), nullptr, 0};
    if (task.staged) {
        experts = stage_descriptors<!ADDS>(task, shared + TASK_BYTES);
        cp_async_wait<0>();
        __syncthreads();
        if (!ADDS) prefetch_permutations(task, experts, share);
    } else {
        task.prefetch_descriptors();
    }
    if (!task.early) {
        pdl_wait();
        expert = __ldcg(task.ids + block.s);
    }
    expert = uniform(expert);
    // What follows gate and up may rely on the ids: they were there before it could begin.
    if (!ADDS) pdl_launch();
    // x is there as well.
    typename RowInput<KIND, Own>::Row x;
    x.inputs = task.inputs;
    if (Own::X_THERE) x.load(task.x + (task.by_slot ? (long long)block.s * task.inputs : 0));
    const bool there = own.take(task, expert, experts);
    __syncthreads();
    // The same in all lanes, and known to be.
    if (__ballot_sync(FULL_MASK, there) == 0) {
        // No expert: the output shows it.
        if (ADDS) pdl_wait();
        for (int tile = share.from + threadIdx.x / WARP; ADDS && tile < share.to; tile += ROW_WARPS) {
            add_segments<SPLIT>(task, block.group, tile, __int_as_float(0x7fc00000), 0.0f);
        }
        return;
    }
    const int held = SPLIT > 1 ? task.held : task.inputs;
    RowProduct<KIND, Own> product(own, task.slots, task.inputs, held, product_space(task, shared));
    if constexpr (Own::X_THERE) product.input.row = x;
    product.run({share.from, share.to});
}

constexpr int ROUTED_GROUPS = 2;   // of four columns of a thread: for up to 4096 inputs

// Gate and up behind the norm and the choice of the experts, which the product in front has all but made: every block
// does what is left of it for itself, so that it has x and asks for weights one launch sooner. The last one leaves it
// in memory.
__device__ __forceinline__ void routed_row(const ExpertsTask& task, const routing::RouterTask& router) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<false, 1, ROUTED_GROUPS> Own;
    typedef typename RowInput<KIND_EXL2, Own>::Row Row;
    static_assert(Row::LOADS == ROUTED_GROUPS && routing::THREADS == ROW_WARPS * WARP,
                  "a thread has the columns of x that it loads");
    static_assert(sizeof(routing::TileSums) <= SHARES * 128, "sums of a tile are larger");
    const routing::NormColumns<ROUTED_GROUPS> columns(router);
    Own& own = *reinterpret_cast<Own*>(shared);
    const Block<1> block(task);
    own.begin(task, block.s, 1);
    const Experts experts = stage_descriptors<true>(task, shared + TASK_BYTES);
    char* space = product_space(task, shared);
    // Where the product's sums will be.
    routing::TileSums& sums = *reinterpret_cast<routing::TileSums*>(space);
    Row x;
    x.inputs = task.inputs;
    pdl_wait();
#pragma unroll
    for (int g = 0; g < ROUTED_GROUPS; ++g) x.values[g] = x.value(router.x, columns.first(g));
    const routing::TileSums::Own own_sums = routing::TileSums::load(router);
    // While those are on their way.
    RowProduct<KIND_EXL2, Own>::begin(task.slots, space);
    cp_async_wait<0>();
    __syncthreads();
    sums.add_up(own_sums);
    __syncthreads();
    const float factor = routing::factor_of(router, sums.square()), logit = sums.dot() * factor;
    const int expert = __shfl_sync(
        FULL_MASK, choose<false>(logit, router.experts, router.top_k, 0.0f).id, block.s);
    const bool there = own.take(task, expert, experts);
#pragma unroll
    for (int g = 0; g < ROUTED_GROUPS; ++g) x.values[g] = routing::product(x.values[g], columns.scale(router, g));
    columns.normalize(x.values, factor);
    const bool leaves = block.is_last();
    if (leaves && threadIdx.x < WARP) {
        routing::decide(router, logit);
        __threadfence();
        __syncwarp();
    }
    // What follows may rely on the ids, which are in L2 by then. The first thread of a block to call lets it begin.
    if (!leaves || threadIdx.x < WARP) pdl_launch();
    if (leaves) columns.store(router, x.values);
    __syncthreads();
    if (!there) return;
    RowProduct<KIND_EXL2, Own> product(own, task.slots, task.inputs, task.inputs, space);
    product.input.row = x;
    product.run({block.share.from, block.share.to});
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

extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 1)
    exl_moe_row1_routed(const __grid_constant__ ExpertsTask task,
                        const __grid_constant__ routing::RouterTask router) {
    routed_row(task, router);
}
