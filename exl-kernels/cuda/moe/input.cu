// exl_moe_block_x, exl_moe_block_x_f16, exl_moe_block_x_wgmma: the inputs of experts in the order of their
// matrices.
//
// The row of slot s is row s / by of x, F32 [.., inputs]. Rows of a segment lie together: rounded to 16-bit
// integers as for products of few rows (qgemm/input.cuh), or as 16-bit floats, in lines of 32 or 64
// columns [lines][rows][columns]. With a second matrix, up, whose order is not gate's, x lies there in
// that order too, behind all that is in gate's.

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

namespace {

// Where four values from column `k` of row `r` of a segment go, as exl_block_x_f16 would put them.
struct Rowwise {
    static constexpr int COLUMNS = 32;   // of a line

    __device__ __forceinline__ static void put(char* block, int r, int k, const u16 (&h)[4]) {
        u16 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[half_place(i)] = h[i];
        *reinterpret_cast<ushort4*>(block + r * X_ROW + k % 32 * 2) =
            make_ushort4(v[0], v[1], v[2], v[3]);
    }
};

// The same for warpgroups: lines of 64 columns in the swizzled order of wgmma. Of four packed columns 8t + 4s
// and on of a block, 0 and 2 are columns 2t and + 1 of step s of 16, 1 and 3 are columns 8 + 2t and + 1:
// so lie the weights (half.cuh: expand_halves).
struct Swizzled {
    static constexpr int COLUMNS = 64;

    __device__ __forceinline__ static void put(char* block, int r, int k, const u16 (&h)[4]) {
        const int t = k % 32 / 8, s = k % 8 / 4, chunk = k % 64 / 32 * 4 + 2 * s;
        char* line = block + r * 128 + 4 * t;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 pair = u32(h[i]) | u32(h[i + 2]) << 16;
            *reinterpret_cast<u32*>(line + (((chunk + i) ^ (r & 7)) << 4)) = pair;
        }
    }
};

// A block takes whole rows: it reads one in order, keeps it as 16-bit floats in shared memory and
// gathers there.
template <typename Form>
__device__ __forceinline__ void block_x(const QMatrix* const* table, const Sorted& sorted,
                                        const float* x, char* out, int parts, int by, int inputs,
                                        long long part_bytes) {
    extern __shared__ __align__(16) char shared[];
    u16* row_at = reinterpret_cast<u16*>(shared);
    constexpr int LINE = 2 * Form::COLUMNS;
    const int lines = (inputs + Form::COLUMNS - 1) / Form::COLUMNS;
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
        for (int part = 0; part < parts; ++part) {
            const u32* perm;
            if (!order_of(table, parts, s.expert, part, perm)) continue;
            char* to = out + part * part_bytes + (long long)s.first * lines * LINE;
            for (int k = 4 * threadIdx.x; k < inputs; k += 4 * THREADS) {
                const uint4 p = features(perm, k, inputs);
                const u16 h[4] = {row_at[p.x], row_at[p.y], row_at[p.z], row_at[p.w]};
                char* line = to + (long long)(k / Form::COLUMNS) * s.rows * LINE;
                Form::put(line, place - s.first, k, h);
            }
        }
    }
}

}  // namespace

// Bytes: 6 per value, 10 with a second order.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_moe_block_x_f16(const QMatrix* const* table, const __grid_constant__ Sorted sorted,
                        const float* x, char* out, int parts, int by, int inputs,
                        long long part_bytes) {
    block_x<Rowwise>(table, sorted, x, out, parts, by, inputs, part_bytes);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_moe_block_x_wgmma(const QMatrix* const* table, const __grid_constant__ Sorted sorted,
                          const float* x, char* out, int parts, int by, int inputs,
                          long long part_bytes) {
    block_x<Swizzled>(table, sorted, x, out, parts, by, inputs, part_bytes);
}
