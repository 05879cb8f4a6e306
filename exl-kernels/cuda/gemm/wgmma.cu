// exl_gemm_wgmma_<BN>: out = a b^T for up to three ranges of columns, or act(gate) * up, by warpgroups
// (wgmma), 16-bit operands in blocks (blocked.cuh), 32-bit sums.
//
// exl: arch sm_90a
//
// For prompts on dequantized weights. Bound: the matrix rate. A block takes tiles of 128 rows and BN
// columns in turn. One thread orders copies of both operands into a ring of stages; two warpgroups
// multiply 64 rows each and write the sums straight from registers. CLUSTER 2: two blocks that stand
// one above the other share the columns: each brings half of b to both, which halves what they read
// of it from L2.
//
// Gate and up lie in turns of BN / 2 columns, so that one thread has both sums of an output.
#include "common/bulk.cuh"
#include "gemm/blocked.cuh"
#include "common/wgmma.cuh"
#include "qgemm/epilogue.cuh"

namespace {

constexpr int PARTS = 3;
constexpr int BM = 128;
constexpr int CONSUMERS = 2;   // warpgroups that multiply

// Columns of b that go to one output.
struct Part {
    float* out;              // [rows, stride], the first n written
    const void* bias;        // [n] or 0
    const void* other_bias;  // gate and up: of up
    const float* residual;   // as out, or 0; may be `out`
    int n, stride;
    int bias_type, other_type;
    int tiles;               // of BN columns
    int pairs;               // pairs of columns are aligned to 8 bytes
};

// The host fills this struct word by word: lower/gemm/wgmma.rs.
struct Task {
    const char* a;   // blocked [rows, k]
    const char* b;   // blocked [tiles * BN, k]
    int rows, blocks_k;
    int tiles_n;
    short gated, act;
    Part part[PARTS];
};

// Sums of 64 rows: lane 4g + t of warp w has rows 16 w + g and + 8, columns 8 j + 2 t and + 1 at
// d[j]. `row` and `col` are of d[0][0], `bias` has a float for each column of the tile from `col` on.

// One pair of columns, wherever it lies: not the common case, and not worth the code of many.
__device__ __noinline__ void store_any(const Part& p, int row, int col, float a, float b) {
    const long long at = (long long)row * p.stride + col;
    if (col < p.n) p.out[at] = a + (p.residual ? p.residual[at] : 0.0f);
    if (col + 1 < p.n) p.out[at + 1] = b + (p.residual ? p.residual[at + 1] : 0.0f);
}

template <int NJ>
__device__ __forceinline__ void store_linear(const Part& p, int rows, int row, int col,
                                             const float* bias, const float (&d)[NJ][4]) {
    constexpr int BATCH = 8;   // residuals that are loaded before sums are stored over them
    const bool whole = p.pairs && col + 8 * (NJ - 1) + 1 < p.n;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = row + 8 * h;
        if (r >= rows) continue;
        const long long at = (long long)r * p.stride + col;
#pragma unroll
        for (int j0 = 0; j0 < NJ; j0 += BATCH) {
            float2 v[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const float2 b = *reinterpret_cast<const float2*>(bias + 8 * (j0 + j));
                v[j] = make_float2(d[j0 + j][2 * h] + b.x, d[j0 + j][2 * h + 1] + b.y);
            }
            if (!whole) {
#pragma unroll
                for (int j = 0; j < BATCH; ++j) store_any(p, r, col + 8 * (j0 + j), v[j].x, v[j].y);
                continue;
            }
            if (p.residual) {
                float2 add[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; ++j) {
                    add[j] = *reinterpret_cast<const float2*>(p.residual + at + 8 * (j0 + j));
                }
#pragma unroll
                for (int j = 0; j < BATCH; ++j) {
                    v[j].x += add[j].x;
                    v[j].y += add[j].y;
                }
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                *reinterpret_cast<float2*>(p.out + at + 8 * (j0 + j)) = v[j];
            }
        }
    }
}

__device__ __noinline__ float activate_any(float v, int act) { return activate(v, act); }

