// exl_qgemm_f16_*: products of 9 to 32 rows with quantized matrices, by clusters of eight thread
// blocks, with 16-bit floats.
//
// exl: arch sm_90a, sm_100
// exl: spills-allowed exl_qgemm_f16_rows32_exl2 between column tiles, not in the loop over weights
// exl: spills-allowed exl_qgemm_f16_rows32_gptq between column tiles, not in the loop over weights
//
// From some 9 rows on the exact sums of decode.cu take more time than the memory, and x no longer fits
// a multiprocessor's shared memory. Here weights become 16-bit floats as the format says, x is rounded
// to such, and the tensor cores sum in 32 bits. Each block of a cluster has an eighth of the rows of
// the matrix, hence an eighth of x, which stays in its shared memory. Its warps take column tiles in
// turn; what the blocks found is added through the cluster's shared memory, as many tiles at a time
// as there is room for.
//
// Expected bound: memory, K N bits / 8 bytes; about 3 instructions per 32 weights and row.
#include "common/bulk.cuh"
#include "qgemm/half_walk.cuh"
#include "qgemm/turn.cuh"

namespace {

constexpr int CLUSTER = 8;
constexpr int OWN_SHARES = SHARES / CLUSTER;   // shares of the rows that a block has

__device__ __forceinline__ u32 at_rank(u32 address, u32 rank) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
__device__ __forceinline__ float4 load_remote(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address));
    return v;
}

// Sums of four columns in all blocks of the cluster. Loading and adding are apart so that loads overlap.
struct Cells {
    float4 v[CLUSTER];

    __device__ __forceinline__ explicit Cells(const float* at) {
        const u32 own = smem_address(at);
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) v[i] = load_remote(at_rank(own, i));
    }
    __device__ __forceinline__ float4 sum() const {
        float4 s = v[0];
#pragma unroll
        for (int i = 1; i < CLUSTER; ++i) {
            s.x += v[i].x;
            s.y += v[i].y;
            s.z += v[i].z;
            s.w += v[i].w;
        }
        return s;
    }
};

// Adds up and stores four columns of row r of a column tile, from `column` on, from the cluster's sums
// at `sums`; gate and up: those of up at `up`.
__device__ __forceinline__ void finish(const Task& task, int index, int r, int column,
                                       const float* sums, const float* up) {
    const int at = sum_at(r, column);
    if (task.gated) {
        const float4 a = Cells(sums + at).sum(), b = Cells(up + at).sum();
        finish_gated(task.epilogue[0], task.epilogue[1], task.act, r, index * 32 + column, a, b);
        return;
    }
    const PartTile own = task.tile(index);
    finish_linear(task.epilogue[own.part], r, own.index * 32 + column, Cells(sums + at).sum());
}

// x of a block: blocks [first, end) of the packed rows.
struct Slice {
    int first, end;

    __device__ __forceinline__ Slice(const Task& task, int rank) : first(1 << 30), end(0) {
        const int parts = task.gated ? 2 : PARTS;
        for (int i = 0; i < parts; ++i) {
            const QMatrix& m = task.matrix[i];
            if (m.columns == 0) continue;
            first = min(first, int(m.shares[OWN_SHARES * rank]));
            end = max(end, int(m.shares[OWN_SHARES * (rank + 1)]));
        }
        first = min(first, end);
    }
    __device__ __forceinline__ int blocks() const { return end - first; }
};

