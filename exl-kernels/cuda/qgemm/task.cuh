// What one launch of a product of few rows computes.
#pragma once

#include "qgemm/epilogue.cuh"
#include "qgemm/router_sums.cuh"
#include "qgemm/walk.cuh"

constexpr int PARTS = 3;

// A column tile of one of the parts.
struct PartTile {
    int part, index;
};

// What one launch computes. The host fills this struct word by word: lower/linear/few.rs.
struct Task {
    static constexpr int MOST = PARTS;
    static constexpr int ROUNDS = 4;   // of loads that overlap when one row is staged
    static constexpr int SPLIT = 1;    // thread blocks that divide the rows of the same columns
    static constexpr bool SPARING = true;   // whether the last slot of a ring waits until x has been loaded
    static constexpr bool X_THERE = false;   // whether x is loaded before weights are asked for

    QMatrix matrix[PARTS];
    Epilogue epilogue[PARTS];   // gate and up: of the gate; the second holds the other bias
    const float* x;             // one row: [inputs]
    union {
        const char* blocks[PARTS];  // several rows: what exl_block_x leaves, by order
        RouterSums router;          // one row, if `wants` has experts
        struct {
            const u32* order;       // gate and up of an OrderedTask: where the product behind this one has its
            float* ordered;         // inputs, or 0, and what that reads
        } next;
    };
    int rows, inputs;
    int tiles;                  // column tiles of all parts; pairs of them
    int slots;                  // tiles of a thread block at a time, whose sums fit shared memory
    short gated, act, streams, orders;
    u8 order[PARTS + 1];        // of the permutations, which one a part has
    int x_blocks;               // cluster.cu: blocks of x of a thread block, at most; whole chunks
    int each;                   // tiles of a thread block (of a cluster), or one more
    RouterKind wants;           // one row of one part: the router that wants sums, if any does

    // Whose tile it is that has this index among those of all parts.
    __device__ __forceinline__ PartTile tile(int index) const {
        int part = 0;
        while (part < PARTS - 1 && index >= matrix[part].columns) index -= matrix[part++].columns;
        return {part, index};
    }
    // What finish() needs beside the sum, of row r in a column of the tile with this index among those of all
    // parts.
    typedef Addends Known;
    __device__ __forceinline__ Known known(int r, int index, int column) const {
        if (gated) return addends_of(epilogue[0], epilogue[1], index * 32 + column);
        const PartTile own = tile(index);
        if (wants.experts > 0) router.prefetch(wants, epilogue[0].n, index);
        return addends_of(epilogue[own.part], r, own.index * 32 + column);
    }
    // Stores the sum, gate and up with the sum of up, and returns what is stored.
    __device__ __forceinline__ float finish(int r, int index, int column, float s, float up,
                                           const Known& known) const {
        if (gated) {
            return finish_gated(epilogue[0], act, r, index * 32 + column, s, up, known);
        }
        const PartTile own = tile(index);
        const float v = finish_linear(epilogue[own.part], r, own.index * 32 + column, s, known);
        if (wants.experts > 0) router.leave(wants, epilogue[0].n, {index, tiles}, v);
        return v;
    }
};

// Of one row whose x is in the order that all parts have. What gate and up compute may be left so, too.
struct OrderedTask : Task {
    struct Known {
        Addends addends;
        u32 place;
    };
    __device__ __forceinline__ bool has_place(int column) const {
        return gated && next.order && column < epilogue[0].n;
    }
    __device__ __forceinline__ Known known(int, int index, int column) const {
        const int at = index * 32 + column;
        return {Task::known(0, index, column), has_place(at) ? next.order[at] : 0};
    }
    __device__ __forceinline__ void finish(int, int index, int column, float s, float up,
                                           const Known& known) const {
        const float v = Task::finish(0, index, column, s, up, known.addends);
        if (has_place(index * 32 + column)) next.ordered[known.place] = v;
    }
};
