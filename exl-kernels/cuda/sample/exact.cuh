// Sums and crossings over a whole row, whatever its distribution: histograms over ever smaller
// ranges, until what is left of the range fits in the sorted list or is one value.
//
// Slower than the list of the likeliest, and needed when that does not reach far enough: many
// equal logits, very high temperatures, top-k beyond a thousand.
#pragma once

#include "sample/block.cuh"

namespace {

struct Row {
    const float* logits;
    int tokens;
};

struct Total {
    u64 weight;
    u32 count;
};

// A place in the falling order.
struct Found {
    u32 id;
    u64 upto;    // sum of the weights up to and with it
};

// Over the tokens with a weight whose logit is at least `least`.
__device__ __forceinline__ Total total_of(Shared& s, const Weights& weights, Row row, float least) {
    u64 weight = 0;
    u32 count = 0;
    for_row(row.logits, row.tokens, [&](float x, u32) {
        u64 w = x >= least ? weights.of(x) : 0;
        weight += w;
        count += w > 0;
    });
    Total total;
    total.weight = block_reduce<Add>(s, weight);
    total.count = u32(block_reduce<Add>(s, count));
    return total;
}

// Many tokens often fall in few bins: what a warp has for one bin is added at once.
__device__ __forceinline__ void add_to_bin(Histogram& bins, bool valid, u32 bin, u64 weight) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
        u32 pending = __ballot_sync(FULL_MASK, valid);
        if (!pending) return;
        int leader = __ffs(pending) - 1;
        const u32 theirs = __shfl_sync(FULL_MASK, bin, leader);
        bool same = valid && bin == theirs;
        u32 count = __popc(__ballot_sync(FULL_MASK, same));
        if (count < 4) break;
        u64 sum = warp_sum_u64(same ? weight : 0);
        if (lane == u32(leader)) {
            atomicAdd(&bins.weights[bin], sum);
            atomicAdd(&bins.counts[bin], count);
        }
        valid = valid && !same;
    }
    if (valid) {
        atomicAdd(&bins.weights[bin], weight);
        atomicAdd(&bins.counts[bin], 1u);
    }
}

// The token number `nth` (from 1) of those with one logit, by rising id.
__device__ __forceinline__ u32 nth_equal(Shared& s, Row row, u32 order, u32 nth) {
    const int length = (row.tokens + THREADS - 1) / THREADS;
    const int first = min(int(threadIdx.x) * length, row.tokens);
    const int end = min(first + length, row.tokens);
    u32 count = 0;
    for (int i = first; i < end; ++i) count += order_of(__ldcg(row.logits + i)) == order;
    u32 before = u32(block_before(s, count));
    if (before < nth && nth <= before + count) {
        for (int i = first; i < end; ++i) {
            if (order_of(__ldcg(row.logits + i)) == order && ++before == nth) s.index = i;
        }
    }
    __syncthreads();
    u32 id = u32(s.index);
    __syncthreads();
    return id;
}

// The first token in falling order at which the sum of the weights reaches `target`, or with
// `by_count` the number of tokens. The target is from 1 to the row's total.
__device__ __forceinline__ Found cross(Shared& s, const Weights& weights, Row row, u64 target,
                                       bool by_count) {
    u32 low = LOWEST, high = order_of(weights.most);
    u64 weight = 0;    // of all above `high`
    u32 count = 0;
    while (true) {
        int shift = 0;
        while ((high - low) >> shift >= u32(BINS)) ++shift;
        for (int i = threadIdx.x; i < BINS; i += THREADS) {
            s.bins.weights[i] = 0;
            s.bins.counts[i] = 0;
        }
        __syncthreads();
        for_row(row.logits, row.tokens, [&](float x, u32) {
            u32 order = order_of(x);
            bool inside = low <= order && order <= high;
            u64 w = inside ? weights.of(x) : 0;
            add_to_bin(s.bins, w > 0, inside ? (order - low) >> shift : 0, w);
        });
        __syncthreads();
        // A thread's bins, the highest first.
        u64 weights_here = 0;
        u32 counts_here = 0;
        const int top = BINS - 1 - int(threadIdx.x) * THREAD_BINS;
#pragma unroll
        for (int e = 0; e < THREAD_BINS; ++e) {
            weights_here += s.bins.weights[top - e];
            counts_here += s.bins.counts[top - e];
        }
        u64 above_weight = weight + block_before(s, weights_here);
        u32 above_count = count + u32(block_before(s, counts_here));
#pragma unroll
        for (int e = 0; e < THREAD_BINS; ++e) {
            u64 in_bin = by_count ? s.bins.counts[top - e] : s.bins.weights[top - e];
            u64 above = by_count ? above_count : above_weight;
            if (above < target && above + in_bin >= target) {
                s.index = top - e;
                s.above_weight = above_weight;
                s.above_count = above_count;
            }
            above_weight += s.bins.weights[top - e];
            above_count += s.bins.counts[top - e];
        }
        __syncthreads();
        const u32 bin = u32(s.index), inside = s.bins.counts[bin];
        const u64 bin_weight = s.bins.weights[bin];
        weight = s.above_weight;
        count = s.above_count;
        __syncthreads();
        low += bin << shift;
        high = min(high, low + ((1u << shift) - 1));
        if (inside <= u32(CAPACITY)) {
            if (threadIdx.x == 0) s.counter = 0;
            __syncthreads();
            for_row(row.logits, row.tokens, [&](float x, u32 id) {
                u32 order = order_of(x);
                bool valid = low <= order && order <= high && weights.of(x) > 0;
                append(s, valid, key_of(x, id));
            });
            __syncthreads();
            const int n = int(inside);
            sort_list(s, n);
            sum_list(s, weights, n, weight);
            int at = by_count ? int(target - count) - 1 : first_reaching(s, n, target);
            at = min(at, n - 1);
            Found found = {id_of(s.list.keys[at]), s.list.upto[at]};
            __syncthreads();
            return found;
        }
        if (shift == 0) {
            // More equal logits than the list holds.
            u64 each = bin_weight / inside;
            u64 nth = by_count ? target - count : (target - weight + each - 1) / each;
            Found found = {nth_equal(s, row, low, u32(nth)), weight + nth * each};
            return found;
        }
    }
}

}  // namespace
