// A warp's way through its share of quantized matrices: packed weights come through a ring of its own
// in shared memory, are expanded in registers, and multiplied with x from shared memory.
//
// Integer sums are folded into 32-bit floats every 4 blocks of up to 4 bits, 2 of more, where groups and
// the ends of a run allow it, else more often: by rules that know nothing of the number of rows. A unit
// of the ring is half of that. All column tiles of a thread block are one sequence of units, so that
// loads never pause between tiles.
#pragma once

#include "qgemm/input.cuh"
#include "qgemm/scales.cuh"
#include "qgemm/tile.cuh"

// Warps of a thread block for NT groups of rows: as many as registers allow.
template <int NT>
constexpr int WARPS = NT > 2 ? 8 : 16;

// Bytes of a warp's ring of weights, and the most units in it. What is under way on a multiprocessor
// hides the memory's latency: 32 KB and more on the large GPUs, which have the shared memory for it.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
constexpr bool LARGE = true;
#else
constexpr bool LARGE = false;
#endif
template <int NT>
constexpr int RING = LARGE && NT != 2 ? 4608 : 2304;
template <int NT>
constexpr int SLOTS = LARGE && NT == 1 ? 5 : 3;

// Most blocks between two folds.
constexpr int fold_blocks(int bits) { return bits > 4 ? 2 : 4; }
// Blocks of a unit of the ring. WIDE: twice as many of 2 bits, so that it has as many bytes as others.
template <bool WIDE>
constexpr int unit_blocks(int fold, int bits) {
    if (WIDE && bits == 2) return fold;
    return fold == 1 ? 1 : fold_blocks(bits) / 2;
}
// Most of them: room for x in a slot of a warp's ring, when x does not fit shared memory as a whole.
constexpr int X_UNIT = 2;

constexpr int slots(int ring, int slot, int most) { return ring / slot < most ? ring / slot : most; }

// Column tiles of one matrix, `stride` apart; the sums of the first are at `sums`.
struct Tiles {
    int column, count, stride;
    float* sums;
    int step;   // floats from the sums of a tile to those of the next
};

// Consecutive blocks of a run with one way to fold them.
struct Fold {
    Run run;
    int first, count, fold;
};

// Goes through blocks [at, end) of a matrix, whole shares.
struct Cursor {
    const QMatrix* m;
    int at, end;
    int r;

    __device__ __forceinline__ void enter(const QMatrix& matrix, int from, int to) {
        m = &matrix;
        at = from;
        end = to;
        r = 0;
    }
    __device__ __forceinline__ Fold next() {
        Run run = m->run[r];
        while (at >= run.end) run = m->run[++r];
        const int left = min(int(run.end), end) - at;
        // Whole folds; the blocks that are left one by one.
        int fold = run.fold, count = left & -fold;
        if (count == 0) {
            count = left;
            fold = 1;
        }
        const Fold part = {run, at, count, fold};
        at += count;
        return part;
    }
};

// Units of `blocks` blocks of [first, end) in a column tile after the other: the next one to load.
template <bool WIDE>
struct Feed {
    const QMatrix& m;
    Run run;
    int blocks, weights;   // of a unit: blocks, bytes
    int first, end, block;
    int left;              // units
    const char* at;
    u64 next_tile;         // from a tile's end to the next one's first unit
    u32 place;             // column tile * pieces
    u32 next_place;

