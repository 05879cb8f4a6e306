// exl_qgemm_*, exl_qgate_up_*: products of 1 to 32 rows with quantized matrices, at the speed of
// the memory.
//
// What: up to three matrices with one input (q, k, v), or gate and up with the activation between
// them. Reads every packed weight once: K N bits / 8 bytes, plus scale codes (1/32 byte per weight
// and group of 128). Expected bound: memory bandwidth; about 1.6 instructions per weight are the
// other limit.
//
// Numbers: x is rounded to 16-bit integers, with one scale for each row and chunk of 128 packed
// columns, and split into two signed bytes. Codes times bytes are summed exactly in 32-bit integers
// on the tensor cores (weights are A; the two bytes of a row of x are two columns of B), and folded
// into 32-bit floats at the end of every piece and chunk. That is the CPU's Exact16 arithmetic.
//
// A thread block takes one column tile (tile.cuh) at a time; its warps share the tile's K range by
// cost. Each warp streams its blocks through a ring in shared memory. The warps' sums are added in
// shared memory in a fixed order.

#include "qgemm/epilogue.cuh"
#include "qgemm/scales.cuh"
#include "qgemm/tile.cuh"

namespace {

// Cost of a block beside its bits, in bits: what makes warps finish together.
constexpr int BLOCK_COST = 2;

// Cost of all blocks before `block`; with EACH = 0 their size in units of 128 bytes.
template <int EACH>
__device__ __forceinline__ int cost_before(const QMatrix& m, int block) {
    int cost = 0, first = 0;
    for (int r = 0; r < m.runs; ++r) {
        int n = min(m.run_end[r], block) - first;
        if (n <= 0) break;
        cost += n * (m.run_bits[r] + EACH);
        first = m.run_end[r];
    }
    return cost;
}

// First block of share `i` of `n` equal shares of the matrix's cost.
__device__ __forceinline__ int share_begin(const QMatrix& m, int total, int i, int n) {
    // At most 2048 blocks that cost 10 and 16 shares: no overflow.
    int want = int(u32(total) * u32(i) / u32(n)), first = 0;
    for (int r = 0; r < m.runs; ++r) {
        u32 each = m.run_bits[r] + BLOCK_COST;
        int run = (m.run_end[r] - first) * each;
        if (want < run) return first + u32(want) / each;
        want -= run;
        first = m.run_end[r];
    }
    return m.blocks;
}

constexpr int CHUNK = 512;             // bytes a warp copies at a time
constexpr int CHUNKS = 8;              // of them under way
constexpr int RING = CHUNK * CHUNKS;   // bytes of a warp's ring
constexpr int X_CHUNK_BLOCKS = 4;      // blocks that share a scale of x: 128 columns
constexpr int X_ROW = 64;              // bytes of a row of x in a block: 32 high, 32 low

// NT: groups of four rows; lane 4g + t has the sums of rows 4n + t.
constexpr int x_slots(int nt) { return nt > 4 ? 4 : 8; }
constexpr int x_ring(int nt) { return x_slots(nt) * 4 * nt * X_ROW; }

// Sums of a lane's columns g, g+8, g+16, g+24 for its rows.
template <int NT>
struct Sums {
    float total[NT][4];
    int part[NT][2][4];   // [..][column half]: {high, low} of column g, then of column g + 8

    __device__ __forceinline__ void clear_parts() {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int c = 0; c < 4; ++c) part[n][m][c] = 0;
    }

    // `sums_of_x[n]`: sum of x over the blocks since the last fold, for GPTQ's zero points.
    template <int KIND>
    __device__ __forceinline__ void fold(const Scales<KIND>& sc, const float (&x_scale)[NT],
                                         int (&sums_of_x)[NT]) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int* p = &part[n][i >> 1][2 * (i & 1)];
                int v = p[0] * 256 + p[1];
                if constexpr (KIND == KIND_GPTQ) v += sc.shift[i] * 16 * sums_of_x[n];
                total[n][i] = fmaf(sc.s[i] * x_scale[n], float(v), total[n][i]);
            }
            sums_of_x[n] = 0;
        }
        clear_parts();
    }
};

