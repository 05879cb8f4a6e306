// exl_moe_wgmma*: products of segments of many rows with their experts' quantized matrices, by
// warpgroups.
//
// exl: arch sm_90a
//
// What tile.cu computes, in the same way but for who multiplies: a warpgroup has four column tiles of 32,
// one of each warp, whose weights are the first operand in registers, and all rows of the segment are the
// second one in shared memory. The two warpgroups of a block take turns: one expands weights while the
// other multiplies. Bound: the rate of wgmma, or that of expanding weights; 128 rows for each.
//
// x lies as exl_moe_block_x_wgmma left it: rows of 64 columns in the swizzled order of wgmma, so that
// plain copies bring it. The two warpgroups of a block have eight neighbouring tiles, or the first has
// gate's and the second up's, which passes its sums on through shared memory.
#include "common/bulk.cuh"
#include "common/wgmma.cuh"
#include "moe/stream.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int TILES = 4;      // column tiles of a warpgroup
constexpr int STAGES = 4;     // of 64 columns of x
constexpr int UNDER_WAY = 2;  // stages that are copied while others are used
constexpr int LINE = 128;     // bytes of a row of a stage

// NT: eighths of the rows of a segment. Lane 4g + t has columns g, g + 8, g + 16, g + 24 of its warp's tile
// and rows 8n + 2t and + 1.
template <int KIND, int NT>
struct Groups {
    static constexpr int ROWS = 8 * NT;
    static constexpr int X_STAGE = ROWS * LINE;   // bytes, of one order

    typedef Operands<ROWS> Own;

    const TileTask& task;
    Own& own;
    char* x;   // shared: [STAGES][orders][ROWS][128], aligned to 1024
    int lane, warp;

    __device__ __forceinline__ void fetch(int chunk, int chunks, int stage) const {
        const int bytes = own.rows * LINE;
        for (int order = 0; order < own.orders && chunk < chunks; ++order) {
            const char* source = own.x + order * task.part_bytes + (long long)chunk * bytes;
            char* to = x + (stage * task.orders + order) * X_STAGE;
            for (int o = 16 * threadIdx.x; o < bytes; o += 16 * THREADS) {
                cp_async_16(to + o, source + o);
            }
        }
        cp_async_commit();
    }

    // Stores the sums of a warp's tile; of gate: what becomes of them with those of up.
    __device__ __forceinline__ void store(int column, const float (&total)[2][NT][4],
                                          const float* up) const {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = 8 * n + 2 * t + (i & 1), k = 32 * column + 8 * (i >> 1) + g;
                if (r >= own.rows || k >= task.n) continue;
                float v = total[i >> 2][n][i & 3];
                if (up) v = activate(v, task.act) * up[(8 * n + i) * GROUP];
                task.out[(long long)own.slot[r] * task.n + k] = v;
            }
        }
    }

    // Column tiles from `first` on; of gate and up as many of each.
    __device__ __forceinline__ void run(int first) const {
        const bool gated = task.gated;
        const int part = gated ? warp / TILES : 0;
        // Columns beyond the matrix are computed as the last one, and not stored.
        const int column = first + (gated ? warp % TILES : warp);
        const int chunks = (task.inputs + 63) / 64, blocks = task.inputs / 32;
        for (int s = 0; s < UNDER_WAY; ++s) fetch(s, chunks, s);
        Stream<KIND> stream;
        stream.start(own.matrix[part], min(column, task.columns - 1), lane);
        float total[2][NT][4];   // [column half][..]: column g: two rows; column g + 8
        const u32 at = smem_address(x) + (part && own.orders > 1 ? X_STAGE : 0);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            cp_async_wait<UNDER_WAY - 1>();
            shared_written();
            __syncthreads();
            // Goes where the chunk before the last one was, whose products are done.
            fetch(chunk + UNDER_WAY, chunks, (chunk + UNDER_WAY) % STAGES);
            const u64 b = operand(at + chunk % STAGES * task.orders * X_STAGE);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int block = 2 * chunk + i;
                if (block == blocks) break;
                u32 a[2][2][4];
                wgmma_wait<0>();   // the operands are free
                stream.expand(a);
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < 2; ++step) {
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        wgmma(total[m], a[m][step], b + 4 * i + 2 * step, block > 0 || step > 0);
                    }
                }
                wgmma_commit();
                if (block + 1 < blocks) stream.load(block + 1, lane);
            }
        }
        wgmma_wait<0>();
        cp_async_wait<0>();
        if (!gated) return store(column, total, nullptr);
        // Sums of up take the place of x.
        float* sums = reinterpret_cast<float*>(x) + threadIdx.x % GROUP;
        __syncthreads();
        if (part) {
#pragma unroll
            for (int i = 0; i < 8 * NT; ++i) sums[i * GROUP] = total[i >> 2 & 1][i / 8][i & 3];
        }
        __syncthreads();
        if (!part) store(column, total, sums);
    }

    __device__ __forceinline__ void run_all() const {
        const int each = task.gated ? TILES : 2 * TILES;
        const int per_segment = (task.columns + each - 1) / each;
        own.each_item(task, per_segment, [&](int first) { run(first * each); });
    }
};

template <int KIND, int NT>
__device__ __forceinline__ void groups(const TileTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef Groups<KIND, NT> T;
    static_assert(STAGES * T::X_STAGE >= 4 * 8 * NT * GROUP, "sums of up fit");
    pdl_launch();
    typedef typename T::Own Own;
    const u32 base = smem_address(shared);
    char* x = shared + (((base + 1023) & ~1023u) - base);
    Own& own = *reinterpret_cast<Own*>(x + STAGES * task.orders * T::X_STAGE);
    const T work = {task, own, x, int(threadIdx.x) % WARP,
                    __shfl_sync(FULL_MASK, int(threadIdx.x) / WARP, 0)};
    pdl_wait();
    work.run_all();
}

}  // namespace

// Shared memory (lower/moe/tile.rs): 1024 + 432 + 4 ROWS + STAGES * orders * ROWS * 128 bytes.
#define ENTRY(NAME, KIND, NT)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        NAME(const __grid_constant__ TileTask task) {                                             \
        groups<KIND, NT>(task);                                                                   \
    }
// 64 and 128 rows.
ENTRY(exl_moe_wgmma64_exl2, KIND_EXL2, 8)
ENTRY(exl_moe_wgmma64_gptq, KIND_GPTQ, 8)
ENTRY(exl_moe_wgmma128_exl2, KIND_EXL2, 16)
ENTRY(exl_moe_wgmma128_gptq, KIND_GPTQ, 16)
