// exl_moe_sort: sorts row slots by expert and cuts those of an expert into segments (experts.cuh).
// exl_moe_combine: adds the outputs of each row's experts.

#include "moe/experts.cuh"

namespace {

constexpr int SORT_THREADS = 1024;
constexpr int COMBINE_THREADS = 256;

// Sums over all threads before this one, of two values at once; `totals` is room for a pair per warp.
__device__ __forceinline__ int2 sums_before(int2 own, int2* totals, int2* all) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int2 sum = own;
#pragma unroll
    for (int d = 1; d < WARP; d <<= 1) {
        const int x = __shfl_up_sync(FULL_MASK, sum.x, d), y = __shfl_up_sync(FULL_MASK, sum.y, d);
        if (lane >= d) sum = make_int2(sum.x + x, sum.y + y);
    }
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    int2 before = make_int2(sum.x - own.x, sum.y - own.y);
    *all = make_int2(0, 0);
#pragma unroll 4
    for (int w = 0; w < SORT_THREADS / WARP; ++w) {
        const int2 t = totals[w];
        if (w < warp) before = make_int2(before.x + t.x, before.y + t.y);
        *all = make_int2(all->x + t.x, all->y + t.y);
    }
    return before;
}

}  // namespace

// ids I32 [slots]; what is no expert's number is in no segment. `rows`: most of a segment. One block, one
// thread per expert in between. The order of an expert's slots is whatever it turns out to be: no
// product depends on it. Bytes: ids twice, and 8 per slot.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    exl_moe_sort(const int* ids, int* counts, Segment* segments, int* sorted, int* segment_of,
                 int slots, int experts, int rows) {
    __shared__ int count[MOST_EXPERTS];   // slots of an expert, then places that are taken
    __shared__ int2 first[MOST_EXPERTS];  // an expert's first place and segment
    __shared__ int2 totals[SORT_THREADS / WARP];
    pdl_launch();
    const int expert = threadIdx.x;
    count[expert] = 0;
    pdl_wait();
    __syncthreads();
    for (int i = threadIdx.x; i < slots; i += SORT_THREADS) {
        const u32 id = ids[i];
        if (id < u32(experts)) atomicAdd(&count[id], 1);
    }
    __syncthreads();
    const int own = count[expert], pieces = (own + rows - 1) / rows;
    int2 all;
    const int2 before = sums_before(make_int2(own, pieces), totals, &all);
    first[expert] = before;
    count[expert] = 0;
    if (threadIdx.x == 0) {
        counts[0] = all.y;
        counts[1] = all.x;
    }
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
        segments[before.y + i] = {expert, before.x + i * rows, min(rows, own - i * rows), u16(i),
                                  u16(pieces)};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < slots; i += SORT_THREADS) {
        const u32 id = ids[i];
        if (id >= u32(experts)) continue;
        const int place = atomicAdd(&count[id], 1);
        sorted[first[id].x + place] = i;
        segment_of[first[id].x + place] = first[id].y + place / rows;
    }
}

// out[r, :] = residual[r, :] + sum over j of weights[r, j] * y[r * top_k + j, :], all F32; `out` may be
// `residual`. Blocks of a row in y; four columns per thread. Bytes: (top_k + 2) * 4 an element.
// `vectors`: n is a multiple of 4 and all are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    exl_moe_combine(const float* y, const float* weights, const float* residual, float* out, int n,
                    int top_k, int vectors) {
    pdl_launch();
    const long long row = blockIdx.x;
    const int column = (blockIdx.y * COMBINE_THREADS + threadIdx.x) * 4;
    pdl_wait();
    if (column >= n) return;
    const float* w = weights + row * top_k;
    const float* from = y + row * top_k * n + column;
    const long long at = row * n + column;
    float s[4] = {};
    if (vectors) {
        for (int j = 0; j < top_k; ++j) {
            const float4 v = *reinterpret_cast<const float4*>(from + (long long)j * n);
            s[0] = fmaf(w[j], v.x, s[0]);
            s[1] = fmaf(w[j], v.y, s[1]);
            s[2] = fmaf(w[j], v.z, s[2]);
            s[3] = fmaf(w[j], v.w, s[3]);
        }
        float4 add = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (residual) add = *reinterpret_cast<const float4*>(residual + at);
        *reinterpret_cast<float4*>(out + at) =
            make_float4(s[0] + add.x, s[1] + add.y, s[2] + add.z, s[3] + add.w);
        return;
    }
    for (int i = 0; i < 4 && column + i < n; ++i) {
        for (int j = 0; j < top_k; ++j) s[i] = fmaf(w[j], from[(long long)j * n + i], s[i]);
        out[at + i] = s[i] + (residual ? residual[at + i] : 0.0f);
    }
}
