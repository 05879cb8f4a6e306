// A product of one row with quantized matrices, by whole thread blocks.
//
// A thread block takes consecutive column tiles (tile.cuh); each of its warps takes one share of the
// rows of all of them, of gate and up two shares of one, and keeps sums of its own in shared memory, which are
// added in the warps' order.
//
// T: what is computed, a Task (task.cuh) or what looks like one. Of T::SPLIT thread blocks that divide the
// rows of the same columns each has x of its rows alone.
#pragma once

#include "qgemm/row_slice.cuh"

constexpr int ROW_WARPS = SHARES;
constexpr int ZEROS = 4 * 4 * X_ROW;   // bytes: x of a round of four slots

// x of every order that the parts have, in shared memory.
template <int KIND, typename T>
struct RowInput {
    const T& task;
    char* base;
    XBytes bytes;
    // Others have registers for two.
    typedef RowStage<KIND == KIND_EXL2 && LARGE ? T::ROUNDS : 2, T::X_THERE> Row;
    Row row;

    __device__ __forceinline__ RowInput(const T& task, int inputs, int, char* base)
        : task(task), base(base), bytes((inputs + 127) / 128 * ROW_CHUNK, 1, inputs) {
        row.inputs = inputs;
    }
    __device__ __forceinline__ char* of(int order) const {
        return base + order * (KIND == KIND_GPTQ ? bytes.all : bytes.sums);
    }
    __device__ __forceinline__ void point(RowWalk<KIND>& walk, int part) const {
        const char* at = of(task.order[part]);
        walk.x = at + x_place(walk.lane);
        walk.scales = reinterpret_cast<const float*>(at + bytes.scales);
        walk.x_sums = reinterpret_cast<const int*>(at + bytes.sums);
    }
    // What can be loaded before x is there, and before weights are asked for: it would be served after them.
    __device__ __forceinline__ void prepare() { row.prepare(task.matrix[0].perm); }
    // Waits for x, if it is not there yet, gathers and rounds it; `arrived()` is called when it has been loaded. By
    // the whole block.
    template <class Arrived>
    __device__ __forceinline__ void stage(const Arrived& arrived) {
        if (!T::X_THERE) pdl_wait();
#pragma unroll 1
        for (int order = 0; order < task.orders; ++order) {
            char* at = of(order);
            int part = 0;
            while (task.order[part] != order) ++part;
            const u32* perm = task.matrix[part].perm;
            if (order > 0) row.prepare(perm);
            float* floats = reinterpret_cast<float*>(at);
            row.gather(task.x, perm, floats);
            if (order == 0) arrived();
            __syncthreads();
            row.template round<KIND == KIND_GPTQ, true>(
                floats, floats, reinterpret_cast<float*>(at + bytes.scales),
                reinterpret_cast<int*>(at + bytes.sums), [] {});
        }
        __syncthreads();
    }
};

// x in the one order that all parts have, so that nothing is gathered.
template <typename T>
struct OrderedInput {
    const T& task;
    char* base;
    XBytes bytes;
    typedef RowStage<LARGE ? T::ROUNDS : 2, false> Row;
    Row row;

    __device__ __forceinline__ OrderedInput(const T& task, int inputs, int, char* base)
        : task(task), base(base), bytes((inputs + 127) / 128 * ROW_CHUNK, 1, inputs) {
        row.inputs = inputs;
    }
    // As those of RowInput.
    __device__ __forceinline__ void point(RowWalk<KIND_EXL2>& walk, int) const {
        walk.x = base + x_place(walk.lane);
        walk.scales = reinterpret_cast<const float*>(base + bytes.scales);
    }
    __device__ __forceinline__ void prepare() {}
    template <class Arrived>
    __device__ __forceinline__ void stage(const Arrived& arrived) {
        pdl_wait();
        row.template round<false, false>(task.x, reinterpret_cast<float*>(base),
                                         reinterpret_cast<float*>(base + bytes.scales), nullptr, arrived);
        __syncthreads();
    }
};

template <int KIND, typename T, int SPLIT>
struct InputOf {
    typedef SliceInput<T> Type;
};
template <int KIND, typename T>
struct InputOf<KIND, T, 1> {
    typedef RowInput<KIND, T> Type;
};
template <>
struct InputOf<KIND_EXL2, OrderedTask, 1> {
    typedef OrderedInput<OrderedTask> Type;
};

// Sum of a column over the COUNT shares of the rows, two at a time.
template <int COUNT>
__device__ __forceinline__ float add_up_row(const float* at) {
    float s = 0.0f;
#pragma unroll 4
    for (int i = 0; i < COUNT; i += 2) s += at[i * 32] + at[(i + 1) * 32];
    return s;
}

// A thread block at work, whose weights come through rings R.
template <int KIND, typename T, typename R = Ring<false>>
struct RowProduct {
    static constexpr int OWN = SPLIT_SHARES<T>;
    static constexpr bool SPARING = T::SPARING && LARGE;

    const T& task;
    int lane, warp;
    float* sums;   // shared: [slots][OWN][32]
    R ring;
    typename R::Place at;
    typename InputOf<KIND, T, T::SPLIT>::Type input;
    RowWalk<KIND> walk;
    Way<T> way;
    Supply<T, R> supply;

