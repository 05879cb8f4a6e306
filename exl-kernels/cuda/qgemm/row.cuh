// A product of one row with quantized matrices, by whole thread blocks.
//
// A thread block takes consecutive column tiles (tile.cuh); each of its warps takes one share of the
// rows of all of them and keeps sums of its own in shared memory, which are added in the warps' order.
//
// T: what is computed, a Task (task.cuh) or what looks like one.
#pragma once

#include "qgemm/row_walk.cuh"

constexpr int ROW_WARPS = SHARES;
constexpr int ZEROS = 4 * 4 * X_ROW;   // bytes: x of a round of four slots

// x of every order that the parts have, in shared memory.
template <int KIND, typename T>
struct RowInput {
    const T& task;
    char* base;
    XBytes bytes;
    // Others have registers for two.
    RowStage<KIND == KIND_EXL2 && LARGE ? T::ROUNDS : 2> row;

    __device__ __forceinline__ RowInput(const T& task, int inputs, char* base)
        : task(task), base(base), bytes((inputs + 127) / 128 * ROW_CHUNK, 1, inputs) {
        row.inputs = inputs;
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
__device__ __forceinline__ float add_up_row(const float* at) {
    float s = 0.0f;
#pragma unroll 4
    for (int i = 0; i < ROW_WARPS; i += 2) s += at[i * 32] + at[(i + 1) * 32];
    return s;
}

// A thread block at work.
template <int KIND, typename T>
struct RowProduct {
    const T& task;
    int lane, warp;
    float* sums;   // shared: [slots][warps][32]
    Ring ring;
    Ring::Place at;
    RowInput<KIND, T> input;
    RowWalk<KIND> walk;
    Way<T> way;
    Supply<T> supply;

    // `shared` has room for: sums; rings of the warps; zeros; x of each order. `slots` and `inputs` are
    // those of the task, which need not be there yet.
    __device__ __forceinline__ RowProduct(const T& task, int slots, int inputs, char* shared)
        : task(task), lane(threadIdx.x % WARP),
          // The same in all lanes, and known to be.
          warp(__shfl_sync(FULL_MASK, threadIdx.x / WARP, 0)),
          sums(reinterpret_cast<float*>(shared)),
          ring(shared + slots * ROW_WARPS * 128 + warp * Ring::BYTES, lane),
          input(task, inputs, shared + slots * ROW_WARPS * 128 + ROW_WARPS * Ring::BYTES + ZEROS),
          way(task, warp), supply(way) {
        char* zeros = shared + slots * ROW_WARPS * 128 + ROW_WARPS * Ring::BYTES;
        if (threadIdx.x < ZEROS / 16) reinterpret_cast<uint4*>(zeros)[threadIdx.x] = uint4{};
        walk.lane = lane;
        walk.zero = zeros;
    }

    // Adds up and stores the tiles of a turn. By the whole block.
    __device__ __forceinline__ void finish(const Turn& turn) const {
        const int tile = ROW_WARPS * 32 * (task.gated ? 2 : 1);   // floats
        for (int j = warp; j < turn.to - turn.from; j += ROW_WARPS) {
            const float* at = sums + j * tile + lane;
            const float s = add_up_row(at);
            const float up = task.gated ? add_up_row(at + ROW_WARPS * 32) : 0.0f;
            task.finish(0, turn.from + j, lane, s, up);
        }
    }

    // Column tiles `mine` of all parts. `last`: nothing follows.
    __device__ __forceinline__ void run(const Turn& mine, bool last) {
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
            if (last && turn.to == mine.to && warp == ROW_WARPS - 1) prefetch_next(task.following());
            finish(turn);
            if (turn.to < mine.to) __syncthreads();
        }
    }
};
