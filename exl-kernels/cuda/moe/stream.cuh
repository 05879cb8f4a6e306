// Products of many rows of an expert: what a launch computes, and packed weights on their way to operands
// of the tensor cores.
#pragma once

#include "moe/experts.cuh"
#include "qgemm/epilogue.cuh"
#include "qgemm/half.cuh"
#include "qgemm/input.cuh"

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
    int row_bytes;                 // of x
    short gated, act;
};

// What a thread block computes: column tiles from `first` on, of a segment.
struct Item {
    Segment segment;
    int first;

    // Those of one expert that have the same columns follow each other.
    __device__ __forceinline__ static Item of(const TileTask& task, int index, int per_segment) {
        Segment s = task.sorted.segments[index / per_segment];
        const int begin = index / per_segment - s.index;   // the expert's first segment
        const int within = index - begin * per_segment;
        s = task.sorted.segments[begin + within % s.all];
        return {s, within / s.all};
    }
};

// A segment's matrices and rows of the output, in shared memory.
template <int ROWS>
struct Operands {
    QMatrix matrix[2];
    const char* x;      // of the segment
    int rows, orders;   // orders: of x
    int slot[ROWS];

    // By the whole block, behind a barrier; another one must follow. False when it is another kernel's.
    __device__ __forceinline__ bool take(const TileTask& task, const Segment& s) {
        constexpr int WORDS = sizeof(QMatrix) / 8;
        const int parts = task.gated ? 2 : 1;
        const QMatrix* const* from = task.table + s.expert * parts;
        if (!from[0]) return false;
        for (int i = threadIdx.x; i < parts * WORDS; i += blockDim.x) {
            const u64* words = reinterpret_cast<const u64*>(from[i / WORDS]);
            reinterpret_cast<u64*>(&matrix[i / WORDS])[i % WORDS] = words[i % WORDS];
        }
        for (int r = threadIdx.x; r < s.rows; r += blockDim.x) {
            slot[r] = task.sorted.slots[s.first + r];
        }
        if (threadIdx.x == blockDim.x - 1) {
            x = task.x + (long long)s.first * task.row_bytes;
            rows = s.rows;
            orders = parts == 2 && from[0]->perm != from[1]->perm ? 2 : 1;
        }
        return true;
    }

    // What the thread block computes, one item after the other, of `per_segment` in each segment: `run` is
    // given the first of an item's columns, counted in items. By the whole block.
    template <typename Work>
    __device__ __forceinline__ void each_item(const TileTask& task, int per_segment,
                                              const Work& run) {
        const int all = task.sorted.segment_count() * per_segment;
#pragma unroll 1
        for (int index = blockIdx.x; index < all; index += gridDim.x) {
            const Item next = Item::of(task, index, per_segment);
            __syncthreads();   // the item before is done
            if (!take(task, next.segment)) continue;
            __syncthreads();
            run(next.first);
        }
    }
};

constexpr u32 AHEAD = 4096;   // bytes from the weights in use to those asked for

// The weights of a column tile on their way: those of the next block are in registers.
template <int KIND>
struct Stream {
    const QMatrix* m;
    u32 offset;   // of the next block in the matrix
    int column;
    int run;      // that has the block
    u32 words[8];
    ScaleCodes<KIND> codes;

    __device__ __forceinline__ void start(const QMatrix& matrix, int own, int lane) {
        m = &matrix;
        column = own;
        offset = u32(m->column_bytes) * column;
        run = 0;
        ask(128 * lane);
        load(0, lane);
    }
    // Asks for the line so many bytes ahead, if it is the tile's.
    __device__ __forceinline__ void ask(u32 ahead) const {
        const u32 line = offset + ahead;
        if (line < u32(m->column_bytes) * (column + 1)) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(m->tiles + line));
        }
    }
    // Loads a block, which follows the one before.
    __device__ __forceinline__ void load(int block, int lane) {
        if (block >= m->run[run].end) ++run;
        const Run r = m->run[run];
        const int bits = r.bits;
        const char* at = m->tiles + offset;
        codes = ScaleCodes<KIND>::of(*m, column * m->pieces, piece_of(*m, r, block), lane >> 2);
        switch (bits) {
            case 2: load_words<2>(words, at, lane); break;
            case 3: load_words<3>(words, at, lane); break;
            case 4: load_words<4>(words, at, lane); break;
            case 5: load_words<5>(words, at, lane); break;
            case 6: load_words<6>(words, at, lane); break;
            default: load_words<8>(words, at, lane); break;
        }
        offset += 128 * bits;
        if (lane < bits) ask(AHEAD + 128 * lane);
    }
    // The block as operands [column half][step of 16 rows].
    __device__ __forceinline__ void expand(u32 (&a)[2][2][4]) const {
        __half2 v[8][2];
        if constexpr (KIND == KIND_GPTQ) {
            expand_halves<4>(words, v);
        } else {
            switch (m->run[run].bits) {
                case 2: expand_halves<2>(words, v); break;
                case 3: expand_halves<3>(words, v); break;
                case 4: expand_halves<4>(words, v); break;
                case 5: expand_halves<5>(words, v); break;
                case 6: expand_halves<6>(words, v); break;
                default: expand_halves<8>(words, v); break;
            }
        }
        // Behind the switch: inside of it ptxas 12.9 dies of this for sm_120.
        HalfScales<KIND>(codes).operands(v, a);
    }
};