template <int NJ>
__device__ __forceinline__ void store_gated(const Part& p, int act, int rows, int row, int col,
                                            const float* bias, const float (&d)[NJ][4]) {
    const bool whole = p.pairs && col + 8 * (NJ / 2 - 1) + 1 < p.n;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = row + 8 * h;
        if (r >= rows) continue;
        float* at = p.out + (long long)r * p.stride + col;
#pragma unroll
        for (int j = 0; j < NJ / 2; ++j) {
            float v[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float gate = d[j][2 * h + i] + bias[8 * j + i];
                const float up = d[j + NJ / 2][2 * h + i] + bias[8 * (j + NJ / 2) + i];
                v[i] = (act == ACT_SILU ? activate(gate, ACT_SILU) : activate_any(gate, act)) * up;
            }
            if (whole) {
                *reinterpret_cast<float2*>(at + 8 * j) = make_float2(v[0], v[1]);
            } else {
                store_any(p, r, col + 8 * j, v[0], v[1]);
            }
        }
    }
}

template <int BN, int STAGES, int CLUSTER>
struct Gemm {
    static constexpr int A_BYTES = BM / BLOCK * BLOCK_BYTES, B_BYTES = BN / BLOCK * BLOCK_BYTES;
    static constexpr int STAGE = A_BYTES + B_BYTES;
    static constexpr int NJ = BN / 8;

    const Task& task;
    u32 stages;   // shared: [STAGES][a | b], aligned to 1024
    u32 full;     // barriers: [STAGES] full, [STAGES] empty
    float* all_biases;   // [CONSUMERS][BN]
    u32 rank;
    int tiles_m, turns;   // tiles_m: in units of CLUSTER

    __device__ __forceinline__ u32 empty(int stage) const { return full + 8 * (STAGES + stage); }

    // Of a turn: first row of the block's tile, and number of the column tile.
    __device__ __forceinline__ void place(int turn, int& row, int& tile) const {
        constexpr int BAND = 8 / CLUSTER;   // row tiles whose columns are shared in L2
        const int band = turn / (BAND * task.tiles_n);
        const int height = min(BAND, tiles_m - band * BAND);
        const int within = turn - band * BAND * task.tiles_n;
        row = ((band * BAND + within % height) * CLUSTER + int(rank)) * BM;
        tile = within / height;
    }

