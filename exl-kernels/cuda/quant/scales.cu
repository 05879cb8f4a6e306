// exl_gptq_table, _judge, _rank, _exact: the scales of one group of rows.
//
// What: the maximum h that all columns share and every column's 4-bit code s, scale = s^2 h on the
// format's grid, least weighted rounding error. Four launches, as all columns have a say in h:
//   table  loss of every column at GRID scales, and its best one
//   judge  for every candidate h the sum over a block's columns, read off the tables
//   rank   sums over blocks; the three best candidates
//   exact  for these the exact loss of four codes around each column's best scale
// exl_gptq_round takes the winner. A block has 32 columns; sums over rows run in order, sums over
// columns in a fixed one. Moves the group once per launch from L2; bound by latency.

#include "quant/group.cuh"

using namespace group;

// beta, total, best: [n]; loss: [GRID, n]; widest: [blocks], largest best scale of each block.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_gptq_table(const float* w, const float* pivot, long long stride, float* loss, float* beta,
                   float* total, float* best, float* widest, int rows, int n, int bits,
                   Grid grid) {
    __shared__ float tile[TILE_ROWS][COLS], cost[TILE_ROWS], losses[GRID][COLS];
    __shared__ float reduce[THREADS], fits[COLS];
    pdl_launch();
    pdl_wait();
    const Group g = {w, pivot, stride, rows, n, bits};
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS;
    const int column = blockIdx.x * COLS + c;
    const float top = top_cost(g, reduce);
    float largest = 0.0f, zeroed = 0.0f;
    for (int first = 0; first < rows; first += TILE_ROWS) {
        const int count = min(TILE_ROWS, rows - first);
        load_tile(tile, cost, g, top, first, count);
        if (part == 0) {
            for (int r = 0; r < count; ++r) {
                float v = tile[r][c];
                largest = fmaxf(largest, fabsf(v));
                zeroed = __fadd_rn(zeroed, __fmul_rn(__fmul_rn(cost[r], v), v));
            }
        }
    }
    if (part == 0) {
        fits[c] = __fdiv_rn(largest, __fmul_rn(float((1 << bits) - 1), 0.5f));
        beta[column] = fits[c];
        total[column] = zeroed;
    }
    __syncthreads();
    const float lo = low_code(bits), hi = high_code(bits);
    for (int first = 0; first < rows; first += TILE_ROWS) {
        const int count = min(TILE_ROWS, rows - first);
        // A group of one tile is still there.
        if (rows > TILE_ROWS) load_tile(tile, cost, g, top, first, count);
        for (int j = part; j < GRID; j += PARTS) {
            float s = __fmul_rn(fits[c], grid.ratio[j]), inv = inverse(s);
            float sum = first ? losses[j][c] : 0.0f;
            for (int r = 0; r < count; ++r) {
                sum = __fadd_rn(sum, loss_of(tile[r][c], s, inv, cost[r], lo, hi));
            }
            losses[j][c] = sum;
        }
    }
    __syncthreads();
    for (int j = part; j < GRID; j += PARTS) loss[(long long)j * n + column] = losses[j][c];
    if (part == 0) {
        int least = 0;
        for (int j = 1; j < GRID; ++j) {
            if (losses[j][c] < losses[least][c]) least = j;
        }
        reduce[c] = __fmul_rn(fits[c], grid.ratio[least]);
        best[column] = reduce[c];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float m = 0.0f;
        for (int i = 0; i < COLS; ++i) m = fmaxf(m, reduce[i]);
        widest[blockIdx.x] = m;
    }
}

// judged: [blocks, MAXIMA]; lo, hi: the ends of the table as fractions of beta.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_gptq_judge(const float* loss, const float* beta, const float* total, const float* best,
                   const float* widest, double* judged, int n, float lo, float hi, Maxima maxima) {
    __shared__ float table[GRID][COLS], list[MAXIMA], found[MAXIMA][COLS], reduce[THREADS];
    __shared__ float squares[17];
    __shared__ int count;
    pdl_launch();
    pdl_wait();
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS;
    const int column = blockIdx.x * COLS + c;
    const float most = block_max(widest, gridDim.x, 1, reduce);
    const int tried = candidates(list, maxima, most, &count);
    for (int j = part; j < GRID; j += PARTS) table[j][c] = loss[(long long)j * n + column];
    if (threadIdx.x < 17) squares[threadIdx.x] = 2.0f * logf(fmaxf(float(threadIdx.x), 1e-3f));
    __syncthreads();
    const float fit = beta[column], whole = total[column], target = best[column];
    const float span = logf(__fdiv_rn(hi, lo));
    const float per_ln = __fdiv_rn(float(GRID - 1), span);
    const float origin = logf(__fmul_rn(fit, lo));
    auto lookup = [&](float ln_scale) -> float {
        float p = __fmul_rn(__fsub_rn(ln_scale, origin), per_ln);
        if (p <= 0.0f) {
            // Below the table clipping grows towards losing everything.
            float low = table[0][c];
            return low + fmaxf(whole - low, 0.0f) * fminf(__fdiv_rn(-p, per_ln), 1.0f);
        }
        if (p >= float(GRID - 1)) {
            // Above it rounding error grows with the square of the scale.
            return table[GRID - 1][c] * expf(2.0f * (__fdiv_rn(p, per_ln) - span));
        }
        int j = int(p);
        float f = p - float(j);
        return __fadd_rn(__fmul_rn(table[j][c], 1.0f - f), __fmul_rn(table[j + 1][c], f));
    };
    for (int m = part; m < tried; m += PARTS) {
        float value = 0.0f;
        if (fit > 0.0f) {
            float s = fminf(fmaxf(sqrtf(__fdiv_rn(target, list[m])), 1.0f), 16.0f);
            float ln_h = logf(list[m]);
            float a = lookup(squares[int(floorf(s))] + ln_h);
            float b = lookup(squares[int(ceilf(s))] + ln_h);
            value = fminf(a, b);
        }
        found[m][c] = value;
    }
    __syncthreads();
    if (threadIdx.x < tried) {
        double sum = 0.0;
        for (int i = 0; i < COLS; ++i) sum += double(found[threadIdx.x][i]);
        judged[(long long)blockIdx.x * MAXIMA + threadIdx.x] = sum;
    }
}

