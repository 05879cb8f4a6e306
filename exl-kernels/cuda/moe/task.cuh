// What one launch of a product of experts of few rows computes.
#pragma once

#include "moe/experts.cuh"
#include "qgemm/task.cuh"
#include "qgemm/turn.cuh"

// The host fills this struct word by word: lower/moe/few.rs.
struct ExpertsTask {
    union {
        const QMatrix* const* table;   // [experts][gate and up, or one]; 0: not this kernel's
        const QMatrix* records;        // `staged`: the same, but the matrices themselves, of those that are not this
                                       // kernel's zeros. Behind gate and up with `ordered`: [experts] of down
    };
    Sorted sorted;                 // several rows
    const int* ids;                // one row: [segments]
    const float* x;                // one row: [inputs], or with `by_slot` [segments, inputs]
    const char* blocks;            // several rows: what exl_moe_block_x leaves
    long long part_bytes;          // of that, of all slots in one order
    float* out;                    // [slots, n]
    const float* weights;          // one row, down: [segments]
    const float* residual;         // [n], or 0; may be `sum`
    float* sum;                    // [n]; 0: nothing is added up, or by the launch behind (sum_norm.cu)
    u32* counters;                 // of each column tile
    float* ordered;                // one row, or 0: the outputs of gate and up once more, [segments, n], in the
                                   // order of down's matrices, which down reads instead of x
    int experts, segments;         // segments: of one row
    int inputs, n;
    int columns, slots;            // column tiles of a matrix; tiles of a thread block whose sums fit
    int row_bytes;                 // of a row of `blocks`
    short by_slot, streams;
    int held;                      // one row: columns of x that a thread block has room for
    short early, staged;           // one row: `ids` are there before the launch; see Experts
    short gated, act;
    int each;   // one row: column tiles of a thread block, or one more

    // Matrices of an expert.
    __device__ __forceinline__ int parts() const { return gated ? 2 : 1; }
    // Asks for the descriptors of all experts: they are used as soon as the experts of a row are known.
    __device__ __forceinline__ void prefetch_descriptors() const {
        const int all = experts * parts();
        const int i = blockIdx.y * gridDim.x + blockIdx.x + threadIdx.x * gridDim.x * gridDim.y;
        if (i >= all || !table[i]) return;
        const char* at = reinterpret_cast<const char*>(table[i]);
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at + 128));
    }
};

// Stores part of an output of one row: a segment's, or what one of the SPLIT thread blocks that divide its rows
// has of it. Whoever comes last of those of a column tile adds them, in their order, and the residual of the lane's
// column. By a whole warp.
template <int SPLIT>
__device__ __forceinline__ void add_segments(const ExpertsTask& task, int part, int tile, float s,
                                             float residual) {
    const int lane = threadIdx.x % WARP, column = tile * 32 + lane;
    const bool inside = column < task.n;
    if (inside) task.out[(long long)part * task.n + column] = s;
    if (!task.sum) return;
    __threadfence();
    __syncwarp();
    u32 before = 0;
    if (lane == 0) before = atomicAdd(task.counters + tile, 1u);
    before = __shfl_sync(FULL_MASK, before, 0);
    if (before + 1 != u32(task.segments * SPLIT)) return;
    __threadfence();
    if (lane == 0) task.counters[tile] = 0;
    if (!inside) return;
    float sum = 0.0f;
    // Two at a time: this is all latency.
#pragma unroll 1
    for (int from = 0; from < task.segments; from += 2) {
        float weight[2], part[2][SPLIT];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (from + i >= task.segments) break;
            const float* own = task.out + (long long)(from + i) * SPLIT * task.n + column;
#pragma unroll
            for (int r = 0; r < SPLIT; ++r) part[i][r] = __ldcg(own + (long long)r * task.n);
            weight[i] = task.weights[from + i];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (from + i >= task.segments) break;
            float output = part[i][0];
#pragma unroll
            for (int r = 1; r < SPLIT; ++r) output += part[i][r];
            sum = fmaf(weight[i], output, sum);
        }
    }
    task.sum[column] = sum + residual;
}

// Where the matrices of a layer's experts are described: their table in device memory, or copies of all
// descriptors in shared memory, made before it was known which ones matter.
struct Experts {
    const QMatrix* const* table;
    const QMatrix* staged;   // or 0
    int parts;               // of an expert
    const u32* const* perms;   // shared, or 0: by expert, of the matrices of down
    int inputs;                // of those

    // Where the matrix of down of an expert has its inputs; 0: where they are.
    __device__ __forceinline__ const u32* inverse(int expert) const {
        const u32* perm = perms ? perms[expert] : nullptr;
        return perm ? perm + inputs : nullptr;
    }

    // 0: of another format.
    __device__ __forceinline__ const QMatrix* of(int expert, int part) const {
        const int i = expert * parts + part;
        if (!staged) return table[i];
        return staged[i].tiles ? staged + i : nullptr;
    }
};

// Two matrices, by where their descriptors lie in shared memory.
struct Matrices {
    int at[2];

