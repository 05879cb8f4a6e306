// exl_moe_dense_*, exl_moe_dense_gate_up_*: products of segments of up to eight rows with their experts'
// unquantized matrices at full 32-bit accuracy, as gemm/dense.cu.
//
// What: out[slot] = x[slot / by] W^T with W [n, inputs] in 32 or 16 bits, or gate and up with the
// activation between them. Bytes: the weights of an expert once per segment. Bound by memory, or by
// 32-bit arithmetic where experts have many rows.

#include "gemm/dense.cuh"
#include "moe/experts.cuh"
#include "qgemm/epilogue.cuh"

namespace {

constexpr int COLUMNS = 8;   // of a block, one per warp

// The host fills this struct word by word: lower/moe/dense.rs.
struct DenseTask {
    const void* const* table;   // [experts][gate and up, or one]; 0: not this kernel's
    Sorted sorted;
    const float* x;
    float* out;                 // [slots, n]
    int by;
    int inputs, n;
    int act;
};

// The rows of a segment.
struct Rows {
    const float* at[ROWS];
    int slot[ROWS];

    __device__ __forceinline__ Rows(const DenseTask& task, const Segment& s) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            slot[r] = task.sorted.slots[s.first + min(r, s.rows - 1)];
            at[r] = task.x + (long long)(slot[r] / task.by) * task.inputs;
        }
    }
    __device__ __forceinline__ const float* operator()(int r) const { return at[r]; }
};

template <typename W, bool GATED>
__device__ __forceinline__ void dense(const DenseTask& task) {
    pdl_launch();
    const int across = (task.n + COLUMNS - 1) / COLUMNS, index = blockIdx.x / across;
    const int column = blockIdx.x % across * COLUMNS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    pdl_wait();
    if (index >= task.sorted.segment_count() || column >= task.n) return;
    const Segment s = task.sorted.segments[index];
    const void* const* from = task.table + s.expert * (GATED ? 2 : 1);
    if (!from[0]) return;
    const long long at = (long long)column * task.inputs;
    const Rows rows(task, s);
    float g[ROWS], u[ROWS];
    dots(g, rows, static_cast<const W*>(from[0]) + at, s.rows, task.inputs, lane);
    if (GATED) dots(u, rows, static_cast<const W*>(from[1]) + at, s.rows, task.inputs, lane);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= s.rows) break;
        const float v = GATED ? activate(g[r], task.act) * u[r] : g[r];
        task.out[(long long)rows.slot[r] * task.n + column] = v;
    }
}

}  // namespace

#define ENTRIES(SUFFIX, W)                                                                        \
    extern "C" __global__ void __launch_bounds__(COLUMNS* WARP, 2)                                \
        exl_moe_dense_##SUFFIX(const __grid_constant__ DenseTask task) {                          \
        dense<W, false>(task);                                                                    \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(COLUMNS* WARP, 2)                                \
        exl_moe_dense_gate_up_##SUFFIX(const __grid_constant__ DenseTask task) {                  \
        dense<W, true>(task);                                                                     \
    }
ENTRIES(f32, float)
ENTRIES(f16, __half)
ENTRIES(bf16, __nv_bfloat16)