    __device__ __forceinline__ Feed(const QMatrix& m, const Tiles& tiles, const Fold& part)
        : m(m), run(part.run), blocks(unit_blocks<WIDE>(part.fold, part.run.bits)),
          weights(blocks * part.run.bits * 128), first(part.first), end(part.first + part.count),
          block(part.first), place(tiles.column * m.pieces), next_place(tiles.stride * m.pieces) {
        const int units = part.count / blocks;
        left = units * tiles.count;
        next_tile = m.column_bytes * tiles.stride - u32(units * weights);
        at = m.tiles + m.column_bytes * tiles.column + offset_of(run, first);
    }
    // BYTES: `weights`, 0 when they are not known.
    template <int KIND, int BYTES>
    __device__ __forceinline__ void load(char* slot, int lane) const {
        if (BYTES > 0) {
#pragma unroll
            for (int o = 0; o < BYTES; o += 16 * WARP) {
                if (BYTES - o >= 16 * WARP || 16 * lane < BYTES - o) {
                    cp_async_weights(slot + o + 16 * lane, at + o + 16 * lane);
                }
            }
        } else {
#pragma unroll 1
            for (int o = 16 * lane; o < weights; o += 16 * WARP) cp_async_weights(slot + o, at + o);
        }
        ScaleCodes<KIND>::load(slot + weights, m, place, piece_of(m, run, block), lane);
    }
    __device__ __forceinline__ void next() {
        --left;
        at += weights;
        block += blocks;
        if (block == end) {
            block = first;
            at += next_tile;
            place += next_place;
        }
    }
};

// A warp at work. Lane 4g + t has columns g, g+8, g+16, g+24 of a tile and rows 4n + t of x.
template <int NT>
struct Walk {
    typedef Feed<false> Units;

    int lane, rows;
    char* ring;
    int row[NT];          // the lane's rows
    const char* x[NT];    // shared: the lane's bytes of block 0
    u32 x_block;          // bytes of a block of x
    const float* scales;  // shared: [chunks][rows]
    const int* x_sums;    // shared: [blocks][rows], for GPTQ's zero points
    // When x is streamed: the lane's 16 bytes of block 0 in global memory, and in its ring.
    bool streams;
    const char* from;
    char* x_ring;

    float total[NT][4];
    int part[NT][2][4];   // [..][column half]: {high, low} of column g, then of column g + 8

