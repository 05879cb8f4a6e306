// exl_moe_rows*: products of segments of up to 16 rows with their experts' quantized matrices, at the
// speed of the memory.
//
// What: gate and up with the activation between them, or one matrix. Reads the packed weights of experts
// that have rows, once per segment. Expected bound: memory, as qgemm/decode.cu, whose arithmetic and
// results these are: a row's depends on nothing but the row.

#include "moe/task.cuh"
#include "qgemm/decode.cuh"

namespace {

template <int KIND, int NT>
__device__ __forceinline__ void rows(const ExpertsTask& task) {
    extern __shared__ __align__(1024) char shared[];
    typedef SegmentTask<false> Own;
    pdl_launch();
    Own& own = *reinterpret_cast<Own*>(shared);
    task.prefetch_descriptors();
    pdl_wait();
    const Experts experts = {task.table, nullptr, task.gated ? 2 : 1};
    const Share share = Share::of(max(task.sorted.segment_count(), 1), task.columns);
    const int units = min(share.to, task.sorted.segment_count() * task.columns);
#pragma unroll 1
    for (int unit = share.from; unit < units;) {
        const int s = unit / task.columns, first = unit - s * task.columns;
        const Turn turn = {first, min(task.columns, first + units - unit)};
        unit += turn.to - turn.from;
        const Segment segment = task.sorted.segments[s];
        own.begin(task, segment.first, segment.rows);
        if (own.take(task, segment.expert, experts)) {
            __syncthreads();
            few_rows<KIND, NT>(own, turn, shared + TASK_BYTES);
        }
        __syncthreads();
    }
}

}  // namespace

#define ENTRY(NAME, KIND, NT)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS<NT>* WARP, 1)                               \
        NAME(const __grid_constant__ ExpertsTask task) {                                           \
        rows<KIND, NT>(task);                                                                      \
    }
// 4, 8 and 16 rows.
ENTRY(exl_moe_rows4_exl2, KIND_EXL2, 1)
ENTRY(exl_moe_rows4_gptq, KIND_GPTQ, 1)
ENTRY(exl_moe_rows8_exl2, KIND_EXL2, 2)
ENTRY(exl_moe_rows8_gptq, KIND_GPTQ, 2)
ENTRY(exl_moe_rows16_exl2, KIND_EXL2, 4)
ENTRY(exl_moe_rows16_gptq, KIND_GPTQ, 4)
