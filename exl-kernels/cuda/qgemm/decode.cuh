// A product of up to 32 rows with quantized matrices, by whole thread blocks: the exact sums of walk.cuh.
//
// A thread block takes consecutive column tiles (tile.cuh); each of its warps takes one share of the
// rows of all of them (walk.cuh) and keeps sums of its own in shared memory, which are added in the
// warps' order: a row's result depends on nothing but the row.
//
// T: what is computed, a Task (task.cuh) or what looks like one.
#pragma once

#include "qgemm/turn.cuh"

// Sum of one cell over the warps. Two shares first, as a warp that has both would add them.
template <int WARPS>
__device__ __forceinline__ float add_up(const float* at, int stride) {
    constexpr int PARTS = WARPS * 2 / SHARES;
    float s = 0.0f;
#pragma unroll 4
    for (int i = 0; i < WARPS; i += PARTS) {
        float both = at[i * stride];
        if (PARTS > 1) both += at[(i + 1) * stride];
        s += both;
    }
    return s;
}

// Column tiles `mine` of all parts. `shared` has room for: sums [slots][warps][rows][32]; rings of the warps;
// x of each order, or its scales and sums and then rings.
template <int KIND, int NT, typename T>
__device__ __forceinline__ void few_rows(const T& task, const Turn& mine, char* shared) {
    const int rows = task.rows;
    constexpr int warps = WARPS<NT>, each = SHARES / warps;
    const int warp = uniform(threadIdx.x / WARP);
    const XBytes x_bytes(rows, task.inputs);
    float* sums = reinterpret_cast<float*>(shared);
    char* rings = shared + task.slots * warps * rows * 128;
    char* x_all = rings + warps * RING<NT>;
    constexpr bool SUMS = KIND == KIND_GPTQ;
    const int kept = task.streams ? x_bytes.scales : 0;   // bytes of x that are not here
    const int x_stride = (SUMS ? x_bytes.all : x_bytes.sums) - kept;

    Walk<NT> walk;
    walk.lane = threadIdx.x % WARP;
    walk.rows = rows;
    walk.x_block = rows * X_ROW;
    walk.streams = task.streams;
    const int t = walk.lane & 3, g = walk.lane >> 2;
    u32 offset[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        // Beyond the rows the last one is repeated; nobody reads those sums.
        offset[n] = min(4 * n + (g >> 1), rows - 1) * X_ROW + (g & 1) * 32 + t * 8;
        walk.row[n] = min(4 * n + t, rows - 1);
    }
    walk.ring = rings + warp * RING<NT>;
    char* x_ring = x_all + task.orders * x_stride + warp * (SLOTS<NT> * X_UNIT * rows * X_ROW);
    walk.x_ring = x_ring + 16 * walk.lane;

    const int parts = task.gated ? 2 : T::MOST;
    const auto stage = [&] {
        pdl_wait();
#pragma unroll 1
        for (int order = 0; order < task.orders; ++order) {
            char* at = x_all + order * x_stride;
            const char* from = task.blocks[order] + kept;
            for (int i = 16 * threadIdx.x; i < x_stride; i += 16 * blockDim.x) {
                cp_async_16(at + i, from + i);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    };
    if (walk.streams) pdl_wait();   // the first copies are of x too

    bool staged = false;
    const int at_once = task.gated ? task.slots / 2 : task.slots;
#pragma unroll 1
    for (int from = mine.from; from < mine.to; from += at_once) {
        const Turn turn = {from, min(from + at_once, mine.to)};
        const int count = (turn.to - turn.from) * (task.gated ? 2 : 1);
        for (int slot = 0; slot < count; ++slot) {
            float* own = sums + (slot * warps + warp) * rows * 32;
            for (int i = walk.lane; i < rows * 32; i += WARP) own[i] = 0.0f;
        }
        __syncwarp();
        // Through all parts, and in each through the warp's shares. The first copies start before x
        // is there.
        Cursor cursor = {};
        Tiles tiles = {};
        int part = -1, first = 0, share = each;
#pragma unroll 1
        while (true) {
            while (cursor.at >= cursor.end && part < parts) {
                if (share == each) {
                    if (part >= 0 && !task.gated) first += task.matrix[part].columns;
                    if (++part == parts) break;
                    tiles = turn.tiles(first, task.matrix[part].columns);
                    share = tiles.count > 0 ? 0 : each;
                    if (share == each) continue;
                    const int slot = task.gated ? part : tiles.step;
                    tiles.sums = sums + (slot * warps + warp) * rows * 32;
                    tiles.step = (task.gated ? 2 : 1) * warps * rows * 32;
                    const char* x_at = x_all + task.order[part] * x_stride - kept;
                    const char* x_base = walk.streams ? x_ring : x_at;
#pragma unroll
                    for (int n = 0; n < NT; ++n) walk.x[n] = x_base + offset[n];
                    walk.scales = reinterpret_cast<const float*>(x_at + x_bytes.scales);
                    walk.x_sums = reinterpret_cast<const int*>(x_at + x_bytes.sums);
                    walk.from = task.blocks[task.order[part]] + 16 * walk.lane;
                }
                const QMatrix& m = task.matrix[part];
                const int i = warp * each + share++;
                cursor.enter(m, m.shares[i], m.shares[i + 1]);
            }
            const bool more = part < parts;
            const Fold fold = more ? cursor.next() : Fold{{}, 0, 0, 1};
            Feed<false> feed(task.matrix[more ? part : 0], tiles, fold);
            const int left = feed.left;
            walk.template open<KIND>(feed);
            if (!staged) stage();
            staged = true;
            if (!more) break;
            walk.template run<KIND>(feed, tiles, fold.fold, left);
        }
        __syncthreads();

        const int stride = rows * 32;   // between the sums of warps
        for (int i = warp; i < (turn.to - turn.from) * rows; i += warps) {
            const int j = i / rows, r = i % rows, tile = turn.from + j;
            const auto known = task.known(r, tile, walk.lane);
            const float* at = sums + j * (task.gated ? 2 : 1) * warps * stride + r * 32 + walk.lane;
            const float s = add_up<warps>(at, stride);
            const float up = task.gated ? add_up<warps>(at + warps * stride, stride) : 0.0f;
            task.finish(r, tile, walk.lane, s, up, known);
        }
        if (turn.to < mine.to) __syncthreads();
    }
}