    // By one thread.
    __device__ __forceinline__ void produce(int first, int step) const {
        const int blocks_a = (task.rows + BLOCK - 1) / BLOCK;
        int stage = 0;
        u32 parity = 1;   // of a barrier nobody has arrived at: passes at once
#pragma unroll 1
        for (int turn = first; turn < turns; turn += step) {
            int row, tile;
            place(turn, row, tile);
            const int from = row / BLOCK, here = max(min(blocks_a - from, BM / BLOCK), 0);
            const long long next_row = (long long)task.blocks_k * BLOCK_BYTES;
            const char* a = task.a + from * next_row;
            // Each block of the cluster brings its share of b to all.
            constexpr int SHARE = BN / BLOCK / CLUSTER;
            const int own = int(rank) * SHARE;
            const char* b = task.b + ((long long)tile * (BN / BLOCK) + own) * next_row;
#pragma unroll 1
            for (int k = 0; k < task.blocks_k; ++k) {
                barrier_wait(empty(stage), parity);
                const u32 ready = full + 8 * stage, at = stages + stage * STAGE;
                barrier_expect(ready, here * BLOCK_BYTES + B_BYTES);
                for (int i = 0; i < here; ++i) {
                    bulk_copy(at + i * BLOCK_BYTES, a + i * next_row, BLOCK_BYTES, ready);
                }
#pragma unroll
                for (int i = 0; i < SHARE; ++i) {
                    const u32 to = at + A_BYTES + (own + i) * BLOCK_BYTES;
                    if (CLUSTER > 1) {
                        bulk_copy_to_all(to, b + i * next_row, BLOCK_BYTES, ready,
                                         (1 << CLUSTER) - 1);
                    } else {
                        bulk_copy(to, b + i * next_row, BLOCK_BYTES, ready);
                    }
                }
                a += BLOCK_BYTES;
                b += BLOCK_BYTES;
                if (++stage == STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
        }
    }

    // By one warp group. The stage before is free again once its products are done.
    __device__ __forceinline__ void release(int stage) const {
        const u32 thread = threadIdx.x % GROUP;
        if (thread < CLUSTER) barrier_arrive_at(empty(stage), thread);
    }

    // Of column c of a tile.
    __device__ __forceinline__ float bias_of(const Part& p, int tile, int c) const {
        const bool up = task.gated && c >= BN / 2;
        const int width = task.gated ? BN / 2 : BN, column = tile * width + c - (up ? width : 0);
        if (column >= p.n) return 0.0f;
        return up ? bias_at(p.other_bias, p.other_type, column)
                  : bias_at(p.bias, p.bias_type, column);
    }

    __device__ __forceinline__ void consume(int group, int first, int step) const {
        float* biases = all_biases + group * BN;
        const int warp = threadIdx.x % GROUP / WARP, lane = threadIdx.x % WARP;
        int stage = 0;
        u32 parity = 0;
#pragma unroll 1
        for (int turn = first; turn < turns; turn += step) {
            int row, tile;
            place(turn, row, tile);
            int part = 0;
            while (part < PARTS - 1 && tile >= task.part[part].tiles) {
                tile -= task.part[part++].tiles;
            }
            const Part& p = task.part[part];
            group_sync(group);   // the biases before have been read
            for (int c = threadIdx.x % GROUP; c < BN; c += GROUP) biases[c] = bias_of(p, tile, c);
            group_sync(group);

            float d[NJ][4];
            int before = 0;
#pragma unroll 1
            for (int k = 0; k < task.blocks_k; ++k) {
                barrier_wait(full + 8 * stage, parity);
                const u32 at = stages + stage * STAGE;
                const u64 a = operand(at + group * BLOCK_BYTES), b = operand(at + A_BYTES);
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < BLOCK / 16; ++i) {
                    wgmma(d, a + 2 * i, b + 2 * i, k > 0 || i > 0);
                }
                wgmma_commit();
                if (k > 0) {
                    wgmma_wait<1>();
                    release(before);
                }
                before = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
            wgmma_wait<0>();
            release(before);

            row += group * BLOCK + warp * 16 + (lane >> 2);
            const int col = 2 * (lane & 3);
            if (task.gated) {
                store_gated(p, task.act, task.rows, row, tile * (BN / 2) + col, biases + col, d);
            } else {
                store_linear(p, task.rows, row, tile * BN + col, biases + col, d);
            }
        }
    }

    __device__ __forceinline__ void run() {
        pdl_launch();
        rank = CLUSTER > 1 ? cluster_rank() : 0;
        tiles_m = (task.rows + BM * CLUSTER - 1) / (BM * CLUSTER);
        turns = tiles_m * task.tiles_n;
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; ++s) {
                barrier_init(full + 8 * s, 1);
                barrier_init(empty(s), CONSUMERS * CLUSTER);
            }
            barrier_init_done();
        }
        if (CLUSTER > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
        pdl_wait();
        const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
        const int group = threadIdx.x / GROUP;
        if (group == CONSUMERS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            if (threadIdx.x % GROUP == 0) produce(first, step);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
            consume(group, first, step);
        }
        // A block must not end while others write to its shared memory.
        if (CLUSTER > 1) cluster_meet();
    }
};

}  // namespace

// Shared memory (lower/gemm/wgmma.rs): 1024 + STAGES * ((BM + BN) * 128 + 16) + 8 BN bytes.
#define EXL_GEMM_WGMMA(BN, STAGES, CLUSTER)                                                       \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)                                    \
        __launch_bounds__(GROUP*(CONSUMERS + 1), 1)                                               \
            exl_gemm_wgmma_##BN(const __grid_constant__ Task task) {                              \
        extern __shared__ char shared[];                                                          \
        typedef Gemm<BN, STAGES, CLUSTER> G;                                                      \
        const u32 base = (smem_address(shared) + 1023) & ~1023u;                                  \
        const u32 full = base + STAGES * G::STAGE, biases = full + 16 * STAGES;                   \
        char* at = shared + (biases - smem_address(shared));                                      \
        G gemm = {task, base, full, reinterpret_cast<float*>(at)};                                \
        gemm.run();                                                                               \
    }

// Long prompts.
EXL_GEMM_WGMMA(256, 4, 2)
// Few rows, or few columns.
EXL_GEMM_WGMMA(128, 6, 1)
