// What a thread block of a product of few rows does in a turn.
#pragma once

#include "qgemm/task.cuh"

// Column tiles [from, to) of all parts: what a thread block does in a turn.
struct Turn {
    int from, to;

    // The share of worker `index`: `each` tiles, and one more for the first of them until all are given
    // away.
    __device__ __forceinline__ static Turn of(int index, int tiles, int each, int workers) {
        const int more = tiles - each * workers, from = index * each + min(index, more);
        return {from, from + each + (index < more ? 1 : 0)};
    }
    // Those among `count` tiles from `first` on, which are one matrix. Their sums are at slot
    // `step`.
    __device__ __forceinline__ Tiles tiles(int first, int count) const {
        const int begin = max(from, first), end = min(to, first + count);
        return {begin - first, max(end - begin, 0), 1, nullptr, begin - from};
    }
};
