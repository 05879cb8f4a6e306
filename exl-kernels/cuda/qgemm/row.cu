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
//
// A thread block takes consecutive column tiles (tile.cuh); each of its warps takes one share of the
// rows of all of them and keeps sums of its own in shared memory, which are added in the warps' order.

#include "qgemm/row_walk.cuh"

namespace {

constexpr int ROW_WARPS = SHARES;
constexpr int ZEROS = 4 * 4 * X_ROW;   // bytes: x of a round of four slots

// x of every order that the parts have, in shared memory.
template <int KIND>
struct RowInput {
    const Task& task;
    char* base;
    XBytes bytes;
    // Others have registers for two.
    RowStage<KIND == KIND_EXL2 && LARGE ? 4 : 2> row;

    __device__ __forceinline__ RowInput(const Task& task, char* base)
        : task(task), base(base),
          bytes((task.inputs + 127) / 128 * ROW_CHUNK, 1, task.inputs) {
        row.inputs = task.inputs;
    }
    __device__ __forceinline__ char* of(int order) const {
        return base + order * (KIND == KIND_GPTQ ? bytes.all : bytes.sums);
    }
    __device__ __forceinline__ void point(RowWalk<KIND>& walk, int part) const {
        const char* at = of(task.order[part]);
        walk.x = at + (walk.lane >> 2 & 1) * 32 + (walk.lane & 3) * 8;
        walk.scales = reinterpret_cast<const float*>(at + bytes.scales);
        walk.x_sums = reinterpret_cast<const int*>(at + bytes.sums);
    }
    // Waits for x, gathers and rounds it. By the whole block.
    __device__ __forceinline__ void stage() {
        row.prepare(task.matrix[0].perm);
        pdl_wait();
#pragma unroll 1
        for (int order = 0; order < task.orders; ++order) {
            char* at = of(order);
            int part = 0;
            while (task.order[part] != order) ++part;
            const u32* perm = task.matrix[part].perm;
            if (order > 0) row.prepare(perm);
            float* floats = reinterpret_cast<float*>(at);
            row.gather(task.x, perm, floats);
            __syncthreads();
            row.template round<KIND == KIND_GPTQ>(floats, reinterpret_cast<float*>(at + bytes.scales),
                                                  reinterpret_cast<int*>(at + bytes.sums));
        }
        __syncthreads();
    }
};

// Sum of a column over the warps, two at a time.
__device__ __forceinline__ float add_up(const float* at) {
    float s = 0.0f;
#pragma unroll 4
    for (int i = 0; i < ROW_WARPS; i += 2) s += at[i * 32] + at[(i + 1) * 32];
    return s;
}

// Adds up and stores the tiles of a turn. By the whole block.
__device__ __forceinline__ void finish(const Task& task, const Turn& turn, const float* sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tile = ROW_WARPS * 32 * (task.gated ? 2 : 1);   // floats
    for (int j = warp; j < turn.to - turn.from; j += ROW_WARPS) {
        const int index = turn.from + j;
        const float* at = sums + j * tile + lane;
        const float s = add_up(at);
        if (task.gated) {
            const float up = add_up(at + ROW_WARPS * 32);
            finish_gated(task.epilogue[0], task.epilogue[1], task.act, 0, index * 32 + lane, s, up);
            continue;
        }
        const PartTile own = task.tile(index);
        finish_linear(task.epilogue[own.part], 0, own.index * 32 + lane, s);
    }
}

template <int KIND>
__device__ __forceinline__ void qgemm(const Task& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    const int lane = threadIdx.x % WARP;
    // The same in all lanes, and known to be.
    const int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP, 0);
    // Shared memory: sums [slots][warps][32]; rings of the warps; zeros; x of each order.
    float* sums = reinterpret_cast<float*>(shared);
    char* rings = shared + task.slots * ROW_WARPS * 128;
    char* zeros = rings + ROW_WARPS * Ring::BYTES;
    if (threadIdx.x < ZEROS / 16) reinterpret_cast<uint4*>(zeros)[threadIdx.x] = uint4{};

    const Ring ring(rings + warp * Ring::BYTES, lane);
    Ring::Place at;
    RowInput<KIND> input(task, zeros + ZEROS);
    RowWalk<KIND> walk;
    walk.lane = lane;
    walk.zero = zeros;
    Way way(task, warp);
    Supply supply(way);

    // The thread block's tiles are consecutive, so that most belong to one matrix.
    const Turn mine = Turn::of(blockIdx.x, task.tiles, task.each, gridDim.x);
    const int each = task.gated ? 2 : 1, at_once = task.slots / each;
#pragma unroll 1
    for (int from = mine.from; from < mine.to; from += at_once) {
        const Turn turn = {from, min(from + at_once, mine.to)};
        // The first copies start before x is there.
        supply.start(turn);
#pragma unroll 1
        for (u32 i = 0, slot = at.slot; i < Ring::SLOTS; ++i) {
            supply.ask(ring, slot);
            slot = slot + 1 == Ring::SLOTS ? 0 : slot + 1;
        }
        for (int slot = 0; slot < (turn.to - turn.from) * each; ++slot) {
            sums[(slot * ROW_WARPS + warp) * 32 + lane] = 0.0f;
        }
        if (from == mine.from) input.stage();
        way.start(turn);
        while (way.next()) {
            walk.m = &task.matrix[way.part];
            const int slot = task.gated ? way.part : way.tiles.step;
            walk.sums = sums + (slot * ROW_WARPS + warp) * 32;
            walk.step = each * ROW_WARPS * 32;
            input.point(walk, way.part);
            walk.run(way, supply, ring, at);
        }
        __syncthreads();
        // By a warp that has no tile to finish, unless there are very many.
        if (turn.to == mine.to && warp == ROW_WARPS - 1) prefetch_next(task);
        finish(task, turn, sums);
        if (turn.to < mine.to) __syncthreads();
    }
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
