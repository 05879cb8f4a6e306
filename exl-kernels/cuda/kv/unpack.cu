// exl_kv_unpack: writes the pages of a quantized cache (src/kv.rs) that a step reads as 16-bit floats,
// for attention kernels that read those: transformed values, which need no rounding but where a center is
// added.
// exl_kv_restore: the inverse transform of attention's output, in place.
//
// What: a block unpacks a stretch of one page of K or V; a thread takes two values at a time. A page
// that several sequences share is written several times, the same each time.
//
// Bytes: the packed page once, the unpacked page once. Bound: memory.

#include "kv/kv.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ __half2 decode(const Head<const u8>& head, const Format& f, int dim, int i) {
    u32 a, b;
    if (f.bits == 8) {
        a = head.codes[i];
        b = head.codes[i + 1];
    } else {
        const u32 low = head.codes[i / 2];
        a = low & 15;
        b = low >> 4;
        if (f.bits == 6) {
            const u32 high = head.high[i / 4] >> (i % 4 * 2);
            a |= (high & 3) << 4;
            b |= (high >> 2 & 3) << 4;
        }
    }
    const int group = min(i / 32, max(dim / 32, 1) - 1);
    const Group g(group, dim);
    const u32 word = *reinterpret_cast<const u16*>(head.words + 2 * group);
    const __half2 scale = block_scale(f.bits, word, (i - g.from) / g.block);
    const int zero = 1 << (f.bits - 1);
    const __half2 codes = __halves2half2(__int2half_rn(int(a) - zero), __int2half_rn(int(b) - zero));
    return __hfma2(codes, __low2half2(scale), __high2half2(scale));
}

}  // namespace

// Grid: parts of a page, pages_per_seq, 2 * seqs.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    exl_kv_unpack(const u8* k_cache, const u8* v_cache, __half* k_out, __half* v_out,
                  const int* block_table, const int* q_start, const int* kv_len, int pages_per_seq,
                  int kv_heads, int head_dim, int k_bits, int v_bits, int window) {
    pdl_launch();
    pdl_wait();
    const int page = blockIdx.y, seq = blockIdx.z / 2;
    const bool is_v = blockIdx.z % 2;
    const int len = kv_len[seq], rows = q_start[seq + 1] - q_start[seq];
    // Tokens that no row sees are left out.
    const int first = window > 0 ? max(0, len - rows + 1 - window) : 0;
    if (rows <= 0 || page * PAGE_TOKENS >= len || (page + 1) * PAGE_TOKENS <= first) return;
    const long long token = (long long)block_table[(long long)seq * pages_per_seq + page] * PAGE_TOKENS;
    const Format f(is_v ? v_bits : k_bits, head_dim, !is_v);
    const u8* cache = is_v ? v_cache : k_cache;
    const u8* in_page = cache + Head<const u8>::page_bytes(f, kv_heads) * (token / PAGE_TOKENS);
    __half* out = (is_v ? v_out : k_out) + token * kv_heads * head_dim;
    const int pairs = head_dim / 2, all = min(PAGE_TOKENS, len - page * PAGE_TOKENS) * kv_heads * pairs;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < all; i += gridDim.x * THREADS) {
        const int place = i / pairs, at = i % pairs * 2;
        const Head<const u8> head(cache, f, token + place / kv_heads, kv_heads, place % kv_heads);
        __half2 pair = decode(head, f, head_dim, at);
        if (f.center > 0) {
            const u8* center = Head<const u8>::center(in_page, f, kv_heads, place % kv_heads);
            const float2 c = __half22float2(*reinterpret_cast<const __half2*>(center + 2 * at));
            const float2 v = __half22float2(pair);
            pair = __floats2half2_rn(v.x + c.x, v.y + c.y);
        }
        reinterpret_cast<__half2*>(out)[i] = pair;
    }
}

// Grid: rows, heads. Rows of no sequence keep what they hold.
extern "C" __global__ void __launch_bounds__(WARP)
    exl_kv_restore(float* out, const int* q_start, int seqs, int heads, int head_dim) {
    extern __shared__ float x[];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row < q_start[0] || row >= q_start[seqs]) return;
    float* head = out + ((long long)row * heads + blockIdx.y) * head_dim;
    for (int i = threadIdx.x; i < head_dim; i += WARP) x[i] = head[i];
    __syncwarp();
    hadamard<WARP>(x, head_dim, false, [] { __syncwarp(); });
    for (int i = threadIdx.x; i < head_dim; i += WARP) head[i] = x[i];
}
