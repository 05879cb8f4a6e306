// exl_moe_tile*: products of segments of many rows with their experts' quantized matrices, on tensor
// cores, for prompts.
//
// What: gate and up with the activation between them, or one matrix. An expert has few of a prompt's
// rows, so weights are not expanded in memory: a thread expands those of a block as operands of
// mma.m16n8k16, 16-bit floats as the format rounds them, x is rounded to 16 bits, sums have 32. Reads
// the packed weights of experts that have rows once per segment. Bound: the rate of mma.sync; 1.5 to 2.4
// instructions per product of 16 columns, 8 rows and 16 deep.
//
// A thread block has 32, 64 or 128 rows of one expert, each of its warps two column tiles of 32: gate's
// and up's, or two neighbours. Weights come from memory straight to registers, one block of 32 packed rows
// ahead, and by prefetch to L2 far ahead; x comes through a ring of stages in shared memory, in the order
// that exl_moe_block_x_f16 left. Each sum is added up in one order, whatever the segment.

#include "moe/stream.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int STEP = 2;     // blocks of a stage
constexpr int STAGES = 3;

// GROUPS: of warps that share rows. NT: eighths of the rows of a group. Lane 4g + t has columns g, g + 8,
// g + 16, g + 24 of a tile and rows 8n + 2t and + 1.
template <int KIND, int NT, int GROUPS>
struct Tile {
    static constexpr int ROWS = 8 * NT * GROUPS;
    static constexpr int PAIRS = WARPS / GROUPS;      // pairs of column tiles of a block
    static constexpr int X_BLOCK = ROWS * X_ROW;      // bytes
    static constexpr int X_STAGE = STEP * X_BLOCK;    // of one order

    typedef Operands<ROWS> Own;

    const TileTask& task;
    Own& own;
    char* x;   // shared: [STAGES][orders][STEP][ROWS][64]
    int lane, warp;

    // Starts the copies of a stage: blocks from `block` on.
    __device__ __forceinline__ void fetch(int block, int stage) const {
        const int bytes = own.rows * X_ROW;
        for (int order = 0; order < own.orders; ++order) {
            for (int i = 0; i < STEP && block + i < task.inputs / 32; ++i) {
                const char* source =
                    own.x + order * task.part_bytes + (long long)(block + i) * bytes;
                char* to = x + (stage * task.orders + order) * X_STAGE + i * X_BLOCK;
                for (int o = 16 * threadIdx.x; o < bytes; o += 16 * THREADS) {
                    cp_async_16(to + o, source + o);
                }
            }
        }
        cp_async_commit();
    }

    // Pairs of column tiles from `first` on.
    __device__ __forceinline__ void run(int first) const {
        const int group = warp / PAIRS;
        const bool gated = task.gated;
        // Columns beyond the matrix are computed as the last one, and not stored.
        const int pair = first + warp % PAIRS, last = task.columns - 1;
        const int column[2] = {min(gated ? pair : 2 * pair, last), min(gated ? pair : 2 * pair + 1, last)};
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) fetch(s * STEP, s);

        Stream<KIND> stream[2];
        stream[0].start(own.matrix[0], column[0], lane);
        stream[1].start(own.matrix[gated ? 1 : 0], column[1], lane);
        const int blocks = task.inputs / 32;
        const bool apart = own.orders > 1;
        float total[2][2][NT][4] = {};   // [tile][column half][..]: column g: two rows; column g + 8
        // Beyond the rows whatever lies there is multiplied; nobody reads those sums.
        const u32 offset = group * NT * 8 * X_ROW + (lane >> 2) * X_ROW + (lane & 3) * 16;
        int stage = 0, fill = STAGES - 1;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            if (block % STEP == 0) {
                if (block > 0) stage = stage + 1 == STAGES ? 0 : stage + 1;
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                // Goes where the stage before was.
                fetch(block + (STAGES - 1) * STEP, fill);
                fill = fill + 1 == STAGES ? 0 : fill + 1;
            }
            u32 a[2][2][2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                stream[i].expand(a[i]);
                if (block + 1 < blocks) stream[i].load(block + 1, lane);
            }
            const char* at = x + stage * task.orders * X_STAGE + block % STEP * X_BLOCK + offset;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                // Half of x at a time: registers are scarce.
                if (n == NT / 2) __syncwarp();
                uint4 b = *reinterpret_cast<const uint4*>(at + n * 8 * X_ROW);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (i == 1 && apart) {
                        b = *reinterpret_cast<const uint4*>(at + X_STAGE + n * 8 * X_ROW);
                    }
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        mma_f16(total[i][m][n], a[i][m][0], b.x, b.y);
                        mma_f16(total[i][m][n], a[i][m][1], b.z, b.w);
                    }
                }
            }
        }
        cp_async_wait<0>();

        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = group * NT * 8 + 8 * n + 2 * t + (i & 1), c = 8 * (i >> 1) + g;
                if (r >= own.rows) continue;
                float* to = task.out + (long long)own.slot[r] * task.n;
                const float v = total[0][i >> 2][n][i & 3], w = total[1][i >> 2][n][i & 3];
                if (gated) {
                    const int k = 32 * pair + c;
                    if (k < task.n) to[k] = activate(v, task.act) * w;
                } else {
                    const int k = 64 * pair + c;
                    if (k < task.n) to[k] = v;
                    if (k + 32 < task.n) to[k + 32] = w;
                }
            }
        }
    }

    __device__ __forceinline__ void run_all() const {
        const int pairs = task.gated ? task.columns : (task.columns + 1) / 2;
        const int per_segment = (pairs + PAIRS - 1) / PAIRS;
        own.each_item(task, per_segment, [&](int first) { run(first * PAIRS); });
    }
};

template <int KIND, int NT, int GROUPS>
__device__ __forceinline__ void tile(const TileTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef Tile<KIND, NT, GROUPS> T;
    pdl_launch();
    typedef typename T::Own Own;
    static_assert(sizeof(Own) % 16 == 0, "x is aligned");
    const T tile = {task, *reinterpret_cast<Own*>(shared), shared + sizeof(Own),
                    int(threadIdx.x) % WARP, __shfl_sync(FULL_MASK, int(threadIdx.x) / WARP, 0)};
    pdl_wait();
    tile.run_all();
}

}  // namespace

// Shared memory (lower/moe/tile.rs): 432 + 4 ROWS + STAGES * orders * STEP * ROWS * 64 bytes.
#define ENTRY(NAME, KIND, NT, GROUPS)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        NAME(const __grid_constant__ TileTask task) {                                             \
        tile<KIND, NT, GROUPS>(task);                                                             \
    }
// As many rows for each expanded weight as registers allow; GPTQ's zero points take some.
ENTRY(exl_moe_tile32_exl2, KIND_EXL2, 4, 1)
ENTRY(exl_moe_tile32_gptq, KIND_GPTQ, 4, 1)
ENTRY(exl_moe_tile64_exl2, KIND_EXL2, 8, 1)
ENTRY(exl_moe_tile64_gptq, KIND_GPTQ, 4, 2)
ENTRY(exl_moe_tile128_exl2, KIND_EXL2, 8, 2)
ENTRY(exl_moe_tile128_gptq, KIND_GPTQ, 4, 4)
