// The experts of a layer, and which rows they have.
//
// A row slot is one of a row's experts: slot r * top_k + j. The slots of an expert are cut into segments
// of at most so many rows, each of which is multiplied as a whole (sort.cu).
#pragma once

#include "common/common.cuh"

// Most experts of a layer (lower/moe.rs: MOST_EXPERTS).
constexpr int MOST_EXPERTS = 1024;

// Some slots of one expert.
struct __align__(16) Segment {
    int expert;
    int first, rows;   // in the sorted slots
    u16 index, all;    // number of this segment among those of the expert, and how many there are
};

// What exl_moe_sort leaves in scratch memory (lower/moe/sort.rs).
struct Sorted {
    const int* counts;         // segments; slots of all of them
    const Segment* segments;   // in the order of their experts
    const int* slots;          // sorted by expert
    const int* segment_of;     // of each sorted slot

    __device__ __forceinline__ int segment_count() const { return counts[0]; }
    __device__ __forceinline__ int slot_count() const { return counts[1]; }
};

// Consecutive units, `per_segment` of each segment: what a thread block does.
struct Share {
    int from, to;

    // Of `segments` segments. With few of them no block has units of two: it would have to prepare two
    // inputs.
    __device__ __forceinline__ static Share of(int segments, int per_segment) {
        const int blocks = gridDim.x, block = blockIdx.x;
        if (2 * segments <= blocks) {
            const int each = blocks / segments, segment = block / each;
            if (segment >= segments) return {0, 0};
            const Share own = even(block % each, per_segment, each);
            return {segment * per_segment + own.from, segment * per_segment + own.to};
        }
        return even(block, segments * per_segment, blocks);
    }
    __device__ __forceinline__ static Share even(int index, int units, int workers) {
        const int each = units / workers, more = units - each * workers;
        const int from = index * each + min(index, more);
        return {from, from + each + (index < more ? 1 : 0)};
    }
};
