// What one launch of a product of experts of few rows computes.
#pragma once

#include "moe/experts.cuh"
#include "qgemm/task.cuh"
#include "qgemm/turn.cuh"

// The host fills this struct word by word: lower/moe/few.rs.
struct ExpertsTask {
    const QMatrix* const* table;   // [experts][gate and up, or one]; 0: not this kernel's. Behind gate and up
                                   // with `ordered`: [experts] of down
    Sorted sorted;                 // several rows
    const int* ids;                // one row: [segments]
    const float* x;                // one row: [inputs], or with `by_slot` [segments, inputs]
    const char* blocks;            // several rows: what exl_moe_block_x leaves
    long long part_bytes;          // of that, of all slots in one order
    float* out;                    // [slots, n]
    const float* weights;          // one row, down: [segments]
    const float* residual;         // [n], or 0; may be `sum`
    float* sum;                    // [n]; 0: nothing is added up
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

    // Asks for the descriptors of all experts: they are used as soon as the experts of a row are known.
    __device__ __forceinline__ void prefetch_descriptors() const {
        const int all = experts * (gated ? 2 : 1);
        const int i = blockIdx.x + threadIdx.x * gridDim.x;
        if (i >= all || !table[i]) return;
        const char* at = reinterpret_cast<const char*>(table[i]);
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at + 128));
    }
};

// Stores part of an output of one row: a segment's, or what one of the SPLIT thread blocks that divide its rows
// has of it. Whoever comes last of those of a column tile adds them, in their order, and the residual. By a
// whole warp.
template <int SPLIT>
__device__ __forceinline__ void add_segments(const ExpertsTask& task, int part, int tile, int lane,
                                             float s) {
    const int column = tile * 32 + lane;
    const bool inside = column < task.n;
    if (inside) task.out[(long long)part * task.n + column] = s;
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
#pragma unroll 1
    for (int j = 0; j < task.segments; ++j) {
        const float* own = task.out + (long long)j * SPLIT * task.n + column;
        float output = __ldcg(own);
#pragma unroll
        for (int r = 1; r < SPLIT; ++r) output += __ldcg(own + (long long)r * task.n);
        sum = fmaf(task.weights[j], output, sum);
    }
    task.sum[column] = sum + (task.residual ? task.residual[column] : 0.0f);
}

// Where the matrices of a layer's experts are described: their table in device memory, or copies of all
// descriptors in shared memory, made before it was known which ones matter.
struct Experts {
    const QMatrix* const* table;
    const QMatrix* staged;   // 0: the table
    int parts;               // of an expert
    const u32* const* inverses;   // shared, or 0: by expert, where the matrix of down has its inputs

    // 0: of another format.
    __device__ __forceinline__ const QMatrix* of(int expert, int part) const {
        const int i = expert * parts + part;
        if (!staged) return table[i];
        return staged[i].tiles ? staged + i : nullptr;
    }
};

// What a thread block computes of a segment: in shared memory, in the form that the products of few rows
// take (Task). ADDS: the outputs of the segments are added up; SPLIT thread blocks divide the rows.
template <bool ADDS, int SPLIT_BLOCKS = 1>
struct SegmentTask {
    static constexpr int MOST = 2, ROUNDS = 3, SPLIT = SPLIT_BLOCKS;
    // Gate and up: as the experts are known, what they multiply is; and their outputs may go to two places.
    static constexpr bool X_THERE = !ADDS;

    QMatrix matrix[MOST];      // gate and up, or one and none
    const float* x;            // one row
    const char* blocks[MOST];  // several rows, by order
    const ExpertsTask* whole;
    int rows, inputs, slots, orders;
    int rank;                  // of the thread blocks that divide the rows
    short gated, streams;
    u8 order[4];
    int slot[16];              // of each row
    const u32* inverse;        // one row, or 0: of Experts

    // Where the product that follows has a column of this one's output.
    __device__ __forceinline__ u32 place(int index, int column) const {
        if (ADDS) return 0;
        column += index * 32;
        return inverse && column < whole->n ? inverse[column] : column;
    }

    // `place`: of the column.
    __device__ __forceinline__ void finish(int r, int index, int column, float s, float up,
                                           u32 place = 0) const {
        const Epilogue e = {whole->out, nullptr, nullptr, whole->n, 0};
        if (gated) {
            const float v = finish_gated(e, e, whole->act, slot[r], index * 32 + column, s, up);
            if (!ADDS && whole->ordered && index * 32 + column < e.n) {
                whole->ordered[(long long)slot[r] * e.n + place] = v;
            }
        } else if (ADDS) {
            add_segments<SPLIT>(*whole, slot[r] * SPLIT + rank, index, column, s);
        } else {
            finish_linear(e, slot[r], index * 32 + column, s);
        }
    }

    // Fills the struct for a segment, unless it is another kernel's. By the whole block, behind a
    // barrier; another one must follow.
    __device__ __forceinline__ bool take(const ExpertsTask& task, const Segment& s,
                                         const Experts& experts, int split_rank = 0) {
        constexpr int WORDS = sizeof(QMatrix) / 8;
        if (u32(s.expert) >= u32(task.experts)) return false;
        const QMatrix* first = experts.of(s.expert, 0);
        if (!first) return false;
        for (int i = threadIdx.x; i < experts.parts * WORDS; i += blockDim.x) {
            const QMatrix* from = i < WORDS ? first : experts.of(s.expert, 1);
            reinterpret_cast<u64*>(&matrix[i / WORDS])[i % WORDS] =
                reinterpret_cast<const u64*>(from)[i % WORDS];
        }
        if (s.rows == 1 && task.ids) {
            if (threadIdx.x == 0) slot[0] = s.first;
        } else if (int(threadIdx.x) < s.rows) {
            slot[threadIdx.x] = task.sorted.slots[s.first + threadIdx.x];
        }
        if (threadIdx.x == blockDim.x - 1) {
            if (experts.parts == 1) matrix[1].columns = 0;
            const bool apart = experts.parts == 2 && first->perm != experts.of(s.expert, 1)->perm;
            const float* from = ADDS && task.ordered ? task.ordered : task.x;
            x = from + (task.by_slot ? (long long)s.first * task.inputs : 0);
            inverse = experts.inverses ? experts.inverses[s.expert] : nullptr;
            blocks[0] = task.blocks + (long long)s.first * task.row_bytes;
            blocks[1] = blocks[0] + task.part_bytes;
            whole = &task;
            rows = s.rows;
            inputs = task.inputs;
            slots = task.slots;
            gated = task.gated;
            streams = task.streams;
            orders = apart ? 2 : 1;
            order[0] = 0;
            order[1] = apart ? 1 : 0;
            order[2] = order[3] = 0;
            rank = split_rank;
        }
        return true;
    }
};

// Bytes of shared memory before what a product uses (lower/moe/few.rs: TASK_BYTES).
constexpr int TASK_BYTES = 1024;
// Of experts whose descriptors are staged, at most (lower/moe/few.rs: MOST_STAGED).
constexpr int MOST_ORDERED = 32;
static_assert(sizeof(SegmentTask<true>) + 8 * MOST_ORDERED <= TASK_BYTES, "both fit");