constexpr int at_most(int a, int b) { return a < b ? a : b; }

// A warp's stream of packed weights through its ring in shared memory, and of x when x does not
// lie there as a whole (ONE row does).
template <int NT, bool ONE>
struct Stream {
    int lane, g;
    u32 ring;            // shared address
    const char* from;    // the lane's 16 bytes of the next chunk
    int left;            // bytes not asked for yet
    u32 slot;            // where the next chunk goes in the ring
    u32 x[NT];           // shared address: the lane's values of block 0 (ONE) or of slot 0
    const char* x_from;  // several rows: the lane's 16 bytes of block 0
    int x_bytes;         // of a block
    u32 x_ring_at;       // several rows: the lane's place in slot 0
    int block, end;      // next block of x to ask for, and where to stop
    const float* x_scales;   // shared: [chunks][rows]
    const int* x_sums;       // GPTQ: [blocks][rows]
    int row[NT], rows;       // the lane's rows

    __device__ __forceinline__ void start(const char* at, int length) {
        from = at + 16 * lane;
        left = length;
        slot = 16 * lane;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) chunk();
    }
    __device__ __forceinline__ void chunk() {
        if (left > 0) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ring + slot), "l"(from));
        }
        from += CHUNK;
        slot = (slot + CHUNK) & (RING - 1);
        left -= CHUNK;
    }
    __device__ __forceinline__ void x_block() {
        if (ONE) return;
        constexpr int SLOT = 4 * NT * X_ROW;
#pragma unroll
        for (int o = 0; o < SLOT; o += 512) {
            if (block < end && 16 * lane + o < x_bytes) {
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                                 x_ring_at + (block % x_slots(NT)) * SLOT + o),
                             "l"(x_from + (long long)block * x_bytes + o));
            }
        }
        ++block;
    }
    __device__ __forceinline__ uint2 x_of(int n, int block) const {
        uint2 v;
        u32 at = x[n] + (ONE ? block * X_ROW : (block % x_slots(NT)) * 4 * NT * X_ROW);
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
        return v;
    }
};

// Where a warp stands: the piece and the chunk of x whose scales it holds.
template <int KIND, int NT>
struct Place {
    Scales<KIND> scales;
    float x_scale[NT];
    int sums_of_x[NT];
    int piece;

    template <bool ONE>
    __device__ __forceinline__ void enter(const Staged& st, const u16* piece_of,
                                          const Stream<NT, ONE>& in, int block, bool chunk,
                                          float step) {
        int now = piece_of[block];
        if (now != piece) {
            scales.load(st, now, in.g);
#pragma unroll
            for (int i = 0; i < 4; ++i) scales.s[i] *= step;
            piece = now;
        }
        if (chunk) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                x_scale[n] = in.x_scales[block / X_CHUNK_BLOCKS * in.rows + in.row[n]];
            }
        }
    }
};

