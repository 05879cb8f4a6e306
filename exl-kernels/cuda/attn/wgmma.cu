// exl_attn_wgmma_*: attention of many query rows per sequence over a cache of 16-bit floats, by
// warpgroups.
//
// exl: arch sm_90a
//
// What: as prefill.cu, for tiles of 128 packed rows (attn.cuh), 64 for each of two warpgroups. A third
// one copies K and V, KEYS keys at a time, into rings of two stages. A warpgroup's products with the
// next K run while it weighs V, and the softmax of one goes beside the products of the other. Queries
// and weights are rounded to 16-bit floats.
//
// Operands lie in panels of 64 values, rows of 128 bytes with the 128-byte swizzle. Blocks with the
// longest contexts start first.
//
// Bytes: K and V up to the last row's position for every tile, mostly from the second-level cache.
// Bound: tensor cores.
#include "attn/attn.cuh"
#include "common/bulk.cuh"
#include "common/wgmma.cuh"

namespace {

constexpr int CONSUMERS = 2;   // warpgroups that multiply
constexpr int WARP_ROWS = 16, GROUP_ROWS = 4 * WARP_ROWS, ROWS = CONSUMERS * GROUP_ROWS;
constexpr int STAGES = 2;
constexpr int PANEL = 64, PANEL_ROW = 128;   // values and bytes of a row of a panel

// Shared memory (lower/attention/tiles.rs): queries, K, V, aligned to 1024, what is to know of the rows,
// barriers.
template <int D, int KEYS>
struct Shared {
    static constexpr int QUERY_BYTES = GROUP_ROWS * 2 * D, TILE_BYTES = KEYS * 2 * D;

    char* at;   // as pointer and as shared address
    u32 base;

    __device__ __forceinline__ Shared(char* memory) {
        base = (smem_address(memory) + 1023) & ~1023u;
        at = memory + (base - smem_address(memory));
    }
    __device__ __forceinline__ u32 query(int group) const { return base + group * QUERY_BYTES; }
    // K: which = 0, V: 1.
    __device__ __forceinline__ u32 tile(int which, int stage) const {
        return base + CONSUMERS * QUERY_BYTES + (which * STAGES + stage) * TILE_BYTES;
    }
    __device__ __forceinline__ Row* rows() const {
        return reinterpret_cast<Row*>(at + CONSUMERS * QUERY_BYTES + 2 * STAGES * TILE_BYTES);
    }
    __device__ __forceinline__ u32 full(int which, int stage) const {
        return tile(2, 0) + ROWS * int(sizeof(Row)) + 8 * (which * STAGES + stage);
    }
    __device__ __forceinline__ u32 empty(int which, int stage) const {
        return full(which, stage) + 8 * 2 * STAGES;
    }

    // store_rows' view of the queries.
    __device__ __forceinline__ void put(int r, int value, uint2 high, uint2) const {
        const int row = r % GROUP_ROWS, byte = value % PANEL * 2;
        char* to = at + r / GROUP_ROWS * QUERY_BYTES + value / PANEL * GROUP_ROWS * PANEL_ROW +
                   row * PANEL_ROW + (byte ^ row % 8 * 16);
        *reinterpret_cast<uint2*>(to) = high;
    }
    __device__ __forceinline__ void put(int r, const Row& row) const { rows()[r] = row; }
};

// Copies K and V of a tile's keys to the rings, with a warpgroup.
template <int D, int KEYS>
struct Producer {
    const Attention& a;
    const Shared<D, KEYS>& shared;
    const Tile& tile;
    int kv_head;

