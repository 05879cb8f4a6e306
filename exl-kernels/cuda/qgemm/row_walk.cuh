// A warp's way through its share of quantized matrices for one row of x.
//
// The two bytes of x are two columns of the second operand, which has eight: so four slots of blocks have
// columns of their own, zero in the others' blocks, and are summed side by side. Integer sums become
// 32-bit floats once for all four slots, lane 4g + t those of slot t. A slot is 1, 2 or 4 blocks that
// share a scale and a chunk of x (Fold); four slots are a round.
//
// Weights come through a ring in shared memory: consecutive blocks of a column tile are a unit. Who asks
// for units and who uses them go the same way, one ahead of the other, through all parts without a
// pause.
#pragma once

#include "common/ring.cuh"
#include "qgemm/turn.cuh"

// Where a lane's bytes of x are in a block.
__device__ __forceinline__ int x_place(int lane) { return (lane >> 2 & 1) * 32 + (lane & 3) * 8; }

// The chunk of x that has a block, where chunks begin with the runs.
__device__ __forceinline__ int own_chunk_of(const Run& run, int block) {
    return run.chunk + u32(block - run.first) / X_CHUNK_BLOCKS;
}

// Blocks of a unit: a power of two, as many as a slot of the ring holds.
template <typename R>
constexpr u32 row_unit(u32 bits) {
    const u32 fit = R::SLOT / (128 * bits);
    return fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// Shares of the rows of a thread block, of T::SPLIT that divide the rows of the same column tiles.
template <typename T>
constexpr int SPLIT_SHARES = SHARES / T::SPLIT;

// Whether chunks of x begin with the runs (row_slice.cuh).
template <typename T>
constexpr bool own_chunks = T::SPLIT > 1;

// What a warp does without a change of width or fold: blocks of a run in column tiles `column`, + T::SPLIT ... of a
// part. Their sums begin at `sums`.
struct Leg {
    int part, column, tiles, sums;
    Fold fold;
};

// What a warp does in a turn: lane part * RUNS + run knows what it has of that run. So this is found out at once for
// all of them, and in few instructions, which every warp has to go through before it asks for weights.
//
// A warp has one share of the rows of all tiles; where there are more warps than shares (SPLIT) they take turns
// at the tiles. Of gate and up a warp has one, and two shares of it, so that what is done once for a tile and
// share is done half as often. Shares are whole chunks and not equally long, the first ones, which have more
// bits, often the longest: so for half of the tiles a warp has two of the first, for the others two of the last,
// which count as parts here.
//
// Sums of a tile are at its slot in the turn * SPLIT_SHARES + place of the share.
template <typename T>
struct Path {
    static constexpr int OWN = SPLIT_SHARES<T>, HALF = SHARES / 2;
    static_assert(T::MOST * RUNS <= WARP && 2 * RUNS <= WARP, "a lane for each");

    u32 blocks;   // of the lane: the first block, and 2^16 times their number
    u32 how;      // part, run, fold: eight bits each
    u32 tiles;    // the first column tile, and 2^16 times their number
    u32 sums;
    u32 there;    // lanes that have any

    __device__ __forceinline__ void find(const T& task, const Turn& turn, int warp) {
        const int lane = threadIdx.x % WARP, index = lane / RUNS, r = lane % RUNS;
        int part = index, column, count, slot, from, to;
        if (task.gated) {
            const int all = turn.to - turn.from, half = (all + 1) / 2;
            const int share = index == 0 ? warp % HALF : HALF - 1 - warp % HALF;
            part = warp / HALF;
            slot = index == 0 ? 0 : half;
            column = turn.from + slot;
            count = index == 0 ? half : all - half;
            if (index > 1) count = 0;
            slot = slot * OWN + part * HALF + share;
            from = 2 * share;
            to = from + 2;
        } else {
            int before = 0;
#pragma unroll
            for (int p = 0; p + 1 < T::MOST; ++p) before += p < part ? task.matrix[p].columns : 0;
            if (part >= T::MOST) part = 0;
            Tiles own = turn.tiles(before, index < T::MOST ? task.matrix[part].columns : 0);
            from = warp;
            if constexpr (T::SPLIT > 1) {
                const int side = warp / OWN;
                from = task.rank * OWN + warp % OWN;
                own.column += side;
                own.step += side;
                own.count = (own.count - side + T::SPLIT - 1) / T::SPLIT;
            }
            to = from + 1;
            column = own.column;
            count = own.count;
            slot = own.step * OWN + warp % OWN;
        }
        const QMatrix& m = task.matrix[part];
        const Run run = m.run[r];
        const int first = max(m.shares[from], run.first), end = min(m.shares[to], run.end);
        const bool has = count > 0 && r < m.runs && first < end;
        blocks = first | (end - first) << 16;
        how = part | r << 8 | (own_chunks<T> ? run.own_fold : run.fold) << 16;
        tiles = column | count << 16;
        sums = slot;
        there = __ballot_sync(FULL_MASK, has);
    }
};

// Where in a path one is. Of a run whole folds come first, then the blocks that are left, one by one.
template <typename T>
struct Way {
    u32 left;    // lanes of the path whose legs come
    bool rest;   // whole folds of the first one have been
    Leg leg;

    __device__ __forceinline__ void start(const Path<T>& path) {
        left = path.there;
        rest = false;
    }
    // To the next leg, if there is one.
    __device__ __forceinline__ bool next(const T& task, const Path<T>& path) {
        if (left == 0) return false;
        const int lane = __ffs(left) - 1;
        const u32 blocks = __shfl_sync(FULL_MASK, path.blocks, lane);
        const u32 how = __shfl_sync(FULL_MASK, path.how, lane);
        const u32 tiles = __shfl_sync(FULL_MASK, path.tiles, lane);
        leg.sums = __shfl_sync(FULL_MASK, path.sums, lane);
        leg.part = how & 0xff;
        leg.column = tiles & 0xffff;
        leg.tiles = tiles >> 16;
        Fold& fold = leg.fold;
        fold.run = task.matrix[leg.part].run[how >> 8 & 0xff];
        fold.first = blocks & 0xffff;
        fold.fold = how >> 16;
        const int count = blocks >> 16, whole = count & -fold.fold;
        fold.count = whole;
        if (rest || whole == 0) {
            fold.first += whole;
            fold.count = count - whole;
            fold.fold = 1;
        }
        rest = !rest && whole > 0 && whole < count;
        if (!rest) left &= left - 1;
        return true;
    }
};

// Asks for the units of a way, which go through a ring R.
template <typename T, typename R>
struct Supply {
    const T& task;
    Path<T> path;
    Way<T> way;
    const char* at;
    u64 next_tile;   // from a tile's last unit to the next one's first
    u32 left, count;   // blocks of the tile, of all tiles
    u32 unit, bytes;   // blocks of a unit, bytes of a block
    int tiles;         // 0: nothing is left

    __device__ __forceinline__ explicit Supply(const T& task) : task(task), tiles(0) {}

    __device__ __forceinline__ void start(const Turn& turn, int warp) {
        path.find(task, turn, warp);
        way.start(path);
        enter();
    }
    __device__ __forceinline__ void enter() {
        if (!way.next(task, path)) return;
        const Fold& fold = way.leg.fold;
        const QMatrix& m = task.matrix[way.leg.part];
        bytes = 128 * fold.run.bits;
        unit = row_unit<R>(fold.run.bits);
        left = count = fold.count;
        tiles = way.leg.tiles;
        at = m.tiles + m.column_bytes * way.leg.column + offset_of(fold.run, fold.first);
        next_tile = m.column_bytes * T::SPLIT - count * bytes;
    }
    // Starts the copy of the next unit.
    __device__ __forceinline__ void ask(const R& ring, u32 slot) {
        if (tiles > 0) {
            const u32 blocks = min(unit, left);
            ring.copy(slot, at, blocks * bytes);
            at += blocks * bytes;
            left -= blocks;
            if (left == 0) {
                left = count;
                at += next_tile;
                if (--tiles == 0) enter();
            }
        }
        ring.asked();
    }
};

// A warp at work. Lane 4g + t has columns g, g+8, g+16, g+24 of a tile, and slot t when sums are folded.
template <int KIND>
struct RowWalk {
    int lane;
    const char* zero;      // shared: as many zeros as a round reads of x
    const char* x;         // shared: the lane's bytes of block 0
    const float* scales;   // shared: [chunks]
    const int* x_sums;     // shared: [blocks], for GPTQ's zero points
    const QMatrix* m;
    float* sums;           // shared: the warp's of the first tile, [32]
    int step;              // floats from the sums of a tile to those of the warp's next one
    // Of the lane's slot in this round: codes, scale of x, and for GPTQ the sum of x.
    ScaleCodes<KIND> codes;
    float scale;
    int sum_of_x;
    int part[2][4];   // [column half]: {high, low} of column g, then of column g + 8
    float total[4];

    __device__ __forceinline__ void clear_parts() {
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i / 4][i % 4] = 0;
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] = 0.0f;
    }

    // Loads what a round is multiplied with, in column tile `tile`; `done` blocks of the fold come before
    // it.
    template <u32 FOLD, bool OWN_CHUNKS>
    __device__ __forceinline__ void load_scales(const Fold& f, int tile, u32 done) {
        const u32 slot = done + (lane & 3) * FOLD;
        // Slots behind the fold have no sums: any scale will do.
        const u32 block = f.first + min(slot, u32(f.count) - 1);
        codes = ScaleCodes<KIND>::of(*m, tile * m->pieces, piece_of(*m, f.run, block), lane >> 2);
        scale = scales[OWN_CHUNKS ? own_chunk_of(f.run, block) : block / X_CHUNK_BLOCKS];
        if constexpr (KIND == KIND_GPTQ) {
            sum_of_x = 0;
            for (u32 i = 0; slot < u32(f.count) && i < FOLD; ++i) sum_of_x += x_sums[block + i];
        }
    }

    // Where a lane reads x: nothing but zeros unless its columns are those of the slot.
    __device__ __forceinline__ const char* operand(const char* from, u32 slot) const {
        return slot == u32(lane) >> 3 ? from : zero;
    }
    // BLOCKS blocks of a slot; `from` as `operand` says.
    template <u32 B, u32 BLOCKS>
    __device__ __forceinline__ void multiply(const char* weights, const char* from) {
#pragma unroll
        for (u32 i = 0; i < BLOCKS; ++i) {
            u32 words[B], v[8];
            load_words<B>(words, weights + i * Sections<B>::BYTES, lane);
            expand<B>(words, v);
            const uint2 b = *reinterpret_cast<const uint2*>(from + i * X_ROW);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                mma_s8(part[h], v[4 * h], v[4 * h + 1], v[4 * h + 2], v[4 * h + 3], b.x, b.y);
            }
        }
    }

    // Adds the integer sums of a round to the totals and begins new ones.
    template <u32 B>
    __device__ __forceinline__ void fold() {
        const Scales<KIND> sc(codes);
        // What the registers held is 2^(8 - B) times the centred code.
        const float by = scale * (1.0f / float(1 << (8 - B)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int* p = &part[i >> 1][2 * (i & 1)];
            int v = p[0] * 256 + p[1];
            if constexpr (KIND == KIND_GPTQ) v += sc.shift[i] * 16 * sum_of_x;
            total[i] = fmaf(sc.s[i] * by, float(v), total[i]);
        }
        clear_parts();
    }

    // Adds the totals of the four slots to the warp's sums of a tile, [32].
    __device__ __forceinline__ void leave(float* to) {
        // Lane t keeps column g + 8 t: two exchanges, each of half of what is left.
        const bool odd = lane & 1, high = lane & 2;
        float a = high ? total[2] : total[0], b = high ? total[3] : total[1];
        a += __shfl_xor_sync(FULL_MASK, high ? total[0] : total[2], 2);
        b += __shfl_xor_sync(FULL_MASK, high ? total[1] : total[3], 2);
        const float own = (odd ? b : a) + __shfl_xor_sync(FULL_MASK, odd ? a : b, 1);
        to[8 * (lane & 3) + (lane >> 2)] += own;
        clear();
    }

    // All tiles of a fold.
    template <u32 B, u32 FOLD, typename T, typename R>
    __device__ __forceinline__ void pass(const Leg& leg, Supply<T, R>& supply, const R& ring,
                                         typename R::Place& at) {
        constexpr u32 UNIT = row_unit<R>(B), STEP = FOLD < UNIT ? FOLD : UNIT, ROUND = 4 * FOLD;
        constexpr u32 BYTES = Sections<B>::BYTES;
        const Fold f = leg.fold;
        const u32 count = f.count;
        const char* x_first = x + f.first * X_ROW;
        float* to = sums;
        int tile = leg.column;
        clear();
        clear_parts();
        load_scales<FOLD, own_chunks<T>>(f, tile, 0);
#pragma unroll 1
        for (int left = leg.tiles; left > 0; --left) {
            const auto end_round = [&](u32 done) {
                fold<B>();
                const bool ends = done >= count;
                if (ends && left == 1) return;
                load_scales<FOLD, own_chunks<T>>(f, ends ? tile + T::SPLIT : tile, ends ? 0 : done);
            };
            u32 done = 0;
#pragma unroll 1
            while (done < count) {
                const char* weights = ring.wait(at);
                if constexpr (UNIT >= ROUND) {
                    // Whole rounds; the last unit may have less.
                    const u32 whole = min(UNIT, (count - done) / ROUND * ROUND);
                    const u32 stop = done + whole;
#pragma unroll 1
                    while (done < stop) {
                        const char* from = x_first + done * X_ROW;
#pragma unroll
                        for (u32 s = 0; s < 4; ++s) {
                            multiply<B, FOLD>(weights + s * FOLD * BYTES,
                                              operand(from, s) + s * FOLD * X_ROW);
                        }
                        weights += ROUND * BYTES;
                        done += ROUND;
                        end_round(done);
                    }
                    if (whole < UNIT && done < count) {
                        const u32 rest = count - done;
#pragma unroll 1
                        for (u32 s = 0; s < rest; s += STEP) {
                            multiply<B, STEP>(weights + s * BYTES,
                                              operand(x_first + (done + s) * X_ROW, s / FOLD));
                        }
                        done = count;
                        end_round(done);
                    }
                } else {
                    const u32 stop = min(done + UNIT, count);
#pragma unroll 1
                    while (done < stop) {
                        multiply<B, STEP>(weights,
                                          operand(x_first + done * X_ROW, done / FOLD % 4));
                        weights += STEP * BYTES;
                        done += STEP;
                    }
                    if (done % ROUND == 0 || done == count) end_round(done);
                }
                __syncwarp();
                supply.ask(ring, at.slot);
                at.pass();
            }
            tile += T::SPLIT;
            leave(to);
            to += step;
        }
    }
    template <u32 B, typename T, typename R>
    __device__ __forceinline__ void folds(const Leg& leg, Supply<T, R>& supply, const R& ring,
                                          typename R::Place& at) {
        if constexpr (fold_blocks(B) == 4) {
            if (leg.fold.fold == 4) return pass<B, 4>(leg, supply, ring, at);
        }
        if (leg.fold.fold == 2) return pass<B, 2>(leg, supply, ring, at);
        pass<B, 1>(leg, supply, ring, at);
    }
    template <typename T, typename R>
    __device__ __forceinline__ void run(const Leg& leg, Supply<T, R>& supply, const R& ring,
                                        typename R::Place& at) {
        if constexpr (KIND == KIND_GPTQ) {
            folds<4>(leg, supply, ring, at);
        } else {
            switch (leg.fold.run.bits) {
                case 2: folds<2>(leg, supply, ring, at); break;
                case 3: folds<3>(leg, supply, ring, at); break;
                case 4: folds<4>(leg, supply, ring, at); break;
                case 5: folds<5>(leg, supply, ring, at); break;
                case 6: folds<6>(leg, supply, ring, at); break;
                default: folds<8>(leg, supply, ring, at); break;
            }
        }
    }
};