// Blocks [begin, end) of one width, whose first byte is byte `at` of the stream.
template <int KIND, int B, int NT, bool ONE>
__device__ __forceinline__ void run(Stream<NT, ONE>& in, const Staged& st, const u16* piece_of,
                                    u32 at, int begin, int end, Sums<NT>& sums,
                                    Place<KIND, NT>& place) {
    // One group of copies is committed per block. The ring holds the bytes of the next
    // 4 CHUNKS / B blocks, so groups this recent cannot hold what the present block needs.
    constexpr int PENDING = at_most(x_slots(NT) - 2, 4 * (CHUNKS - 1) / B - 1);
    if (place.piece < 0) {
        cp_async_wait<1>();   // the stream has begun before the next tile's codes
    } else {
        cp_async_wait<0>();   // blocks before were of another width: count anew
    }
    __syncwarp();
    for (int block = begin; block < end; ++block) {
        cp_async_wait<PENDING>();
        __syncwarp();
        u32 w[B], v[8];
        uint2 x[NT];
        ring_words<B, RING>(w, in.ring, at, in.lane);
#pragma unroll
        for (int n = 0; n < NT; ++n) x[n] = in.x_of(n, block);
        const bool chunk = block % X_CHUNK_BLOCKS == 0;
        if (chunk || piece_of[block] != place.piece) {
            if (place.piece >= 0) sums.fold(place.scales, place.x_scale, place.sums_of_x);
            // What the registers hold is 2^(8 - B) times the centred code.
            place.enter(st, piece_of, in, block, chunk || place.piece < 0,
                        1.0f / float(1 << (8 - B)));
        }
        expand<B>(w, v);
        __syncwarp();   // every lane has its words
        // As many chunks as this block has freed.
#pragma unroll
        for (int i = 0; i < B / 4; ++i) in.chunk();
        if (B % 4 && at % CHUNK + 128 * (B % 4) >= CHUNK) in.chunk();
        at += Sections<B>::BYTES;
        in.x_block();
        cp_async_commit();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_s8(sums.part[n][m], v[4 * m], v[4 * m + 1], v[4 * m + 2], v[4 * m + 3], x[n].x,
                       x[n].y);
            }
            if constexpr (KIND == KIND_GPTQ) {
                place.sums_of_x[n] += in.x_sums[block * in.rows + in.row[n]];
            }
        }
    }
}

// Adds blocks [begin, end) of a column tile; the stream has begun at `begin`.
template <int KIND, int NT, bool ONE>
__device__ __forceinline__ void walk(const QMatrix& m, Stream<NT, ONE>& in, const Staged& st,
                                     const u16* piece_of, int begin, int end, Sums<NT>& sums) {
    Place<KIND, NT> place;
    place.piece = -1;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        place.x_scale[n] = 0.0f;
        place.sums_of_x[n] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.total[n][i] = 0.0f;
    }
    sums.clear_parts();
    int first = 0;
    u32 at = 0;
    for (int r = 0; r < m.runs; ++r) {
        int last = m.run_end[r], bits = m.run_bits[r];
        int from = max(first, begin), to = min(last, end);
        if (from < to) {
            if constexpr (KIND == KIND_GPTQ) {
                run<KIND, 4>(in, st, piece_of, at, from, to, sums, place);
            } else {
                switch (bits) {
                    case 2: run<KIND, 2>(in, st, piece_of, at, from, to, sums, place); break;
                    case 3: run<KIND, 3>(in, st, piece_of, at, from, to, sums, place); break;
                    case 4: run<KIND, 4>(in, st, piece_of, at, from, to, sums, place); break;
                    case 5: run<KIND, 5>(in, st, piece_of, at, from, to, sums, place); break;
                    case 6: run<KIND, 6>(in, st, piece_of, at, from, to, sums, place); break;
                    default: run<KIND, 8>(in, st, piece_of, at, from, to, sums, place); break;
                }
            }
            at += (to - from) * 128 * bits;
        }
        first = last;
    }
    cp_async_wait<0>();
    if (place.piece >= 0) sums.fold(place.scales, place.x_scale, place.sums_of_x);
}

// What `quantize_chunk` makes of four values of a lane: packed column 4 lane + i of the chunk.
struct Quantized {
    float scale;
    u32 high, low;   // four bytes each
    int sum;
};

