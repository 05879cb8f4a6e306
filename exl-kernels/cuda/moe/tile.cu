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

#include "moe/experts.cuh"
#include "qgemm/epilogue.cuh"
#include "qgemm/half.cuh"
#include "qgemm/input.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int STEP = 2;     // blocks of a stage
constexpr int STAGES = 3;
constexpr u32 AHEAD = 4096; // bytes from the weights in use to those asked for

// The host fills this struct word by word: lower/moe/tile.rs.
struct TileTask {
    const QMatrix* const* table;   // [experts][gate and up, or one]; 0: not this kernel's
    Sorted sorted;
    const char* x;                 // what exl_moe_block_x_f16 leaves
    long long part_bytes;          // of that, of all slots in one order
    float* out;                    // [slots, n]
    int inputs, n;
    int columns;                   // column tiles of a matrix
    int orders;                    // of x, for which there is shared memory
    short gated, act;
};

// The weights of a column tile on their way: those of the next block are in registers.
template <int KIND>
struct Stream {
    const QMatrix* m;
    const char* first;   // the tile's
    u32 offset;          // of the next block
    u32 place;           // column * pieces
    int run;             // that has it
    int bits;
    u32 words[8];
    ScaleCodes<KIND> codes;

    __device__ __forceinline__ void start(const QMatrix& matrix, int column, int lane) {
        m = &matrix;
        first = m->tiles + m->column_bytes * column;
        offset = 0;
        place = column * m->pieces;
        run = 0;
        ask(128 * lane);
        load(0, lane);
    }
    // Asks for the line that has a byte of the tile.
    __device__ __forceinline__ void ask(u32 at) const {
        if (at < m->column_bytes) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(first + at));
        }
    }
    // Loads a block, which follows the one before.
    __device__ __forceinline__ void load(int block, int lane) {
        if (block >= m->run[run].end) ++run;
        const Run r = m->run[run];
        bits = r.bits;
        const char* at = first + offset;
        offset += 128 * bits;
        codes = ScaleCodes<KIND>::of(*m, place, piece_of(*m, r, block), lane >> 2);
        switch (bits) {
            case 2: load_words<2>(words, at, lane); break;
            case 3: load_words<3>(words, at, lane); break;
            case 4: load_words<4>(words, at, lane); break;
            case 5: load_words<5>(words, at, lane); break;
            case 6: load_words<6>(words, at, lane); break;
            default: load_words<8>(words, at, lane); break;
        }
        if (lane < bits) ask(offset + AHEAD + 128 * lane);
    }
    // The block as operands [column half][step of 16 rows].
    __device__ __forceinline__ void expand(u32 (&a)[2][2][4]) const {
        __half2 v[8][2];
        if constexpr (KIND == KIND_GPTQ) {
            expand_halves<4>(words, v);
        } else {
            switch (bits) {
                case 2: expand_halves<2>(words, v); break;
                case 3: expand_halves<3>(words, v); break;
                case 4: expand_halves<4>(words, v); break;
                case 5: expand_halves<5>(words, v); break;
                case 6: expand_halves<6>(words, v); break;
                default: expand_halves<8>(words, v); break;
            }
        }
        // Behind the switch: inside of it ptxas 12.9 dies of this for sm_120.
        const HalfScales<KIND> scales(codes);
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const int column = 2 * (q >> 2) + (q & 1);
            u32(&to)[4] = a[q >> 2][q >> 1 & 1];
            to[q & 1] = as_u32(scales.weight(v[q][0], column));
            to[2 + (q & 1)] = as_u32(scales.weight(v[q][1], column));
        }
    }
};

// GROUPS: of warps that share rows. NT: eighths of the rows of a group. Lane 4g + t has columns g, g + 8,
// g + 16, g + 24 of a tile and rows 8n + 2t and + 1.
template <int KIND, int NT, int GROUPS>
struct Tile {
    static constexpr int ROWS = 8 * NT * GROUPS;
    static constexpr int PAIRS = WARPS / GROUPS;      // pairs of column tiles of a block
    static constexpr int X_BLOCK = ROWS * X_ROW;      // bytes
    static constexpr int X_STAGE = STEP * X_BLOCK;    // of one order

    // Rows of the output, and the matrices.
    struct Own {
        QMatrix matrix[2];
        int slot[ROWS];
    };

    const TileTask& task;
    Own& own;
    char* x;   // shared: [STAGES][orders][STEP][ROWS][64]
    int lane, warp;

