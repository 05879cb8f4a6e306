// exl_moe_block_x, exl_moe_block_x_f16: the inputs of experts in the order of their matrices.
//
// The row of slot s is row s / by of x, F32 [.., inputs]. Rows of a segment lie together, as the products
// of few rows want theirs: rounded to 16-bit integers (qgemm/input.cuh), or as 16-bit floats
// (qgemm/cluster.cu: exl_block_x_f16), here in blocks of 32 columns [blocks][rows][32]. With a second
// matrix, up, whose order is not gate's, x lies there in that order too, behind all that is in gate's.

#include "moe/experts.cuh"
#include "qgemm/half_walk.cuh"

namespace {

constexpr int THREADS = 256;

// The order of the packed rows of an expert's matrix `part`; false when there is nothing to prepare for
// it.
__device__ __forceinline__ bool order_of(const QMatrix* const* table, int parts, int expert, int part,
                                         const u32*& perm) {
    const QMatrix* m = table[expert * parts + part];
    if (!m) return false;
    perm = m->perm;
    return part == 0 || table[expert * parts]->perm != perm;
}

}  // namespace

// One warp per sorted slot and chunk of 128 columns. `row_bytes`: of one row in XBytes; `part_bytes`: of
// all slots. Bytes: 6 per value.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_moe_block_x(const QMatrix* const* table, const __grid_constant__ Sorted sorted, const float* x,
                    char* out, int parts, int by, int inputs, int row_bytes, long long part_bytes) {
    pdl_launch();
    const int lane = threadIdx.x % WARP, place = blockIdx.y, part = blockIdx.z;
    const int chunk = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    const int k = 128 * chunk + 4 * lane;
    pdl_wait();
    if (place >= sorted.slot_count() || 128 * chunk >= inputs) return;
    const Segment s = sorted.segments[sorted.segment_of[place]];
    const u32* perm;
    if (!order_of(table, parts, s.expert, part, perm)) return;
    const int slot = sorted.slots[place], row = place - s.first;
    out += part * part_bytes + (long long)s.first * row_bytes;
    const XBytes at(s.rows, inputs);
    float v[4];
    gather(v, x + (long long)(slot / by) * inputs, features(perm, k, inputs), k, inputs);
    const Quantized q = quantize_chunk(v);
    const int sum = block_sum(q.sum);
    if (lane == 0) reinterpret_cast<float*>(out + at.scales)[chunk * s.rows + row] = q.scale;
    if (k >= inputs) return;
    char* to = out + ((long long)(k / 32) * s.rows + row) * X_ROW + k % 32;
    *reinterpret_cast<u32*>(to) = q.high;
    *reinterpret_cast<u32*>(to + 32) = q.low;
    if (lane % 8 == 0) reinterpret_cast<int*>(out + at.sums)[k / 32 * s.rows + row] = sum;
}

// A block takes whole rows: it reads one in order, keeps it as 16-bit floats in shared memory and
// gathers there. Bytes: 6 per value, 10 with a second order.
extern "C" __global__ void __launch_bounds__(THREADS)
    exl_moe_block_x_f16(const QMatrix* const* table, const __grid_constant__ Sorted sorted,
                        const float* x, char* out, int parts, int by, int inputs,
                        long long part_bytes) {
    extern __shared__ __align__(16) char shared[];
    u16* row_at = reinterpret_cast<u16*>(shared);
    pdl_launch();
    pdl_wait();
    const int places = sorted.slot_count();
    for (int place = blockIdx.x; place < places; place += gridDim.x) {
        const Segment s = sorted.segments[sorted.segment_of[place]];
        const float* from = x + (long long)(sorted.slots[place] / by) * inputs;
        __syncthreads();   // the row before has been read
        for (int k = 4 * threadIdx.x; k < inputs; k += 4 * THREADS) {
            const float4 v = *reinterpret_cast<const float4*>(from + k);
            row_at[k] = __half_as_ushort(to_half_sat(v.x));
            row_at[k + 1] = __half_as_ushort(to_half_sat(v.y));
            row_at[k + 2] = __half_as_ushort(to_half_sat(v.z));
            row_at[k + 3] = __half_as_ushort(to_half_sat(v.w));
        }
        __syncthreads();
        const long long first = 2ll * s.first * inputs;
        for (int part = 0; part < parts; ++part) {
            const u32* perm;
            if (!order_of(table, parts, s.expert, part, perm)) continue;
            char* to = out + part * part_bytes + first + (place - s.first) * X_ROW;
            for (int k = 4 * threadIdx.x; k < inputs; k += 4 * THREADS) {
                const uint4 p = features(perm, k, inputs);
                u16 h[4];
                h[half_place(0)] = row_at[p.x];
                h[half_place(1)] = row_at[p.y];
                h[half_place(2)] = row_at[p.z];
                h[half_place(3)] = row_at[p.w];
                *reinterpret_cast<ushort4*>(to + (long long)(k / 32) * s.rows * X_ROW + k % 32 * 2) =
                    make_ushort4(h[0], h[1], h[2], h[3]);
            }
        }
    }
}