// One warp rounds up to 128 values to 16-bit integers with a common scale. Values beyond the input
// are 0. Anything that is not finite makes the scale so.
__device__ __forceinline__ Quantized quantize_chunk(const float (&v)[4]) {
    float most = 0.0f;
    bool odd = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        most = fmaxf(most, fabsf(v[i]));
        odd = odd || !(fabsf(v[i]) <= 3.4e38f);
    }
    most = warp_max(most);
    Quantized q;
    // 127 * 256 + 127: what the two bytes can hold on both sides of 0.
    q.scale = most / 32639.0f;
    float inverse = most > 0.0f ? 32639.0f / most : 0.0f;
    if (!(inverse <= 3.4e38f)) {   // so small that its inverse overflows: as good as 0
        inverse = 0.0f;
        q.scale = 0.0f;
    }
    q.high = q.low = 0;
    q.sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int n = __float2int_rn(fminf(fmaxf(v[i] * inverse, -32639.0f), 32639.0f));
        int high = (n + 128) >> 8, low = n - 256 * high;
        q.high |= u32(high & 255) << (8 * i);
        q.low |= u32(low & 255) << (8 * i);
        q.sum += n;
    }
    if (__any_sync(FULL_MASK, odd)) q.scale = __int_as_float(0x7fc00000);
    return q;
}

// Features of packed columns k..k+3.
__device__ __forceinline__ uint4 features(const u32* perm, int k, int inputs) {
    if (perm && k < inputs) return *reinterpret_cast<const uint4*>(perm + k);
    return make_uint4(k, k + 1, k + 2, k + 3);
}

__device__ __forceinline__ void gather(float (&v)[4], const float* x, uint4 p, int k, int inputs) {
    v[0] = k < inputs ? x[p.x] : 0.0f;
    v[1] = k < inputs ? x[p.y] : 0.0f;
    v[2] = k < inputs ? x[p.z] : 0.0f;
    v[3] = k < inputs ? x[p.w] : 0.0f;
}

// Sum over the eight lanes that share a block of 32 columns.
__device__ __forceinline__ int block_sum(int v) {
    v += __shfl_xor_sync(FULL_MASK, v, 1);
    v += __shfl_xor_sync(FULL_MASK, v, 2);
    return v + __shfl_xor_sync(FULL_MASK, v, 4);
}

// One row of x in shared memory: bytes [blocks][2][32], scales [chunks], sums [blocks]. The warp
// takes chunks `warp`, `warp` + `warps`, ..., GATHER at a time so that their loads overlap.
constexpr int GATHER = 2;

struct RowStage {
    char* bytes;
    float* scales;
    int* sums;
    int inputs, warp, warps;
    uint4 first[GATHER];   // features of the first chunks, known before x is

    __device__ __forceinline__ int column(int i) const {
        return 128 * (warp + i * warps) + 4 * (threadIdx.x % WARP);
    }
    __device__ __forceinline__ void prepare(const u32* perm) {
#pragma unroll
        for (int i = 0; i < GATHER; ++i) first[i] = features(perm, column(i), inputs);
    }
    __device__ __forceinline__ void run(const float* x, const u32* perm) const {
        const int lane = threadIdx.x % WARP;
        const int chunks = (inputs + 127) / 128;
        for (int base = 0; warp + base * warps < chunks; base += GATHER) {
            float v[GATHER][4];
#pragma unroll
            for (int i = 0; i < GATHER; ++i) {
                int k = column(base + i);
                gather(v[i], x, base == 0 ? first[i] : features(perm, k, inputs), k, inputs);
            }
#pragma unroll
            for (int i = 0; i < GATHER; ++i) {
                int k = column(base + i);
                Quantized q = quantize_chunk(v[i]);
                int sum = block_sum(q.sum);
                if (k < inputs) {
                    char* at = bytes + k / 32 * X_ROW + k % 32;
                    *reinterpret_cast<u32*>(at) = q.high;
                    *reinterpret_cast<u32*>(at + 32) = q.low;
                    if (lane % 8 == 0) sums[k / 32] = sum;
                    if (lane == 0) scales[k / 128] = q.scale;
                }
            }
        }
    }
};

__device__ __forceinline__ void copy_16(char* to, const char* from, int bytes, int thread,
                                        int threads) {
    for (int i = 16 * thread; i < bytes; i += 16 * threads) cp_async_16(to + i, from + i);
}

__device__ __forceinline__ int round_16(int bytes) { return (bytes + 15) & ~15; }