    // What a block of the grid computes: pair of column tiles `first` and on, of a segment.
    struct Item {
        Segment segment;
        int first;
    };

    // Those of one expert that have the same columns follow each other.
    __device__ __forceinline__ Item item(int index, int per_segment) const {
        Segment s = task.sorted.segments[index / per_segment];
        const int begin = index / per_segment - s.index;   // the expert's first segment
        const int within = index - begin * per_segment;
        s = task.sorted.segments[begin + within % s.all];
        return {s, within / s.all * PAIRS};
    }

    // Starts the copies of a stage: blocks from `block` on.
    __device__ __forceinline__ void fetch(const char* from, int orders, int rows, int block,
                                          int blocks, int stage) const {
        for (int order = 0; order < orders; ++order) {
            for (int i = 0; i < STEP && block + i < blocks; ++i) {
                const char* source =
                    from + order * task.part_bytes + (long long)(block + i) * rows * X_ROW;
                char* to = x + (stage * task.orders + order) * X_STAGE + i * X_BLOCK;
                for (int o = 16 * threadIdx.x; o < rows * X_ROW; o += 16 * THREADS) {
                    cp_async_16(to + o, source + o);
                }
            }
        }
        cp_async_commit();
    }

    // By the whole block, behind a barrier; another one must follow. False when it is another kernel's.
    __device__ __forceinline__ bool take(const Segment& s) const {
        constexpr int WORDS = sizeof(QMatrix) / 8;
        const int parts = task.gated ? 2 : 1;
        const QMatrix* const* from = task.table + s.expert * parts;
        if (!from[0]) return false;
        for (int i = threadIdx.x; i < parts * WORDS; i += THREADS) {
            const u64* words = reinterpret_cast<const u64*>(from[i / WORDS]);
            reinterpret_cast<u64*>(&own.matrix[i / WORDS])[i % WORDS] = words[i % WORDS];
        }
        for (int r = threadIdx.x; r < s.rows; r += THREADS) {
            own.slot[r] = task.sorted.slots[s.first + r];
        }
        return true;
    }

    __device__ __forceinline__ void run(const Item& item) const {
        const int rows = item.segment.rows, group = warp / PAIRS;
        const bool gated = task.gated;
        // Columns beyond the matrix are computed as the last one, and not stored.
        const int pair = item.first + warp % PAIRS, last = task.columns - 1;
        const int column[2] = {min(gated ? pair : 2 * pair, last), min(gated ? pair : 2 * pair + 1, last)};
        const QMatrix& up = own.matrix[gated ? 1 : 0];
        const int orders = up.perm != own.matrix[0].perm ? 2 : 1;
        const int blocks = task.inputs / 32;
        const char* from = task.x + 2ll * item.segment.first * task.inputs;
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) fetch(from, orders, rows, s * STEP, blocks, s);

        Stream<KIND> stream[2];
        stream[0].start(own.matrix[0], column[0], lane);
        stream[1].start(up, column[1], lane);
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
                fetch(from, orders, rows, block + (STAGES - 1) * STEP, blocks, fill);
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
                uint4 b = *reinterpret_cast<const uint4*>(at + n * 8 * X_ROW);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (i == 1 && orders > 1) {
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
                if (r >= rows) continue;
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
        const int all = task.sorted.segment_count() * per_segment;
#pragma unroll 1
        for (int index = blockIdx.x; index < all; index += gridDim.x) {
            const Item next = item(index, per_segment);
            __syncthreads();   // the item before is done
            if (!take(next.segment)) continue;
            __syncthreads();
            run(next);
        }
    }
};

template <int KIND, int NT, int GROUPS>
__device__ __forceinline__ void tile(const TileTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef Tile<KIND, NT, GROUPS> T;
    pdl_launch();
    typename T::Own& own = *reinterpret_cast<typename T::Own*>(shared);
    const T tile = {task, own, shared + sizeof(typename T::Own), int(threadIdx.x) % WARP,
                    __shfl_sync(FULL_MASK, int(threadIdx.x) / WARP, 0)};
    static_assert(sizeof(typename T::Own) % 16 == 0, "x is aligned");
    pdl_wait();
    tile.run_all();
}

}  // namespace

// Shared memory (lower/moe/tile.rs): 416 + 4 ROWS + STAGES * orders * STEP * ROWS * 64 bytes.
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