    // `shared` has room for: sums; rings of the warps; zeros; x of each order, `held` columns of it. `slots`
    // and `inputs` are those of the task, which need not be there yet.
    __device__ __forceinline__ RowProduct(const T& task, int slots, int inputs, int held, char* shared)
        : task(task), lane(threadIdx.x % WARP),
          warp(uniform(threadIdx.x / WARP)),
          sums(reinterpret_cast<float*>(shared)),
          ring(shared + slots * OWN * 128 + warp * R::BYTES, lane),
          input(task, inputs, held, shared + slots * OWN * 128 + ROW_WARPS * R::BYTES + ZEROS),
          supply(task) {
        char* zeros = shared + slots * OWN * 128 + ROW_WARPS * R::BYTES;
        if (threadIdx.x < ZEROS / 16) reinterpret_cast<uint4*>(zeros)[threadIdx.x] = uint4{};
        walk.lane = lane;
        walk.zero = zeros;
    }
    // By all warps, before a barrier that comes before run(). `slots`, `shared`: as above.
    __device__ __forceinline__ static void begin(int slots, char* shared) {
        const int warp = uniform(threadIdx.x / WARP);
        R(shared + slots * OWN * 128 + warp * R::BYTES, threadIdx.x % WARP).begin();
    }

    typedef typename T::Known Known;
    // Adds up and stores the tiles of a turn. `known`: of the lane's column of the warp's first. By the whole block.
    __device__ __forceinline__ void finish(const Turn& turn, Known known) const {
        constexpr int HALF = OWN / 2;
        for (int j = warp; j < turn.to - turn.from; j += ROW_WARPS) {
            if (j != warp) known = task.known(0, turn.from + j, lane);
            const float* at = sums + j * OWN * 32 + lane;
            float s = add_up_row<HALF>(at), up = add_up_row<HALF>(at + HALF * 32);
            if (!task.gated) s += up;
            task.finish(0, turn.from + j, lane, s, up, known);
        }
    }
    // Column tiles `mine` of all parts.
    __device__ __forceinline__ void run(const Turn& mine) {
#pragma unroll 1
        for (int from = mine.from; from < mine.to; from += task.slots) {
            const Turn turn = {from, min(from + task.slots, mine.to)};
            const bool is_first = from == mine.from;
            if (is_first) input.prepare();
            // The first copies start before x is there. Who uses them begins where who asks for them does.
            supply.start(turn, warp);
            bool more = supply.tiles > 0;
            way = supply.way;
            // SPARING: the last ones when x has been loaded. What the launches in front and this one still have to load
            // waits for all that is under way: hits of L2 are served behind misses.
#pragma unroll 1
            for (u32 i = 0, slot = at.slot; i < (SPARING ? R::SLOTS - 1 : R::SLOTS); ++i) {
                supply.ask(ring, slot);
                slot = slot + 1 == R::SLOTS ? 0 : slot + 1;
            }
            const auto rest = [&] {
                if (SPARING) supply.ask(ring, (at.slot + R::SLOTS - 1) % R::SLOTS);
            };
            // Not unrolled: instructions that are not at hand would come behind the weights.
#pragma unroll 1
            for (int i = warp; i < (turn.to - turn.from) * OWN; i += ROW_WARPS) sums[i * 32 + lane] = 0.0f;
            if (is_first) {
                input.stage(rest);
            } else {
                rest();
                __syncthreads();
            }
            Known known = {};
            if (warp < turn.to - turn.from) known = task.known(0, turn.from + warp, lane);
            for (; more; more = way.next(task, supply.path)) {
                walk.m = &task.matrix[way.leg.part];
                walk.sums = sums + way.leg.sums * 32;
                walk.step = T::SPLIT * OWN * 32;
                input.point(walk, way.leg.part);
                walk.run(way.leg, supply, ring, at);
            }
            __syncthreads();
            finish(turn, known);
            if (turn.to < mine.to) __syncthreads();
        }
    }
};

// Bytes of shared memory for the task (lower/linear/few/config.rs: TASK_BYTES).
constexpr int ROW_TASK_BYTES = 1024;
static_assert(sizeof(Task) <= ROW_TASK_BYTES, "it fits");

template <int KIND, typename R, typename T>
__device__ __forceinline__ void multiply_row(const T& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    // Lanes look up different parts of it, and later it would be loaded behind the weights.
    T& own = *reinterpret_cast<T*>(shared);
    for (int i = threadIdx.x; i < int(sizeof(T) / 8); i += blockDim.x) {
        reinterpret_cast<u64*>(&own)[i] = reinterpret_cast<const u64*>(&task)[i];
    }
    RowProduct<KIND, T, R>::begin(task.slots, shared + ROW_TASK_BYTES);
    __syncthreads();
    RowProduct<KIND, T, R> product(own, task.slots, task.inputs, task.inputs, shared + ROW_TASK_BYTES);
    // The thread block's tiles are consecutive, so that most belong to one matrix.
    product.run(Turn::of(blockIdx.x, task.tiles, task.each, gridDim.x));
}