// Bytes of the codes of one column tile.
template <int KIND>
__device__ __forceinline__ int code_bytes(const QMatrix& m) {
    return m.pieces * (KIND == KIND_EXL2 ? 16 : 64);
}

// Shared memory of a column tile's matrix: pieces of the blocks, bases, codes. The host reserves
// as much (lower/linear/rows32.rs: staged_bytes); the arrays in global memory are padded to 16.
template <int KIND>
__device__ __forceinline__ Staged staged(char* at, const QMatrix& m) {
    int bases = round_16(2 * m.blocks);
    int codes = bases + (KIND == KIND_EXL2 ? round_16(2 * m.pieces) : code_bytes<KIND>(m));
    return {reinterpret_cast<u16*>(at + bases), reinterpret_cast<u16*>(at + codes)};
}

template <int KIND>
__device__ __forceinline__ void stage(char* at, const QMatrix& m, int column, bool fresh,
                                      int thread, int threads) {
    const Staged st = staged<KIND>(at, m);
    if (fresh) {
        copy_16(at, (const char*)m.piece_of, round_16(2 * m.blocks), thread, threads);
        if constexpr (KIND == KIND_EXL2) {
            copy_16((char*)st.bases, (const char*)m.bases, round_16(2 * m.pieces), thread, threads);
        }
    }
    int bytes = code_bytes<KIND>(m);
    copy_16((char*)st.codes, (const char*)m.codes + (long long)column * bytes, bytes, thread,
            threads);
    if constexpr (KIND == KIND_GPTQ) {
        copy_16((char*)st.bases, (const char*)m.bases + (long long)column * bytes, bytes, thread,
                threads);
    }
}

// Sum of one cell over the warps of one matrix.
__device__ __forceinline__ float add_up(const float* at, int count, int stride) {
    float s = 0.0f;
#pragma unroll 4
    for (int i = 0; i < count; ++i) s += at[i * stride];
    return s;
}

// What one launch computes: up to three matrices with one input, or gate and up. The host fills
// this struct word by word: lower/linear/rows32.rs.
struct Task {
    QMatrix matrix[3];
    Epilogue epilogue[3];     // gate and up: of the gate; the second holds the other bias
    const float* x;           // one row: [inputs]
    const char* blocks[2];    // several rows: what exl_block_x leaves, of each permutation
    int rows, inputs;
    int tiles;                // column tiles of all parts
    int stage_bytes;          // of one matrix
    int two_x;                // gate and up have different permutations
    int act;
};

// Rounded x of `rows` rows: bytes, scales, sums.
struct XBytes {
    int scales, sums, all;

    __device__ __forceinline__ XBytes(int rows, int inputs) {
        int blocks = inputs / 32, chunks = (inputs + 127) / 128;
        scales = blocks * rows * X_ROW;
        sums = scales + round_16(4 * chunks * rows);
        all = sums + round_16(4 * blocks * rows);
    }
};

// A column tile of one of the parts.
struct Tile {
    int part, column;

    template <bool GATED>
    __device__ __forceinline__ void set(const Task& task, int index) {
        column = index;
        part = 0;
        if (!GATED) {
            while (part < 2 && column >= task.matrix[part].columns) {
                column -= task.matrix[part++].columns;
            }
        }
    }
};

