// x of one row for one of several thread blocks that divide the rows of the same columns.
//
// There is one matrix, so chunks of x begin with its runs of one width, each with a chunk of its own: the
// first run seldom ends where a fourth block does, and integer sums of blocks that share a scale of the
// matrix but not one of x would have to become floats one by one.
#pragma once

#include "qgemm/row_walk.cuh"

// The number of the first chunk that blocks from `block` on belong to. By a whole warp.
__device__ __forceinline__ int own_chunk_at(const QMatrix& m, int block) {
    const int lane = threadIdx.x % WARP;
    const int r = __popc(__ballot_sync(FULL_MASK, lane < RUNS && lane < m.runs && block >= m.run[lane].end));
    return uniform(own_chunk_of(m.run[r], block));
}

// The blocks of a chunk, at most X_CHUNK_BLOCKS of one run. By a whole warp.
struct OwnChunk {
    int first, end;

    __device__ __forceinline__ OwnChunk(const QMatrix& m, int chunk) {
        const int lane = threadIdx.x % WARP;
        const int r = __popc(__ballot_sync(
            FULL_MASK, lane > 0 && lane < RUNS && lane < m.runs && chunk >= m.run[lane].chunk));
        first = m.run[r].first + X_CHUNK_BLOCKS * (chunk - m.run[r].chunk);
        end = min(first + X_CHUNK_BLOCKS, int(m.run[r].end));
    }
};

// The part of one row of x that belongs to blocks [from, to), whole shares of a matrix: gathered, unless it is in
// the order of the matrix, and rounded, as bytes [blocks][2][32] and scales [chunks].
//
// ROUNDS: chunks of a warp whose places are known before x is.
template <int ROUNDS>
struct RowSlice {
    // Four packed columns of a lane, of a chunk that ends at `to`.
    struct Columns {
        int k, to;
        uint4 features;
    };
    int warp;
    int from;                  // block
    int chunk, chunks;         // the first one, and how many
    bool ordered;              // x is in the order of the matrix
    Columns first[ROUNDS];     // of the first rounds

    __device__ __forceinline__ int index(int round) const {
        return round * (blockDim.x / WARP) + warp;
    }
    __device__ __forceinline__ Columns columns(const QMatrix& m, int round) const {
        if (index(round) >= chunks) return {};
        const OwnChunk own(m, chunk + index(round));
        const int k = 32 * own.first + 4 * (threadIdx.x % WARP), to = 32 * own.end;
        return {k, to, features(ordered ? nullptr : m.perm, k, to)};
    }
    __device__ __forceinline__ void prepare(const QMatrix& m, int begin, int end, bool in_order) {
        ordered = in_order;
        warp = uniform(threadIdx.x / WARP);
        from = begin;
        chunk = chunks = 0;
        if (begin < end) {
            chunk = own_chunk_at(m, begin);
            chunks = own_chunk_at(m, end - 1) + 1 - chunk;
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) first[i] = columns(m, i);
    }
    // Four columns of x.
    __device__ __forceinline__ float4 values(const float* x, const Columns& own) const {
        if (own.k >= own.to) return {};
        if (ordered) return *reinterpret_cast<const float4*>(x + own.k);
        float v[4];
        gather(v, x, own.features, own.k, own.to);
        return make_float4(v[0], v[1], v[2], v[3]);
    }
    // By the whole block; a barrier must follow.
    __device__ __forceinline__ void round(const QMatrix& m, const float* x, char* bytes,
                                          float* scales) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll 1
        for (int base = 0; index(base) < chunks; base += ROUNDS) {
            Columns all[ROUNDS];
            float4 v[ROUNDS];
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i) {
                all[i] = base == 0 ? first[i] : columns(m, base + i);
                v[i] = values(x, all[i]);
            }
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i) {
                if (index(base + i) >= chunks) break;
                const Columns& own = all[i];
                const Quantized q = quantize_chunk({v[i].x, v[i].y, v[i].z, v[i].w});
                if (own.k >= own.to) continue;
                const int at = own.k - 32 * from;
                u32* out = reinterpret_cast<u32*>(bytes + at / 32 * X_ROW + lane % 8 * 4);
                out[0] = q.high;
                out[8] = q.low;
                if (lane == 0) scales[index(base + i)] = q.scale;
            }
        }
    }
};

// x of the rows of a thread block, at most `held` columns. Unless x is in the order of the matrix, all of it is
// copied as it is, and each warp gathers chunks there.
template <typename T>
struct SliceInput {
    const T& task;
    char* base;   // shared: bytes, scales, and x
    int inputs, held;
    RowSlice<2> row;

    __device__ __forceinline__ SliceInput(const T& task, int inputs, int held, char* base)
        : task(task), base(base), inputs(inputs), held(held) {}

    __device__ __forceinline__ float* scales() const { return reinterpret_cast<float*>(base + 2 * held); }
    __device__ __forceinline__ void point(RowWalk<KIND_EXL2>& walk, int) const {
        walk.x = base - row.from * X_ROW + x_place(walk.lane);
        walk.scales = scales() - row.chunk;
    }
    // As those of RowInput. Weights are asked for first: where x is in order, nothing else has to be loaded.
    __device__ __forceinline__ void prepare() {}
    template <class Arrived>
    __device__ __forceinline__ void stage(const Arrived&) {
        const u16* shares = task.matrix[0].shares + task.rank * SPLIT_SHARES<T>;
        row.prepare(task.matrix[0], uniform(shares[0]), uniform(shares[SPLIT_SHARES<T>]),
                    uniform(task.whole->ordered != nullptr));
        // Every run may end with a part of a chunk (lower/moe/few.rs).
        const int scale_bytes = round_16(4 * (held / (32 * X_CHUNK_BLOCKS) + RUNS));
        float* all = reinterpret_cast<float*>(base + 2 * held + scale_bytes);
        pdl_wait();
        if (!row.ordered) {
            for (int i = 4 * threadIdx.x; i < inputs; i += 4 * blockDim.x) {
                cp_async_16(all + i, task.x + i);
            }
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
        }
        row.round(task.matrix[0], row.ordered ? task.x : all, base, scales());
        __syncthreads();
    }
};