    // Threads side by side in a row of a panel, 16 bytes each. What is no key of the tile or lies
    // beyond `dim` becomes zeros.
    __device__ __forceinline__ void copy(u32 to, const void* cache, int page, int key) const {
        constexpr int SIDE = 8, STEP = GROUP / SIDE;
        const int thread = threadIdx.x % GROUP, row = thread / SIDE, side = thread % SIDE;
        const int pitch = a.kv_heads * a.dim, at = side * 8;
        const long long token = (long long)page * PAGE_TOKENS + (key + row) % PAGE_TOKENS;
        const __half* from =
            static_cast<const __half*>(cache) + (token * a.kv_heads + kv_head) * a.dim + at;
        to += row * PANEL_ROW + ((side ^ row % 8) * 16);
#pragma unroll
        for (int i = 0; i < KEYS; i += STEP) {
            const bool there = key + row + i >= tile.keys_from && key + row + i < tile.keys_to;
#pragma unroll
            for (int p = 0; p < D / PANEL; ++p) {
                const int bytes = there && at + p * PANEL < a.dim ? 16 : 0;
                cp_async_16_zfill(to + (p * KEYS + i) * PANEL_ROW, from + p * PANEL, bytes);
            }
            from += STEP * pitch;
        }
    }

    __device__ __forceinline__ void run(int begin) const {
        const int* pages = a.block_table + (long long)tile.seq * a.pages_per_seq;
        int t = 0;
        int page = pages[begin / PAGE_TOKENS];
#pragma unroll 1
        for (int key = begin; key < tile.keys_to; key += KEYS, ++t) {
            const int next_key = min(key + KEYS, tile.keys_to - 1);
            const int next_page = pages[next_key / PAGE_TOKENS];
            const int stage = t % STAGES;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                // The first wait on a stage is for a phase nobody was in: passes at once.
                barrier_wait(shared.empty(which, stage), (t / STAGES + 1) % 2);
                copy(shared.tile(which, stage), which ? a.v_cache : a.k_cache, page, key);
                barrier_arrive_copied(shared.full(which, stage));
            }
            page = next_page;
        }
    }
};

// 64 rows of a warpgroup. Lane l of a warp has rows l / 4 and l / 4 + 8 of the warp's 16, and columns
// 8 n + 2 (l % 4), + 1 of keys and values.
template <int D, int KEYS>
struct Consumer {
    const Attention& a;
    const Shared<D, KEYS>& shared;
    int group;
    Row row[2];
    int first_row;   // position of the warp's first row: all see the keys up to it
    int first_seen;  // by the tile's last row: all see the keys from there on, as for the window
    float most[2], sum[2];
    float scores[KEYS / 8][4], values[D / 8][4];
    u32 weights[KEYS / 16][4];