template <int KIND, bool GATED, int NT, bool ONE>
__device__ __forceinline__ void qgemm(const Task& task) {
    extern __shared__ __align__(1024) char shared[];
    pdl_launch();
    constexpr int TWINS = GATED ? 2 : 1;
    const int rows = ONE ? 1 : task.rows;
    const int threads = blockDim.x / TWINS;                // of one matrix
    const int twin = GATED ? threadIdx.x / threads : 0;
    const int thread = GATED ? threadIdx.x % threads : threadIdx.x;
    const int warps = threads / WARP, share = thread / WARP, warp = threadIdx.x / WARP;
    const int cells = rows * 32;
    // Shared memory: rings; two sets of sums [warp][row][32]; two sets of staged matrices; one row
    // of x (twice for two orders), or the rings of x, then scales and sums of x.
    const int all_warps = blockDim.x / WARP;
    float* sums_all = reinterpret_cast<float*>(shared + all_warps * RING);
    char* stage_all = shared + all_warps * (RING + 2 * rows * 128);
    char* x_all = stage_all + 2 * TWINS * task.stage_bytes;
    const XBytes x_bytes(rows, task.inputs);
    const int second_x = GATED && task.two_x && twin;

    Stream<NT, ONE> in;
    in.lane = threadIdx.x % WARP;
    in.g = in.lane >> 2;
    in.rows = rows;
    in.ring = smem_address(shared + warp * RING);
    const int t = in.lane & 3;
    char* x_at = x_all;
    if (ONE) {
        x_at += second_x * x_bytes.all;
        in.x[0] = smem_address(x_at) + (in.g & 1) * 32 + t * 8;
        in.row[0] = 0;
        in.x_scales = reinterpret_cast<float*>(x_at + x_bytes.scales);
        in.x_sums = reinterpret_cast<int*>(x_at + x_bytes.sums);
    } else {
        u32 own = smem_address(x_all + warp * x_ring(NT));
        in.x_ring_at = own + 16 * in.lane;
        in.x_bytes = rows * X_ROW;
        in.x_from = task.blocks[second_x] + 16 * in.lane;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            // Beyond the rows the last one is repeated; nobody reads those sums.
            in.x[n] = own + min(4 * n + (in.g >> 1), rows - 1) * X_ROW + (in.g & 1) * 32 + t * 8;
            in.row[n] = min(4 * n + t, rows - 1);
        }
        x_at += all_warps * x_ring(NT) + second_x * (x_bytes.all - x_bytes.scales);
        in.x_scales = reinterpret_cast<float*>(x_at);
        in.x_sums = reinterpret_cast<int*>(x_at + x_bytes.sums - x_bytes.scales);
    }

    Tile tile, next;
    int begin = 0, end = 0, before = 0, length = 0, ranged_part = -1;
    int staged_part0 = -1, staged_part1 = -1;
    // The warp's share of a column tile, and its stream of weights, which do not depend on the
    // kernel before.
    auto begin_stream = [&](const Tile& u) {
        const QMatrix& m = task.matrix[GATED ? twin : u.part];
        if (u.part != ranged_part) {
            const int total = cost_before<BLOCK_COST>(m, m.blocks);
            begin = share_begin(m, total, share, warps);
            end = share_begin(m, total, share + 1, warps);
            before = 128 * cost_before<0>(m, begin);
            length = 128 * cost_before<0>(m, end) - before;
            ranged_part = u.part;
        }
        in.start(m.tiles + m.column_bytes * u.column + before, length);
    };
    auto begin_x = [&] {
        if (!ONE) {
            in.block = begin;
            in.end = end;
            for (int i = 0; i < x_slots(NT) - 1; ++i) in.x_block();
        }
    };
    auto stage_at = [&](int buffer) {
        return stage_all + (buffer * TWINS + twin) * task.stage_bytes;
    };
    auto begin_stage = [&](const Tile& u, int buffer) {
        const QMatrix& m = task.matrix[GATED ? twin : u.part];
        int& part = buffer ? staged_part1 : staged_part0;
        stage<KIND>(stage_at(buffer), m, u.column, u.part != part, thread, threads);
        part = u.part;
    };
    RowStage row;
    if (ONE) {
        const bool apart = GATED && task.two_x;
        row.bytes = x_at;
        row.scales = const_cast<float*>(in.x_scales);
        row.sums = const_cast<int*>(in.x_sums);
        row.inputs = task.inputs;
        row.warp = apart ? share : warp;
        row.warps = apart ? warps : all_warps;
    }

    int index = blockIdx.x, buffer = 0;
    tile.set<GATED>(task, index);
    begin_stream(tile);
    begin_stage(tile, 0);
    cp_async_commit();
    const u32* perm = task.matrix[GATED ? twin : tile.part].perm;
    if (ONE) row.prepare(perm);
    pdl_wait();
    if (ONE) {
        row.run(task.x, perm);
    } else {
        begin_x();
        copy_16(x_at, task.blocks[second_x] + x_bytes.scales, x_bytes.all - x_bytes.scales,
                GATED && task.two_x ? thread : int(threadIdx.x),
                GATED && task.two_x ? threads : int(blockDim.x));
        cp_async_commit();
    }
    cp_async_wait<0>();
    __syncthreads();
    while (true) {
        const QMatrix& m = task.matrix[GATED ? twin : tile.part];
        const bool more = index + int(gridDim.x) < task.tiles;
        if (more) {
            next.set<GATED>(task, index + gridDim.x);
            begin_stage(next, buffer ^ 1);
        }
        cp_async_commit();
        char* here = stage_at(buffer);
        Sums<NT> sums;
        walk<KIND, NT, ONE>(m, in, staged<KIND>(here, m), reinterpret_cast<u16*>(here), begin, end,
                            sums);

        float* sums_at = sums_all + buffer * all_warps * cells;
        float* own = sums_at + warp * cells;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = 4 * n + t;
                if (row < rows) own[row * 32 + 8 * i + in.g] = sums.total[n][i];
            }
        if (more) {
            begin_stream(next);
            begin_x();
            cp_async_commit();
        }
        __syncthreads();
        for (int i = threadIdx.x; i < cells; i += blockDim.x) {
            int row = i / 32, column = tile.column * 32 + i % 32;
            float s = add_up(sums_at + i, warps, cells);
            if constexpr (GATED) {
                float up = add_up(sums_at + warps * cells + i, warps, cells);
                finish_gated(task.epilogue[0], task.epilogue[1], task.act, row, column, s, up);
            } else {
                finish_linear(task.epilogue[tile.part], row, column, s);
            }
        }
        if (!more) break;
        index += gridDim.x;
        tile = next;
        buffer ^= 1;
        const u32* wanted = task.matrix[GATED ? twin : tile.part].perm;
        if (ONE && !GATED && wanted != perm) {
            // Everyone has passed the barrier: nobody reads the old order.
            perm = wanted;
            row.prepare(perm);
            row.run(task.x, perm);
            __syncthreads();
        }
    }
}

}  // namespace