template <int KIND, int NT>
__device__ __forceinline__ void qgemm(const Task& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    const int rows = task.rows;
    const int warp = uniform(threadIdx.x / WARP);
    const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
    const int clusters = gridDim.x / CLUSTER;
    const Slice slice(task, rank);

    // Shared memory: sums [slots][rows][32]; rings of the warps; x of each order.
    const int cell = rows * 32;
    float* sums = reinterpret_cast<float*>(shared);
    char* rings = reinterpret_cast<char*>(sums + task.slots * cell);
    char* x_all = rings + HALF_WARPS * HALF_RING;
    const int x_block = rows * X_ROW, x_stride = task.x_blocks * x_block;

    HalfWalk<KIND, NT> walk;
    walk.lane = threadIdx.x % WARP;
    walk.rows = rows;
    walk.x_block = x_block;
    walk.ring = rings + warp * HALF_RING;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        // Beyond the rows the last one is repeated; nobody reads those sums.
        walk.offset[n] = min(8 * n + (walk.lane >> 2), rows - 1) * X_ROW + (walk.lane & 3) * 16;
    }

    const int parts = task.gated ? 2 : PARTS;
    const Turn whole = Turn::of(cluster, task.tiles, task.each, clusters);
    const int mine = whole.from, mine_end = whole.to;
    const auto stage = [&] {
        pdl_wait();
#pragma unroll 1
        for (int order = 0; order < task.orders; ++order) {
            char* to = x_all + order * x_stride;
            const char* from = task.blocks[order] + (long long)slice.first * x_block;
            const int bytes = slice.blocks() * x_block;
            for (int i = 16 * threadIdx.x; i < bytes; i += 16 * blockDim.x) {
                cp_async_16(to + i, from + i);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    };

    bool staged = false;
    const int at_once = task.gated ? task.slots / 2 : task.slots;
#pragma unroll 1
    for (int from = mine; from < mine_end; from += at_once) {
        const int end = min(from + at_once, mine_end);
        // Through the block's rows of all parts. The first copies start before x is there.
        Cursor cursor = {};
        Tiles tiles = {};
        int part = -1, first = 0;   // the part's first tile; of gate and up: their sums' first slot
        bool add = false;
#pragma unroll 1
        while (true) {
            while (cursor.at >= cursor.end && part < parts) {
                if (part >= 0) first += task.gated ? end - from : task.matrix[part].columns;
                if (++part == parts) break;
                const QMatrix& m = task.matrix[part];
                // The warp's tiles among those of the part: one slot in HALF_WARPS.
                const int slot = task.gated ? first : max(first - from, 0);
                const int last = task.gated ? first + end - from
                                            : min(end, first + m.columns) - from;
                const int begin = slot + (warp - slot % HALF_WARPS + HALF_WARPS) % HALF_WARPS;
                const int count = max(last - begin + HALF_WARPS - 1, 0) / HALF_WARPS;
                if (count == 0) continue;
                tiles = {from + begin - first, count, HALF_WARPS, sums + begin * cell, HALF_WARPS * cell};
                walk.x = x_all + task.order[part] * x_stride - slice.first * x_block;
                cursor.enter(m, m.shares[OWN_SHARES * rank], m.shares[OWN_SHARES * (rank + 1)]);
                add = false;
                for (int i = 0; cursor.at >= cursor.end && i < count; ++i) {
                    for (int j = walk.lane; j < cell; j += WARP) tiles.sums[i * tiles.step + j] = 0;
                }
            }
            const bool more = part < parts;
            const Fold fold = more ? cursor.next() : Fold{{}, 0, 0, 1};
            Feed<true> feed(task.matrix[more ? part : 0], tiles, fold);
            const int left = feed.left;
            walk.open(feed);
            if (!staged) stage();
            staged = true;
            if (!more) break;
            walk.run(feed, tiles, fold.fold, left, add);
            add = true;
        }
        cluster_sync();

        // Each block adds up one tile in CLUSTER, a warp four rows at a time.
        const int quads = (rows + 3) / 4;
        for (int i = rank, q = warp; i < end - from; q -= quads, i += CLUSTER) {
            for (; q < quads; q += HALF_WARPS) {
                const int r = 4 * q + walk.lane / 8;
                const float* at = sums + i * cell;
                if (r >= rows) continue;
                finish(task, from + i, r, walk.lane % 8 * 4, at, at + (end - from) * cell);
            }
        }
        cluster_meet();   // nobody reads the sums any more
    }
}

}  // namespace

#define ENTRY(NAME, KIND, NT)                                                                      \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)                                    \
        __launch_bounds__(HALF_WARPS* WARP, 1) NAME(const __grid_constant__ Task task) {          \
        qgemm<KIND, NT>(task);                                                                    \
    }
ENTRY(exl_qgemm_f16_rows16_exl2, KIND_EXL2, 2)
ENTRY(exl_qgemm_f16_rows16_gptq, KIND_GPTQ, 2)
ENTRY(exl_qgemm_f16_rows32_exl2, KIND_EXL2, 4)
ENTRY(exl_qgemm_f16_rows32_gptq, KIND_GPTQ, 4)

// Several rows of x, gathered by a permutation and rounded to 16-bit floats: [blocks][rows][32], every
// four in the order of `half_place`. One warp per row and 128 columns.
extern "C" __global__ void __launch_bounds__(256)
    exl_block_x_f16(const float* x, const u32* perm, char* out, int rows, int inputs) {
    pdl_launch();
    const int lane = threadIdx.x % WARP, row = blockIdx.y;
    const int chunk = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int k = 128 * chunk + 4 * lane;
    const uint4 from = features(perm, k, inputs);
    pdl_wait();
    if (k >= inputs) return;
    float v[4];
    gather(v, x + (long long)row * inputs, from, k, inputs);
    u16 h[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) h[half_place(i)] = __half_as_ushort(to_half_sat(v[i]));
    const ushort4 all = make_ushort4(h[0], h[1], h[2], h[3]);
    *reinterpret_cast<ushort4*>(out + ((long long)(k / 32) * rows + row) * X_ROW + k % 32 * 2) = all;
}
