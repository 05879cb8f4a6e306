// exl_qgemm_rows*: products of up to 32 rows with quantized matrices, at the speed of the memory.
//
// What: up to three matrices with one input (q, k, v), or gate and up with the activation between
// them. Reads every packed weight once: K N bits / 8 bytes, plus scale codes (1/32 byte per weight
// and group of 128). Expected bound: memory; about 0.8 instructions per weight.
//
// Numbers: x is rounded to 16-bit integers (input.cuh). Codes times bytes are summed exactly in 32-bit
// integers on the tensor cores (weights are A; the two bytes of a row of x are two columns of B), and
// folded into 32-bit floats (walk.cuh). That is the CPU's Exact16 arithmetic.

#include "qgemm/decode.cuh"

namespace {

template <int KIND, int NT>
__device__ __forceinline__ void qgemm(const Task& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    // The thread block's tiles are consecutive, so that most belong to one matrix.
    const Turn mine = Turn::of(blockIdx.x, task.tiles, task.each, gridDim.x);
    few_rows<KIND, NT>(task, mine, shared);
}

}  // namespace

#define ENTRY(NAME, KIND, NT)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS<NT>* WARP, 1)                               \
        NAME(const __grid_constant__ Task task) {                                                  \
        qgemm<KIND, NT>(task);                                                                     \
    }
// 4, 8, 16 and 32 rows.
#define ENTRIES(SUFFIX, KIND)                                                                      \
    ENTRY(exl_qgemm_rows4_##SUFFIX, KIND, 1)                                                       \
    ENTRY(exl_qgemm_rows8_##SUFFIX, KIND, 2)                                                       \
    ENTRY(exl_qgemm_rows16_##SUFFIX, KIND, 4)                                                      \
    ENTRY(exl_qgemm_rows32_##SUFFIX, KIND, 8)

ENTRIES(exl2, KIND_EXL2)
ENTRIES(gptq, KIND_GPTQ)

// Several rows of x, gathered by a permutation and rounded (XBytes). One warp per row and chunk.
extern "C" __global__ void __launch_bounds__(256)
    exl_block_x(const float* x, const u32* perm, char* out, int rows, int inputs) {
    pdl_launch();
    int lane = threadIdx.x % WARP;
    int chunk = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, row = blockIdx.y;
    int k = 128 * chunk + 4 * lane;
    uint4 from = features(perm, k, inputs);
    pdl_wait();
    if (128 * chunk >= inputs) return;
    const XBytes at(rows, inputs);
    float v[4];
    gather(v, x + (long long)row * inputs, from, k, inputs);
    Quantized q = quantize_chunk(v);
    int sum = block_sum(q.sum);
    if (lane == 0) reinterpret_cast<float*>(out + at.scales)[chunk * rows + row] = q.scale;
    if (k < inputs) {
        char* to = out + ((long long)(k / 32) * rows + row) * X_ROW + k % 32;
        *reinterpret_cast<u32*>(to) = q.high;
        *reinterpret_cast<u32*>(to + 32) = q.low;
        if (lane % 8 == 0) reinterpret_cast<int*>(out + at.sums)[k / 32 * rows + row] = sum;
    }
}
