// exl_gemm_f16_<BM>x<BN>: out[rows, n] = a[rows, k] b[n, k]^T in tensor cores (mma.sync), 16-bit
// operands, 32-bit sums; bias, residual or gate activation in the epilogue (output.cuh).
//
// For every GPU from sm_80: prompts on dequantized weights. Bound: the matrix rate. A block takes
// one BM x BN tile of the output, its warps WM x WN each; both operands stream through STAGES
// tiles of BK columns in shared memory (tile.cuh), copied by cp.async STAGES - 1 tiles ahead.
// Fragments are loaded one 16-column step ahead of the mma that use them, across tiles too.
//
// Every element is the sum of its k / 16 products in order of k, whatever the tile: results do not
// depend on which entry is chosen, nor on the number of rows.
//
// Shared memory:  [stage][A tile BM x BK | B tile BN x BK], then reused for the epilogue's rows.

#include "gemm/output.cuh"
#include "gemm/tile.cuh"

namespace {

template <int BM, int BN, int BK, int WM, int WN, int STAGES>
struct Gemm {
    static constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN;
    static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr int STAGE_BYTES = tile_bytes<BM, BK>() + tile_bytes<BN, BK>();
    static constexpr int STEPS = BK / 16;      // mma steps of a stage
    static constexpr int MI = WM / 16, NI = WN / 8;
    static_assert(STAGES * STAGE_BYTES >= THREADS / WARP * staging_bytes<WN>(), "epilogue rows");

    struct Fragments {
        u32 a[MI][4];
        u32 b[NI / 2][4];
    };

    // Addresses of a lane's rows in stage 0.
    u32 a_at, b_at;

    __device__ __forceinline__ void load(Fragments& f, int stage, int step) const {
        const u32 shift = u32(stage * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < MI; ++i) {
            ldmatrix_x4(f.a[i], ((a_at + shift) ^ u32(step * 32)) + i * 16 * (2 * BK));
        }
#pragma unroll
        for (int i = 0; i < NI / 2; ++i) {
            ldmatrix_x4(f.b[i], ((b_at + shift) ^ u32(step * 32)) + i * 16 * (2 * BK));
        }
    }

    __device__ __forceinline__ static void multiply(const Fragments& f, float (&d)[MI][NI][4]) {
#pragma unroll
        for (int m = 0; m < MI; ++m)
#pragma unroll
            for (int n = 0; n < NI; ++n) {
                mma_f16(d[m][n], f.a[m], f.b[n / 2][2 * (n & 1)], f.b[n / 2][2 * (n & 1) + 1]);
            }
    }

    __device__ __forceinline__ void run(const __half* a, const __half* b, int k,
                                        const Output& o) {
        extern __shared__ __align__(128) char shared[];
        pdl_launch();
        const int tiles_m = (o.rows + BM - 1) / BM, tiles_n = (o.n + BN - 1) / BN;
        const TileIndex tile = raster(blockIdx.x, tiles_m, tiles_n);
        const int warp = threadIdx.x / WARP;
        const int row = warp / WARPS_N * WM, col = warp % WARPS_N * WN;
        const u32 base = smem_address(shared);
        a_at = lane_address_a<BK>(base, row);
        b_at = lane_address_b<BK>(base + tile_bytes<BM, BK>(), col);

        TileLoader<BM, BK, THREADS> from_a;
        TileLoader<BN, BK, THREADS> from_b;
        from_a.init(a, tile.m * BM, o.rows, k);
        from_b.init(b, tile.n * BN, o.n, k);
        const int count = (k + BK - 1) / BK;
        pdl_wait();   // both operands are written by earlier kernels
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < count) {
                from_a.next(shared + s * STAGE_BYTES);
                from_b.next(shared + s * STAGE_BYTES + tile_bytes<BM, BK>());
            }
            cp_async_commit();
        }

        float d[MI][NI][4] = {};
        Fragments f[2];
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load(f[0], 0, 0);
        int stage = 0, fill = STAGES - 1;
        for (int i = 0; i < count; ++i) {
            const int after = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (s == STEPS - 1) {
                    // Groups 0 .. i + STAGES - 1 are committed: all but the last STAGES - 2 done
                    // means that tile i + 1 is here. Behind the barrier nobody reads tile i.
                    cp_async_wait<STAGES - 2>();
                    __syncthreads();
                    load(f[(s + 1) & 1], after, 0);
                } else {
                    load(f[(s + 1) & 1], stage, s + 1);
                }
                if (s == 0) {
                    // Tile i + STAGES - 1 goes where tile i - 1 was.
                    if (i + STAGES - 1 < count) {
                        from_a.next(shared + fill * STAGE_BYTES);
                        from_b.next(shared + fill * STAGE_BYTES + tile_bytes<BM, BK>());
                    }
                    cp_async_commit();
                    fill = fill + 1 == STAGES ? 0 : fill + 1;
                }
                multiply(f[s & 1], d);
            }
            stage = after;
        }
        cp_async_wait<0>();
        __syncthreads();   // the stages become staging rows

        float* staging = reinterpret_cast<float*>(shared + warp * staging_bytes<WN>());
#pragma unroll
        for (int m = 0; m < MI; ++m) {
            store_16_rows<NI>(o, staging, tile.m * BM + row + 16 * m, tile.n * BN + col, d[m]);
        }
    }
};

}  // namespace

// Shared memory (lower/gemm/f16.rs): STAGES * (BM + BN) * BK * 2 bytes.
#define EXL_GEMM_F16(BM, BN, BK, WM, WN, STAGES, BLOCKS)                                          \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32, BLOCKS)                \
        exl_gemm_f16_##BM##x##BN(const __half* a, const __half* b, float* out, const void* bias,  \
                                 const float* residual, const float* gate, int rows, int n,       \
                                 int stride, int k, int bias_type, int act, int vectors) {        \
        const Output o = {out, bias,   residual,  gate, nullptr, rows,                            \
                          n,   stride, bias_type, act,  vectors};                                 \
        Gemm<BM, BN, BK, WM, WN, STAGES> gemm;                                                    \
        gemm.run(a, b, k, o);                                                                     \
    }

// Few rows, or too few tiles of the larger sizes to keep every multiprocessor busy.
EXL_GEMM_F16(64, 64, 64, 32, 32, 3, 4)
// Two blocks a multiprocessor, which overlap one's epilogue with the other's products.
EXL_GEMM_F16(128, 128, 32, 64, 64, 3, 2)
// Long prompts: least traffic from L2 for each product.
EXL_GEMM_F16(128, 256, 32, 64, 64, 4, 1)
