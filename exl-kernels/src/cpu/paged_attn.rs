//! Attention over the paged cache with an online softmax (Dao et al. 2022).
//!
//! A task takes one sequence, one key/value head and a block of queries: all query heads of the
//! group share the keys it widens to f32. Keys go by in blocks of [`KEYS`] at fixed positions, so
//! that a query's result does not depend on what else is in the batch, up to the order in which
//! the matrix product of a large block sums.

use gemm::{Parallelism, gemm};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Cpu, Isa, math};
use crate::kv::{Codec, PageLayout};
use crate::ops::{PAGE_TOKENS, PagedAttn};
use crate::{Error, KvFormat, Mem, Result};

/// Keys of a block; divides a page.
const KEYS: usize = 64;
/// Query rows (tokens times heads of a group) of a task.
const QUERIES: usize = 64;
/// Query rows below which plain loops beat a matrix product.
const LOOPS_BELOW: usize = 16;

#[derive(Clone, Copy)]
enum Cache<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
    Quant(&'a [u8], Codec, PageLayout),
}

impl<'a> Cache<'a> {
    fn new(mem: &Mem<'a>, layout: PageLayout, isa: Isa) -> Result<Self> {
        let format = layout.format;
        Ok(match (format, Codec::new(format, layout.head_dim, isa)) {
            (KvFormat::F16, _) => Cache::F16(mem.slice()?),
            (_, Some(codec)) => Cache::Quant(mem.slice()?, codec, layout),
            _ => Cache::F32(mem.slice()?),
        })
    }

    /// Copies one head of the tokens in `slot` and after, which are of one page, rows of `d` elements, as
    /// f32; rotated values where the cache is quantized.
    fn rows(&self, slot: usize, (heads, head): (usize, usize), to: &mut [f32], d: usize) {
        for (i, to) in to.chunks_exact_mut(d).enumerate() {
            let at = ((slot + i) * heads + head) * d;
            match self {
                Cache::F16(v) => v[at..at + d].convert_to_f32_slice(to),
                Cache::F32(v) => to.copy_from_slice(&v[at..at + d]),
                Cache::Quant(bytes, codec, layout) => {
                    let planes = layout.planes(slot + i, head);
                    codec.decode(planes.map(|(at, len)| &bytes[at..at + len]), to);
                }
            }
        }
        if let Cache::Quant(bytes, _, layout) = self {
            layout.add_center(bytes, (slot, head), to);
        }
    }

    /// Applies to rows what makes up for the rotation of the cache.
    fn unrotate(&self, rows: &mut [f32], d: usize) {
        if let Cache::Quant(_, codec, _) = self {
            rows.chunks_exact_mut(d).for_each(|row| codec.unrotate(row));
        }
    }
}

struct Attn<'a> {
    q: &'a [f32],
    k: Cache<'a>,
    v: Cache<'a>,
    table: &'a [i32],
    starts: &'a [i32],
    lens: &'a [i32],
    out: *mut f32,
    op: &'a PagedAttn<'a>,
    isa: Isa,
}

// SAFETY: `out` is written by tasks at disjoint (row, head) ranges.
unsafe impl Sync for Attn<'_> {}

/// One thread's scratch.
struct Scratch<'a> {
    q: &'a mut [f32],
    scores: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

fn scratch_words(d: usize) -> usize {
    2 * QUERIES * d + QUERIES * KEYS + 2 * KEYS * d + 2 * QUERIES
}

/// Scratch words of an attention op.
pub(super) fn words(op: &PagedAttn<'_>, threads: usize) -> usize {
    threads * scratch_words(op.head_dim)
}

fn split(words: &mut [f32], d: usize) -> Scratch<'_> {
    let (q, rest) = words.split_at_mut(QUERIES * d);
    let (out, rest) = rest.split_at_mut(QUERIES * d);
    let (scores, rest) = rest.split_at_mut(QUERIES * KEYS);
    let (keys, rest) = rest.split_at_mut(KEYS * d);
    let (values, rest) = rest.split_at_mut(KEYS * d);
    let (max, sum) = rest.split_at_mut(QUERIES);
    Scratch {
        q,
        scores,
        keys,
        values,
        out,
        max,
        sum,
    }
}

struct Threads(*mut f32);

// SAFETY: every thread uses its own range.
unsafe impl Sync for Threads {}

