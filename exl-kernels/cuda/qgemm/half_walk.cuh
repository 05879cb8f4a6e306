// A warp's way through quantized matrices with 16-bit floats: weights come through a ring of its own,
// become 16-bit floats in registers, and multiply x, which is in shared memory, 8 rows at a time.
#pragma once

#include "qgemm/half.cuh"
#include "qgemm/walk.cuh"

// Bytes of a warp's ring, and the most units in it.
constexpr int HALF_RING = 4352;
constexpr int HALF_SLOTS = 4;
constexpr int HALF_WARPS = 16;

// Where the sum of a column of a row lies, [rows][32]: rows are turned so that lanes hit different
// banks.
__device__ __forceinline__ int sum_at(int row, int column) {
    return row * 32 + ((column + 8 * (row >> 1)) & 31);
}

// NT groups of 8 rows. Lane 4g + t has columns g, g+8, g+16, g+24 of a tile and rows 8n + 2t and + 1.
template <int KIND, int NT>
struct HalfWalk {
    typedef Feed<true> Units;

    int lane, rows;
    char* ring;
    const char* x;     // shared: the lane's bytes of block 0
    u32 x_block;       // bytes of a block of x
    u32 offset[NT];    // of the lane's row from x
    float total[NT][2][4];   // [..][column half][..]: column g: rows 2t, 2t + 1; column g + 8

    template <int B>
    __device__ __forceinline__ void multiply(const char* block, const char* x_at,
                                             const HalfScales<KIND>& scales) {
        u32 words[B], a[2][2][4];   // [column half][step of 16 rows]
        __half2 v[8][2];
        load_words<B>(words, block, lane);
        expand_halves<B>(words, v);
        scales.operands(v, a);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4 b = *reinterpret_cast<const uint4*>(x_at + offset[n]);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_f16(total[n][m], a[m][0], b.x, b.y);
                mma_f16(total[n][m], a[m][1], b.z, b.w);
            }
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < NT * 8; ++i) total[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    // Stores the totals as the sums of a tile, or adds them.
    __device__ __forceinline__ void leave(float* sums, bool add) {
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = 8 * n + 2 * t + (i & 1);
                if (r >= rows) continue;
                float& to = sums[sum_at(r, 8 * (i / 2) + g)];
                const float total_i = total[n][i / 4][i % 4];
                to = add ? to + total_i : total_i;
            }
        }
        clear();
    }

    template <int BYTES>
    __device__ __forceinline__ void fetch(Units& feed, char* slot) const {
        if (feed.left > 0) {
            feed.template load<KIND, BYTES>(slot, lane);
            feed.next();
        }
        cp_async_commit();
    }

    // Starts the first copies: as many as `run` keeps under way.
    __device__ __forceinline__ void open(Units& feed) const {
        const int bytes = feed.weights + ScaleCodes<KIND>::BYTES;
        const int depth = slots(HALF_RING, bytes, HALF_SLOTS);
#pragma unroll 1
        for (int s = 0; s < depth; ++s) fetch<0>(feed, ring + s * bytes);
    }

    // All units of an opened feed; `left` of them. `add`: to sums that are there.
    template <int B, int FOLD>
    __device__ __forceinline__ void pass(Units& feed, const Tiles& tiles, int left, bool add) {
        constexpr int BLOCKS = unit_blocks<true>(FOLD, B), BYTES = BLOCKS * Sections<B>::BYTES;
        constexpr int SLOT = BYTES + ScaleCodes<KIND>::BYTES;
        constexpr int DEPTH = slots(HALF_RING, SLOT, HALF_SLOTS);
        static_assert(DEPTH > 1, "one unit is under way while another is used");
        int block = feed.first, slot = 0;
        float* sums = tiles.sums;
        clear();
#pragma unroll 1
        for (; left > 0; --left) {
            cp_async_wait<DEPTH - 1>();
            __syncwarp();
            const char* at = ring + slot * SLOT;
            const HalfScales<KIND> scales(ScaleCodes<KIND>::at(at + BYTES, lane >> 2));
#pragma unroll 1
            for (int i = 0; i < BLOCKS; ++i) {
                multiply<B>(at + i * Sections<B>::BYTES, x + (block + i) * x_block, scales);
            }
            __syncwarp();
            fetch<BYTES>(feed, ring + slot * SLOT);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            block += BLOCKS;
            if (block == feed.end) {
                block = feed.first;
                leave(sums, add);
                sums += tiles.step;
            }
        }
    }
    template <int B>
    __device__ __forceinline__ void folds(Units& feed, const Tiles& tiles, int fold, int left,
                                          bool add) {
        if constexpr (fold_blocks(B) == 4) {
            if (fold == 4) return pass<B, 4>(feed, tiles, left, add);
        }
        if (fold == 2) return pass<B, 2>(feed, tiles, left, add);
        pass<B, 1>(feed, tiles, left, add);
    }
    __device__ __forceinline__ void run(Units& feed, const Tiles& tiles, int fold, int left, bool add) {
        if constexpr (KIND == KIND_GPTQ) {
            folds<4>(feed, tiles, fold, left, add);
        } else {
            switch (feed.run.bits) {
                case 2: folds<2>(feed, tiles, fold, left, add); break;
                case 3: folds<3>(feed, tiles, fold, left, add); break;
                case 4: folds<4>(feed, tiles, fold, left, add); break;
                case 5: folds<5>(feed, tiles, fold, left, add); break;
                case 6: folds<6>(feed, tiles, fold, left, add); break;
                default: folds<8>(feed, tiles, fold, left, add); break;
            }
        }
    }
};
