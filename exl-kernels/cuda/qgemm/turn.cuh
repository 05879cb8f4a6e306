// What a thread block of a product of few rows does in a turn, and what it asks for at its end.
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

// Asks for weights of the product that follows, the first that the thread block of this number will want
// (of a product by clusters, some that its cluster will want):
// the memory would rest while sums are added, other kernels run, and the next input is prepared.
template <typename T>
__device__ __forceinline__ void prefetch_next(const T& task) {
    if (int(blockIdx.x) >= task.next_grid) return;
    int all = task.next[0].columns;
    if (!task.next_gated) all += task.next[1].columns + task.next[2].columns;
    const Turn mine =
        Turn::of(int(blockIdx.x), all, all / task.next_grid, task.next_grid);
    for (int part = 0, first = 0; part < PARTS; ++part) {
        const NextPart& n = task.next[part];
        const Tiles tiles = mine.tiles(first, n.columns);
        if (!task.next_gated) first += n.columns;
        const u32 bytes = min(u32(tiles.count) * n.column_bytes, task.next_bytes);
        if (bytes > 0) prefetch_l2(n.tiles + u64(n.column_bytes) * tiles.column, bytes);
    }
}