pub(super) fn run(op: &mut PagedAttn<'_>, cpu: &Cpu) -> Result<()> {
    let out = op.out.slice_mut::<f32>()?.as_mut_ptr();
    let op = &*op;
    let attn = Attn {
        q: op.q.slice()?,
        k: Cache::new(
            &op.k_cache,
            PageLayout::keys(op.kv.k, op.kv_heads, op.head_dim),
            cpu.isa(),
        )?,
        v: Cache::new(
            &op.v_cache,
            PageLayout::values(op.kv.v, op.kv_heads, op.head_dim),
            cpu.isa(),
        )?,
        table: op.block_table.slice()?,
        starts: op.q_start.slice()?,
        lens: op.kv_len.slice()?,
        out,
        op,
        isa: cpu.isa(),
    };
    attn.check()?;
    let group = op.heads / op.kv_heads;
    let block = (QUERIES / group).max(1);
    if group > QUERIES {
        let what = format!("{group} query heads per key head");
        return Err(Error::Unsupported {
            op: "paged_attn",
            what,
        });
    }
    let blocks = |s: usize| attn.rows_of(s).div_ceil(block);
    let tasks: usize = (0..op.seqs).map(|s| blocks(s) * op.kv_heads).sum();
    let words = scratch_words(op.head_dim);
    cpu.scratch(self::words(op, cpu.pool().threads()), |scratch| {
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        let threads = Threads(scratch.as_mut_ptr());
        cpu.pool().run(tasks, &|task, thread| {
            let threads = &threads;
            // SAFETY: one task at a time per thread index; the scratch has `words` for each.
            let mine =
                unsafe { std::slice::from_raw_parts_mut(threads.0.add(thread * words), words) };
            // Later blocks of a long prompt see more keys: start with the longest.
            let mut rest = tasks - 1 - task;
            for s in 0..op.seqs {
                let here = blocks(s) * op.kv_heads;
                if rest < here {
                    let (b, head) = (rest / op.kv_heads, rest % op.kv_heads);
                    let first = b * block;
                    let rows = first..attn.rows_of(s).min(first + block);
                    attn.task(s, head, rows, split(mine, op.head_dim));
                    break;
                }
                rest -= here;
            }
        });
    });
    Ok(())
}