// One block. finals: FINALISTS values of h, the number of them, and the widest best scale.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    exl_gptq_rank(const float* widest, const double* judged, float* finals, int blocks,
                  Maxima maxima) {
    constexpr int SLICES = 5;  // 5 x 48 threads share the blocks
    __shared__ float list[MAXIMA], reduce[THREADS];
    __shared__ double sums[SLICES][MAXIMA];
    __shared__ int count;
    pdl_launch();
    pdl_wait();
    const float most = block_max(widest, blocks, 1, reduce);
    const int tried = candidates(list, maxima, most, &count);
    const int m = threadIdx.x % MAXIMA, slice = threadIdx.x / MAXIMA;
    if (slice < SLICES) {
        double sum = 0.0;
        if (m < tried) {
            for (int b = slice; b < blocks; b += SLICES) sum += judged[(long long)b * MAXIMA + m];
        }
        sums[slice][m] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < tried; ++i) {
            for (int s = 1; s < SLICES; ++s) sums[0][i] += sums[s][i];
        }
        const int kept = min(FINALISTS, tried);
        u64 taken = 0;
        for (int f = 0; f < kept; ++f) {
            int least = -1;
            for (int i = 0; i < tried; ++i) {
                if (taken >> i & 1) continue;
                if (least < 0 || sums[0][i] < sums[0][least]) least = i;
            }
            taken |= 1ull << least;
            finals[f] = list[least];
        }
        finals[FINALISTS] = float(kept);
        finals[FINALISTS + 1] = most;
    }
}

// found: [FINALISTS, n] codes; exact: [blocks, FINALISTS] losses.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_gptq_exact(const float* w, const float* pivot, long long stride, const float* best,
                   const float* finals, u8* found, double* exact, int rows, int n, int bits) {
    constexpr int TRIES = 4;  // codes for each h, in the order of `offsets`
    __shared__ float tile[TILE_ROWS][COLS], cost[TILE_ROWS], losses[FINALISTS * TRIES][COLS];
    __shared__ float reduce[THREADS], least[FINALISTS][COLS];
    pdl_launch();
    pdl_wait();
    const int offsets[TRIES] = {0, 1, -1, 2};
    const Group g = {w, pivot, stride, rows, n, bits};
    const int c = threadIdx.x % COLS, part = threadIdx.x / COLS;
    const int column = blockIdx.x * COLS + c;
    const float top = top_cost(g, reduce);
    const int kept = int(finals[FINALISTS]);
    const float target = best[column];
    const float lo = low_code(bits), hi = high_code(bits);
    auto code_of = [&](int final, int attempt) -> int {
        float base = floorf(sqrtf(__fdiv_rn(target, finals[final])));
        int s = int(fminf(fmaxf(base, 1.0f), 16.0f)) + offsets[attempt];
        return min(max(s, 1), 16) - 1;
    };
    for (int first = 0; first < rows; first += TILE_ROWS) {
        const int count = min(TILE_ROWS, rows - first);
        load_tile(tile, cost, g, top, first, count);
        for (int t = part; t < kept * TRIES; t += PARTS) {
            int code = code_of(t / TRIES, t % TRIES);
            float s = scale_value(stored_h(finals[t / TRIES]), code), inv = inverse(s);
            float sum = first ? losses[t][c] : 0.0f;
            for (int r = 0; r < count; ++r) {
                sum = __fadd_rn(sum, loss_of(tile[r][c], s, inv, cost[r], lo, hi));
            }
            losses[t][c] = sum;
        }
    }
    __syncthreads();
    if (part < kept) {
        int winner = 0;
        for (int t = 1; t < TRIES; ++t) {
            if (losses[part * TRIES + t][c] < losses[part * TRIES + winner][c]) winner = t;
        }
        least[part][c] = losses[part * TRIES + winner][c];
        // A column of zeros decodes to zeros at any scale; code 0 is what padding carries.
        found[(long long)part * n + column] = target <= 0.0f ? 0 : code_of(part, winner);
    }
    __syncthreads();
    if (threadIdx.x < kept) {
        double sum = 0.0;
        for (int i = 0; i < COLS; ++i) sum += double(least[threadIdx.x][i]);
        exact[(long long)blockIdx.x * FINALISTS + threadIdx.x] = sum;
    }
}