    __device__ __forceinline__ const QMatrix& operator[](int i) const {
        extern __shared__ __align__(1024) char shared[];
        return *reinterpret_cast<const QMatrix*>(shared + at[i]);
    }
    __device__ __forceinline__ static int place(const void* p) {
        return smem_address(p) - smem_address(start());
    }
    __device__ __forceinline__ static const void* start() {
        extern __shared__ __align__(1024) char shared[];
        return shared;
    }
};

// What a thread block computes of a segment: in shared memory, in the form that the products of few rows
// take (Task). ADDS: the outputs of the segments are added up; SPLIT thread blocks divide the rows.
// LOADS: of x, that overlap.
template <bool ADDS, int SPLIT_BLOCKS = 1, int LOADS = 3>
struct SegmentTask {
    static constexpr bool SPARING = false;
    static constexpr int MOST = 2, ROUNDS = LOADS, SPLIT = SPLIT_BLOCKS;
    // Gate and up: as the experts are known, what they multiply is; and their outputs may go to two places.
    static constexpr bool X_THERE = !ADDS;

    Matrices matrix;           // gate and up, or one and none
    QMatrix copy[MOST];        // of what is not staged
    const float* x;            // one row
    const char* blocks[MOST];  // several rows, by order
    const ExpertsTask* whole;
    int rows, inputs, slots, orders;
    int rank;                  // of the thread blocks that divide the rows
    short gated, streams;
    u8 order[4];
    int slot[16];              // of each row
    const u32* inverse;        // one row, or 0: of Experts

    // As those of Task. `place`: where the product that follows has a column of this one's output.
    struct Known {
        u32 place;
        float residual;
    };
    __device__ __forceinline__ Known known(int, int index, int column) const {
        column += index * 32;
        Known known = {u32(column), 0.0f};
        if (column >= whole->n) return known;
        if (!ADDS && inverse) known.place = inverse[column];
        if (ADDS && whole->residual) known.residual = whole->residual[column];
        return known;
    }
    __device__ __forceinline__ void finish(int r, int index, int column, float s, float up,
                                           const Known& known) const {
        const Epilogue e = {whole->out, nullptr, nullptr, whole->n, 0};
        if (gated) {
            const float v = finish_gated(e, whole->act, slot[r], index * 32 + column, s, up, {});
            if (!ADDS && whole->ordered && index * 32 + column < e.n) {
                whole->ordered[(long long)slot[r] * e.n + known.place] = v;
            }
        } else if (ADDS) {
            add_segments<SPLIT>(*whole, slot[r] * SPLIT + rank, index, s, known.residual);
        } else {
            finish_linear(e, slot[r], index * 32 + column, s, {});
        }
    }

    // Fills what does not depend on the expert: `count` sorted slots from `first` on, of one row slot `first`. By
    // the whole block; a barrier must follow.
    __device__ __forceinline__ void begin(const ExpertsTask& task, int first, int count,
                                          int split_rank = 0) {
        if (!task.ids && int(threadIdx.x) < count) slot[threadIdx.x] = task.sorted.slots[first + threadIdx.x];
        if (threadIdx.x != blockDim.x - 1) return;
        if (task.ids) slot[0] = first;
        const float* from = ADDS && task.ordered ? task.ordered : task.x;
        x = from + (task.by_slot ? (long long)first * task.inputs : 0);
        blocks[0] = task.blocks + (long long)first * task.row_bytes;
        blocks[1] = blocks[0] + task.part_bytes;
        whole = &task;
        rows = count;
        inputs = task.inputs;
        slots = task.slots;
        gated = task.gated;
        streams = task.streams;
        order[0] = order[2] = order[3] = 0;
        rank = split_rank;
        // Where there is one part, the other has no columns.
        if (!task.gated) copy[1].columns = 0;
    }
    // Fills the rest, unless the expert is another kernel's. By the whole block, behind a barrier; another one
    // must follow.
    __device__ __forceinline__ bool take(const ExpertsTask& task, int expert, const Experts& experts) {
        constexpr int WORDS = sizeof(QMatrix) / 8;
        if (u32(expert) >= u32(task.experts)) return false;
        const QMatrix* first = experts.of(expert, 0);
        if (!first) return false;
        for (int i = threadIdx.x; !experts.staged && i < experts.parts * WORDS; i += blockDim.x) {
            const QMatrix* from = i < WORDS ? first : experts.of(expert, 1);
            reinterpret_cast<u64*>(&copy[i / WORDS])[i % WORDS] =
                reinterpret_cast<const u64*>(from)[i % WORDS];
        }
        if (threadIdx.x == blockDim.x - 1) {
            const QMatrix* own = experts.staged ? first : copy;
            const bool both = experts.parts == 2;
            matrix = {Matrices::place(own), Matrices::place(both ? own + 1 : copy + 1)};
            const bool apart = both && first->perm != experts.of(expert, 1)->perm;
            orders = apart ? 2 : 1;
            order[1] = apart ? 1 : 0;
            inverse = experts.inverse(expert);
        }
        return true;
    }
};

// Bytes of shared memory before what a product uses (lower/moe/few.rs: TASK_BYTES).
constexpr int TASK_BYTES = 1024;
// Descriptors that are staged, at most (lower/moe/few.rs: MOST_STAGED).
constexpr int MOST_STAGED = 32;
static_assert(sizeof(SegmentTask<true>) + 8 * MOST_STAGED <= TASK_BYTES, "both fit");