    // Begins scores = queries K^T.
    __device__ __forceinline__ void score(int stage) {
        const u32 query = shared.query(group), k = shared.tile(0, stage);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const int panel = i / 4, within = i % 4 * 2;
            wgmma(scores, operand(query + panel * GROUP_ROWS * PANEL_ROW) + within,
                  operand(k + panel * KEYS * PANEL_ROW) + within, i > 0);
        }
        wgmma_commit();
    }

    // Begins values += weights V. The layout of sums is that of a first operand in registers.
    __device__ __forceinline__ void weigh(int stage, bool keep) {
        const u64 v = operand_across(shared.tile(1, stage), KEYS * PANEL_ROW);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
            wgmma_across(values, weights[i], v + 128 * i, keep || i > 0);
        }
        wgmma_commit();
    }

    // Until the copies to a stage have landed, written by other threads.
    __device__ __forceinline__ void await(int which, int stage, int parity) const {
        barrier_wait(shared.full(which, stage), parity);
        shared_written();
    }
    // By one thread once the products that read a stage are done.
    __device__ __forceinline__ void release(int which, int stage) const {
        if (threadIdx.x % GROUP == 0) barrier_arrive(shared.empty(which, stage));
    }

    // Scores of keys from `key` on become weights, as floats; `keep` are the factors of what was
    // summed before.
    __device__ __forceinline__ void softmax(int key, float (&keep)[2]) {
        const bool hides = key + KEYS - 1 > first_row || key < first_seen;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float raw[KEYS / 4];
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) raw[i] = scores[i / 2][2 * h + i % 2];
            keep[h] = soften(a, raw, row[h], key, hides, most[h], sum[h]);
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) scores[i / 2][2 * h + i % 2] = raw[i];
        }
    }

    // Weights as first operand: registers of rows 0-7 and 8-15 by keys 0-7, then by keys 8-15.
    __device__ __forceinline__ void round() {
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = scores[2 * k + i / 2] + i % 2 * 2;
                weights[k][i] = as_u32(__floats2half2_rn(pair[0], pair[1]));
            }
        }
    }

    __device__ __forceinline__ void run(const Tile& tile, int begin) {
        const int first = group * GROUP_ROWS + threadIdx.x % GROUP / WARP * WARP_ROWS;
        const Row* rows = shared.rows() + first;
        first_row = rows[0].position;
        first_seen = first_key(a, tile.keys_to - 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            row[h] = rows[threadIdx.x % WARP / 4 + 8 * h];
            most[h] = minus_infinity();
            sum[h] = 0.0f;
        }
        if (begin >= tile.keys_to) return;
        float keep[2];
        int t = 0;
        await(0, 0, 0);
        score(0);
        wgmma_wait<0>();
        release(0, 0);
        softmax(begin, keep);
        round();
#pragma unroll 1
        for (int key = begin + KEYS; key < tile.keys_to; key += KEYS) {
            const int stage = t % STAGES, next = (t + 1) % STAGES;
            await(0, next, (t + 1) / STAGES % 2);
            score(next);
            await(1, stage, t / STAGES % 2);
            weigh(stage, t > 0);
            wgmma_wait<1>();
            release(0, next);
            softmax(key, keep);
            wgmma_wait<0>();
            release(1, stage);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) values[n][i] *= keep[i / 2];
            }
            round();
            ++t;
        }
        await(1, t % STAGES, t / STAGES % 2);
        weigh(t % STAGES, t > 0);
        wgmma_wait<0>();
    }

    __device__ __forceinline__ void write() const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            write_row(a, row[h].cell, sum[h], values, h);
        }
    }
};

template <int D, int KEYS>
__device__ __forceinline__ void attend(const Attention& a) {
    extern __shared__ char memory[];
    const Shared<D, KEYS> shared(memory);
    const int group = threadIdx.x / GROUP, kv_head = blockIdx.y;
    pdl_launch();
    if (threadIdx.x == 0) {
        for (int which = 0; which < 2; ++which) {
            for (int s = 0; s < STAGES; ++s) {
                barrier_init(shared.full(which, s), GROUP);
                barrier_init(shared.empty(which, s), CONSUMERS);
            }
        }
    }
    __syncthreads();
    pdl_wait();
    const Tile tile = find_tile<ROWS>(a, int(gridDim.x - 1 - blockIdx.x));
    if (tile.count <= 0) return;
    const int begin = tile.keys_from / KEYS * KEYS;
    if (group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (begin < tile.keys_to) Producer<D, KEYS>{a, shared, tile, kv_head}.run(begin);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int first = threadIdx.x / WARP * WARP_ROWS;
        store_rows<D, 1, WARP_ROWS, (D > 128 ? 4 : 8)>(a, tile, kv_head, first, shared);
        shared_written();
        group_sync(group);
        Consumer<D, KEYS> consumer = {a, shared, group};
        consumer.run(tile, begin);
        consumer.write();
    }
}

}  // namespace

#define ATTENTION(D, KEYS)                                                                        \
    extern "C" __global__ void __launch_bounds__(GROUP*(CONSUMERS + 1), 1) exl_attn_wgmma_##D(    \
        ATTENTION_PARAMETERS) {                                                                   \
        attend<D, KEYS>(ATTENTION_ARGUMENTS);                                                     \
    }
// Heads of up to D values.
ATTENTION(64, 128)
ATTENTION(128, 128)
ATTENTION(256, 64)