impl Attn<'_> {
    fn rows_of(&self, s: usize) -> usize {
        (self.starts[s + 1] - self.starts[s]) as usize
    }

    /// Everything that indexes memory.
    fn check(&self) -> Result<()> {
        let op = self.op;
        let pages = op.k_cache.bytes() / op.kv.k.key_page_bytes(op.kv_heads, op.head_dim);
        for s in 0..op.seqs {
            let (start, end, len) = (self.starts[s], self.starts[s + 1], self.lens[s]);
            let rows = i64::from(end) - i64::from(start);
            let sound = start >= 0 && rows >= 0 && end as usize <= op.rows;
            if !sound || i64::from(len) < rows {
                let found = format!("rows {start}..{end} with {len} tokens");
                return Err(Error::argument(
                    format!("paged_attn.q_start[{s}]"),
                    "rows of the step",
                    found,
                ));
            }
            let used = (len as usize).div_ceil(PAGE_TOKENS);
            let table = &self.table[s * op.pages_per_seq..][..op.pages_per_seq];
            let known = |&p: &i32| usize::try_from(p).is_ok_and(|p| p < pages);
            if used > table.len() || !table[..used].iter().all(known) {
                let found = format!("{len} tokens in pages {table:?}");
                let name = format!("paged_attn.block_table[{s}]");
                return Err(Error::argument(
                    name,
                    format!("{used} pages below {pages}"),
                    found,
                ));
            }
        }
        Ok(())
    }

    fn task(&self, s: usize, head: usize, rows: std::ops::Range<usize>, t: Scratch<'_>) {
        let op = self.op;
        let (d, group) = (op.head_dim, op.heads / op.kv_heads);
        let queries = rows.len() * group;
        let first_row = self.starts[s] as usize + rows.start;
        for (i, to) in t.q[..queries * d].chunks_exact_mut(d).enumerate() {
            let at = ((first_row + i / group) * op.heads + head * group + i % group) * d;
            to.copy_from_slice(&self.q[at..at + d]);
        }
        t.out[..queries * d].fill(0.0);
        t.max[..queries].fill(f32::NEG_INFINITY);
        t.sum[..queries].fill(0.0);
        // Position of the block's first query.
        let own = self.lens[s] as usize - self.rows_of(s) + rows.start;
        let end = own + rows.len();
        let begin = if op.window > 0 {
            (own + 1).saturating_sub(op.window)
        } else {
            0
        };
        let heads = (op.kv_heads, head);
        let mut key = begin / KEYS * KEYS;
        while key < end {
            let n = KEYS.min(end - key);
            let page = self.table[s * op.pages_per_seq + key / PAGE_TOKENS] as usize;
            let slot = page * PAGE_TOKENS + key % PAGE_TOKENS;
            self.k.rows(slot, heads, &mut t.keys[..n * d], d);
            self.v.rows(slot, heads, &mut t.values[..n * d], d);
            let block = Block {
                queries,
                n,
                d,
                key,
                own,
                group,
            };
            block.scores(t.q, t.keys, t.scores, self.isa);
            self.softmax(&block, t.scores, t.out, (t.max, t.sum));
            block.accumulate(t.scores, t.values, t.out, self.isa);
            key += KEYS;
        }
        self.v.unrotate(&mut t.out[..queries * d], d);
        for (i, row) in t.out[..queries * d].chunks_exact(d).enumerate() {
            let at = ((first_row + i / group) * op.heads + head * group + i % group) * d;
            // SAFETY: rows and heads of a task are its own, in bounds by `check`.
            let to = unsafe { std::slice::from_raw_parts_mut(self.out.add(at), d) };
            let scale = 1.0 / t.sum[i];
            to.iter_mut().zip(row).for_each(|(to, v)| *to = v * scale);
        }
    }

    /// Turns a block's scores into weights and rescales what was accumulated before.
    fn softmax(
        &self,
        b: &Block,
        scores: &mut [f32],
        out: &mut [f32],
        (max, sum): (&mut [f32], &mut [f32]),
    ) {
        for i in 0..b.queries {
            let row = &mut scores[i * KEYS..][..b.n];
            let own = b.own + i / b.group;
            // Keys from `from` to `to` of this block are visible.
            let to = (own + 1).saturating_sub(b.key).min(b.n);
            let oldest = if self.op.window > 0 {
                (own + 1).saturating_sub(self.op.window)
            } else {
                0
            };
            let from = oldest.saturating_sub(b.key).min(to);
            let out = &mut out[i * b.d..][..b.d];
            let state = (&mut max[i], &mut sum[i]);
            let (scale, cap) = (self.op.scale, self.op.softcap);
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe {
                    softmax_avx512(row, (from, to), out, state, (scale, cap));
                },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { softmax_avx2(row, (from, to), out, state, (scale, cap)) },
                _ => softmax_row(row, (from, to), out, state, (scale, cap)),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn softmax_avx512(
    row: &mut [f32],
    range: (usize, usize),
    out: &mut [f32],
    state: (&mut f32, &mut f32),
    shape: (f32, f32),
) {
    softmax_row(row, range, out, state, shape);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn softmax_avx2(
    row: &mut [f32],
    range: (usize, usize),
    out: &mut [f32],
    state: (&mut f32, &mut f32),
    shape: (f32, f32),
) {
    softmax_row(row, range, out, state, shape);
}

#[inline(always)]
fn softmax_row(
    row: &mut [f32],
    (from, to): (usize, usize),
    out: &mut [f32],
    (max, sum): (&mut f32, &mut f32),
    (scale, cap): (f32, f32),
) {
    row[..from].fill(0.0);
    row[to..].fill(0.0);
    let visible = &mut row[from..to];
    if visible.is_empty() {
        return;
    }
    visible.iter_mut().for_each(|s| *s *= scale);
    if cap > 0.0 {
        let capped = |s: &mut f32| *s = cap * (*s / cap).tanh();
        visible.iter_mut().for_each(capped);
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut top = by_lanes(visible, *max, larger);
    if top == f32::NEG_INFINITY {
        // Only infinities or NaN so far: show it instead of dividing by nothing.
        top = 0.0;
    }
    if top > *max {
        let shrink = math::exp(*max - top);
        *sum *= shrink;
        out.iter_mut().for_each(|v| *v *= shrink);
        *max = top;
    }
    visible.iter_mut().for_each(|s| *s = math::exp(*s - top));
    *sum += by_lanes(visible, 0.0, |a, b| a + b);
}

/// Combines all values, sixteen side by side.
#[inline(always)]
fn by_lanes(values: &[f32], start: f32, with: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 16];
    let chunks = values.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = with(*lane, v);
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(start, |a, &b| with(a, b))
}

/// A block of queries against a block of keys.
struct Block {
    queries: usize,
    n: usize,
    d: usize,
    key: usize,
    own: usize,
    group: usize,
}

impl Block {
    /// `scores[i, j] = q_i . k_j`, `[queries, KEYS]`.
    fn scores(&self, q: &[f32], k: &[f32], scores: &mut [f32], isa: Isa) {
        if self.queries >= LOOPS_BELOW {
            let (m, n, d) = (self.queries, self.n, self.d);
            assert!(q.len() >= m * d && k.len() >= n * d && scores.len() >= m * KEYS);
            // SAFETY: the assertion bounds every access.
            unsafe {
                let (to, a, b) = (scores.as_mut_ptr(), q.as_ptr(), k.as_ptr());
                product((m, n, d), to, false, (a, d), (b, d as isize, 1));
            }
            return;
        }
        let all = q
            .chunks_exact(self.d)
            .zip(scores.chunks_exact_mut(KEYS))
            .take(self.queries);
        for (q, scores) in all {
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe { dots_avx512(q, k, &mut scores[..self.n]) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { dots_avx2(q, k, &mut scores[..self.n]) },
                _ => dots(q, k, &mut scores[..self.n]),
            }
        }
    }

    /// `out_i += sum_j weights[i, j] v_j`.
    fn accumulate(&self, weights: &[f32], v: &[f32], out: &mut [f32], isa: Isa) {
        if self.queries >= LOOPS_BELOW {
            let (m, n, d) = (self.queries, self.n, self.d);
            assert!(weights.len() >= m * KEYS && v.len() >= n * d && out.len() >= m * d);
            // SAFETY: the assertion bounds every access.
            unsafe {
                let (to, a, b) = (out.as_mut_ptr(), weights.as_ptr(), v.as_ptr());
                product((m, d, n), to, true, (a, KEYS), (b, 1, d as isize));
            }
            return;
        }
        let all = out
            .chunks_exact_mut(self.d)
            .zip(weights.chunks_exact(KEYS))
            .take(self.queries);
        for (out, weights) in all {
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe { mix_avx512(&weights[..self.n], v, out) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { mix_avx2(&weights[..self.n], v, out) },
                _ => mix(&weights[..self.n], v, out),
            }
        }
    }
}

/// `to (+)= a b` with `a` `[m, k]` and `to` row-major; `b` has the given column and row strides.
///
/// # Safety
/// Every access must be in bounds, `to` exclusive.
unsafe fn product(
    (m, n, k): (usize, usize, usize),
    to: *mut f32,
    add: bool,
    (a, a_stride): (*const f32, usize),
    (b, b_column, b_row): (*const f32, isize, isize),
) {
    let to_stride = if add { n } else { KEYS };
    let alpha = if add { 1.0 } else { 0.0 };
    let none = Parallelism::None;
    // SAFETY: the caller's promise.
    unsafe {
        gemm(
            m,
            n,
            k,
            to,
            1,
            to_stride as isize,
            add,
            a,
            1,
            a_stride as isize,
            b,
            b_column,
            b_row,
            alpha,
            1.0,
            false,
            false,
            false,
            none,
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn dots_avx512(q: &[f32], k: &[f32], out: &mut [f32]) {
    dots(q, k, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dots_avx2(q: &[f32], k: &[f32], out: &mut [f32]) {
    dots(q, k, out);
}

#[inline(always)]
fn dots(q: &[f32], k: &[f32], out: &mut [f32]) {
    const LANES: usize = 16;
    for (out, k) in out.iter_mut().zip(k.chunks_exact(q.len())) {
        let mut lanes = [0f32; LANES];
        let (qs, ks) = (q.chunks_exact(LANES), k.chunks_exact(LANES));
        let tail: f32 = qs
            .remainder()
            .iter()
            .zip(ks.remainder())
            .map(|(a, b)| a * b)
            .sum();
        for (q, k) in qs.zip(ks) {
            for i in 0..LANES {
                lanes[i] = q[i].mul_add(k[i], lanes[i]);
            }
        }
        *out = lanes.iter().sum::<f32>() + tail;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn mix_avx512(weights: &[f32], v: &[f32], out: &mut [f32]) {
    mix(weights, v, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn mix_avx2(weights: &[f32], v: &[f32], out: &mut [f32]) {
    mix(weights, v, out);
}

#[inline(always)]
fn mix(weights: &[f32], v: &[f32], out: &mut [f32]) {
    for (w, v) in weights.iter().zip(v.chunks_exact(out.len())) {
        for (out, v) in out.iter_mut().zip(v) {
            *out = w.mul_add(*v, *out);
        }
    }
}