#define ENTRY(NAME, THREADS, KIND, GATED, NT, ONE)                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                \
        const __grid_constant__ Task task) {                                                      \
        qgemm<KIND, GATED, NT, ONE>(task);                                                        \
    }
// One row, the common case; then 4, 8, 16 and 32 rows, with as many warps as registers allow.
#define ENTRIES(NAME, SUFFIX, KIND, GATED)                                                        \
    ENTRY(NAME##_row1_##SUFFIX, 512, KIND, GATED, 1, true)                                        \
    ENTRY(NAME##_rows4_##SUFFIX, 512, KIND, GATED, 1, false)                                      \
    ENTRY(NAME##_rows8_##SUFFIX, 512, KIND, GATED, 2, false)                                      \
    ENTRY(NAME##_rows16_##SUFFIX, 256, KIND, GATED, 4, false)                                     \
    ENTRY(NAME##_rows32_##SUFFIX, 256, KIND, GATED, 8, false)

ENTRIES(exl_qgemm, exl2, KIND_EXL2, false)
ENTRIES(exl_qgemm, gptq, KIND_GPTQ, false)
ENTRIES(exl_qgate_up, exl2, KIND_EXL2, true)
ENTRIES(exl_qgate_up, gptq, KIND_GPTQ, true)

// Several rows of x, gathered by a permutation and rounded: bytes [blocks][rows][2][32], scales
// [chunks][rows], sums [blocks][rows], each array padded to 16 bytes. One warp per row and chunk.
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