    template <int B>
    __device__ __forceinline__ void multiply(const char* block, u32 x_at) {
        u32 words[B], v[8];
        load_words<B>(words, block, lane);
        expand<B>(words, v);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint2 b = *reinterpret_cast<const uint2*>(x[n] + x_at);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_s8(part[n][m], v[4 * m], v[4 * m + 1], v[4 * m + 2], v[4 * m + 3], b.x, b.y);
            }
        }
    }

    // Adds the integer sums over `blocks` blocks to the totals and begins new ones.
    template <int KIND, int B>
    __device__ __forceinline__ void fold(const Scales<KIND>& sc, int block, int blocks) {
        const int chunk = u32(block) / X_CHUNK_BLOCKS;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            // What the registers held is 2^(8 - B) times the centred code.
            const float scale = scales[chunk * rows + row[n]] * (1.0f / float(1 << (8 - B)));
            int sum_of_x = 0;
            if constexpr (KIND == KIND_GPTQ) {
                for (int b = block; b < block + blocks; ++b) sum_of_x += x_sums[b * rows + row[n]];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int* p = &part[n][i >> 1][2 * (i & 1)];
                int v = p[0] * 256 + p[1];
                if constexpr (KIND == KIND_GPTQ) v += sc.shift[i] * 16 * sum_of_x;
                total[n][i] = fmaf(sc.s[i] * scale, float(v), total[n][i]);
            }
        }
        clear_parts();
    }
    __device__ __forceinline__ void clear_parts() {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) part[n][i / 4][i % 4] = 0;
    }

    template <int KIND, int B, int BLOCKS, int FOLD>
    __device__ __forceinline__ void unit(const char* slot, int block, u32 x_at) {
        constexpr int BYTES = Sections<B>::BYTES;
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) multiply<B>(slot + i * BYTES, x_at + i * x_block);
        if (BLOCKS == FOLD || (block + BLOCKS) % FOLD == 0) {
            const auto codes = ScaleCodes<KIND>::at(slot + BLOCKS * BYTES, lane >> 2);
            fold<KIND, B>(Scales<KIND>(codes), block + BLOCKS - FOLD, FOLD);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[n][i] = 0.0f;
    }

    // Adds the totals to the warp's sums of a tile, [rows][32].
    __device__ __forceinline__ void leave(float* sums) {
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = 4 * n + t;
                if (r < rows) sums[r * 32 + 8 * i + g] += total[n][i];
            }
        }
        clear();
    }

    // Starts the copies of the next unit, if there is one.
    template <int KIND, int BYTES>
    __device__ __forceinline__ void fetch(Units& feed, char* slot, char* x_slot) const {
        if (feed.left > 0) {
            feed.template load<KIND, BYTES>(slot, lane);
            if (streams) {
                const char* source = from + (long long)feed.block * x_block;
                for (int o = 0; 16 * lane + o < feed.blocks * int(x_block); o += 16 * WARP) {
                    cp_async_16(x_slot + o, source + o);
                }
            }
            feed.next();
        }
        cp_async_commit();
    }

    // Starts the first copies: as many as `run` keeps under way.
    template <int KIND>
    __device__ __forceinline__ void open(Units& feed) const {
        const int bytes = feed.weights + ScaleCodes<KIND>::BYTES;
        const int depth = slots(RING<NT>, bytes, SLOTS<NT>);
#pragma unroll 1
        for (int s = 0; s < depth; ++s) {
            fetch<KIND, 0>(feed, ring + s * bytes, x_ring + s * X_UNIT * x_block);
        }
    }

    // All units of an opened feed; `left` of them.
    template <int KIND, int B, int FOLD>
    __device__ __forceinline__ void pass(Units& feed, const Tiles& tiles, int left) {
        constexpr int BLOCKS = unit_blocks<false>(FOLD, B), BYTES = BLOCKS * Sections<B>::BYTES;
        constexpr int SLOT = BYTES + ScaleCodes<KIND>::BYTES;
        constexpr int DEPTH = slots(RING<NT>, SLOT, SLOTS<NT>);
        static_assert(DEPTH > 1, "one unit is under way while another is used");
        const u32 x_slot = X_UNIT * x_block;
        int block = feed.first, slot = 0;
        float* sums = tiles.sums;
        clear();
        clear_parts();
#pragma unroll 1
        for (; left > 0; --left) {
            cp_async_wait<DEPTH - 1>();
            __syncwarp();
            unit<KIND, B, BLOCKS, FOLD>(ring + slot * SLOT, block,
                                        streams ? slot * x_slot : block * x_block);
            __syncwarp();
            fetch<KIND, BYTES>(feed, ring + slot * SLOT, x_ring + slot * x_slot);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            block += BLOCKS;
            if (block == feed.end) {
                block = feed.first;
                leave(sums);
                sums += tiles.step;
            }
        }
    }
    template <int KIND, int B>
    __device__ __forceinline__ void folds(Units& feed, const Tiles& tiles, int fold, int left) {
        if constexpr (fold_blocks(B) == 4) {
            if (fold == 4) return pass<KIND, B, 4>(feed, tiles, left);
        }
        if (fold == 2) return pass<KIND, B, 2>(feed, tiles, left);
        pass<KIND, B, 1>(feed, tiles, left);
    }
    template <int KIND>
    __device__ __forceinline__ void run(Units& feed, const Tiles& tiles, int fold, int left) {
        if constexpr (KIND == KIND_GPTQ) {
            folds<KIND, 4>(feed, tiles, fold, left);
        } else {
            switch (feed.run.bits) {
                case 2: folds<KIND, 2>(feed, tiles, fold, left); break;
                case 3: folds<KIND, 3>(feed, tiles, fold, left); break;
                case 4: folds<KIND, 4>(feed, tiles, fold, left); break;
                case 5: folds<KIND, 5>(feed, tiles, fold, left); break;
                case 6: folds<KIND, 6>(feed, tiles, fold, left); break;
                default: folds<KIND, 8>(feed, tiles, fold, left); break;
            }
        }
    }
};
