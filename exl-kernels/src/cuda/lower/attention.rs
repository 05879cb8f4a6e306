//! Rotation with append to the cache, and attention (cuda/rope, cuda/attn).
//!
//! Attention over a cache of 16-bit floats runs on tensor cores: many query rows per sequence in
//! tiles of 64 rows, or of 128 by warpgroups where the GPU has them, few in tiles of 16 with the keys
//! of a sequence spread over blocks. Quantized caches have kernels of their own or are unpacked
//! ([`quantized`]). Other caches and odd heads are computed row by row. With
//! [`Target::deterministic`] there is one kernel for every number of rows, and chunks of keys end at
//! fixed positions, so that a row's result is the same in every batch.

mod fresh;
mod quantized;
mod rope;
#[cfg(test)]
mod tests;
mod tiles;

use super::linear::ordered_bytes;
use super::{COUNTERS, Scratch, Target};
use crate::cuda::launch::Args;
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{PAGE_TOKENS, PagedAttn};
use crate::{DType, Error, Result};
pub(super) use fresh::{ROTATING, leave, rehearse, rotating};
use quantized::FUSED;
use rope::ROPE;
pub(super) use rope::rope_append;
use tiles::{
    DECODE_ROWS, MANY, MANY_TILES, PREFILL_ROWS, PREFILL_THREADS, SHARED_OVERHEAD, TILES, Tiles,
    WGMMA, WGMMA_ROWS, WGMMA_THREADS,
};

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    ROPE[0],
    ROPE[1],
    TILES[0].decode,
    TILES[1].decode,
    TILES[2].decode,
    TILES[3].decode,
    MANY.decode,
    ROTATING[0],
    ROTATING[1],
    ROTATING[2],
    ROTATING[3],
    TILES[0].prefill,
    TILES[1].prefill,
    TILES[2].prefill,
    TILES[3].prefill,
    WGMMA[0].kernel,
    WGMMA[1].kernel,
    WGMMA[2].kernel,
    ROWS_F16[0],
    ROWS_F16[1],
    ROWS_F16[2],
    ROWS_F16[3],
    ROWS_F32[0],
    ROWS_F32[1],
    ROWS_F32[2],
    ROWS_F32[3],
    ANY[0],
    ANY[1],
    quantized::APPEND,
    quantized::APPEND_FEW,
    quantized::UNPACK,
    quantized::RESTORE,
    FUSED[0].kernel,
    FUSED[1].kernel,
    FUSED[2].kernel,
    FUSED[3].kernel,
    FUSED[4].kernel,
    FUSED[5].kernel,
    FUSED[6].kernel,
    FUSED[7].kernel,
];

/// By head size, as [`ROWS_DIMS`].
const ROWS_F16: [Kernel; 4] = [
    Kernel::new("attn/simt", "exl_attn_rows_f16_32"),
    Kernel::new("attn/simt", "exl_attn_rows_f16_64"),
    Kernel::new("attn/simt", "exl_attn_rows_f16_128"),
    Kernel::new("attn/simt", "exl_attn_rows_f16_256"),
];
const ROWS_F32: [Kernel; 4] = [
    Kernel::new("attn/simt", "exl_attn_rows_f32_32"),
    Kernel::new("attn/simt", "exl_attn_rows_f32_64"),
    Kernel::new("attn/simt", "exl_attn_rows_f32_128"),
    Kernel::new("attn/simt", "exl_attn_rows_f32_256"),
];
const ROWS_DIMS: [usize; 4] = [32, 64, 128, 256];
/// Heads of any size, for caches of 16-bit and 32-bit floats.
const ANY: [Kernel; 2] = [
    Kernel::new("attn/simt", "exl_attn_rows_any_f16"),
    Kernel::new("attn/simt", "exl_attn_rows_any_f32"),
];
const ROWS_THREADS: usize = 128;
/// Blocks of these kernels that share a multiprocessor.
const ROWS_BLOCKS: usize = 4;

/// Fewest keys of a block that are worth it (attn.cuh: LEAST_CHUNK).
const LEAST_CHUNK: usize = 128;
/// Keys of a block where chunks have fixed places.
const FIXED_CHUNK: usize = 512;
/// Most blocks that share the keys of a tile (attn.cuh: MAX_SPLITS).
const MAX_SPLITS: usize = 128;
/// What a further block per tile costs, as a share of the work of a wave: writing and merging.
const SPLIT_COST: f64 = 0.01;
/// Most bytes of partial results; beyond, blocks walk through the fixed chunks.
const MAX_SCRATCH: usize = 64 << 20;

/// What the choice of a kernel depends on.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    seqs: usize,
    /// Most tokens of a sequence.
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    cache: DType,
    /// All regions are aligned to 16 bytes.
    aligned: bool,
}

impl Shape {
    fn new(o: &PagedAttn<'_>) -> Self {
        let regions = [&o.q, &o.k_cache, &o.v_cache, &o.out.as_mem()]
            .map(|m| (m.as_ptr() as u64).is_multiple_of(16));
        Self {
            rows: o.rows,
            seqs: o.seqs,
            tokens: o.pages_per_seq.saturating_mul(PAGE_TOKENS),
            heads: o.heads,
            kv_heads: o.kv_heads,
            dim: o.head_dim,
            cache: o.k_cache.dtype(),
            aligned: regions.iter().all(|&aligned| aligned),
        }
    }

    /// There is something to compute.
    fn is_some(&self) -> bool {
        [self.rows, self.seqs, self.tokens, self.heads, self.dim]
            .iter()
            .all(|&n| n > 0)
    }

    /// The tensor-core kernels that take the shape.
    fn tiles(&self) -> Option<&'static Tiles> {
        let fits = self.cache == DType::F16 && self.aligned && self.dim.is_multiple_of(8);
        TILES.iter().find(|t| fits && self.dim <= t.dim)
    }

    /// Query heads of a KV head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Whole tiles of `tile` packed rows, and enough of them for these multiprocessors.
    fn fills(&self, tile: usize, sms: usize) -> bool {
        let packed = self.rows * self.group();
        let blocks = packed.div_ceil(tile) * self.kv_heads;
        packed >= tile * self.seqs && 2 * blocks >= sms
    }

    /// Slots for tiles of `rows` packed rows: sequences do not share tiles, and where they begin is
    /// known on the GPU only.
    fn slots(&self, rows: usize) -> usize {
        self.rows * self.group() / rows + self.seqs
    }

    /// Bytes of partial results.
    fn scratch(&self, splits: usize) -> usize {
        match splits {
            1 => 0,
            _ => 4 * (self.rows * self.heads * splits * (self.dim + 2) + 1),
        }
    }
}

/// A kernel for a [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    kernel: Kernel,
    grid: [usize; 3],
    threads: usize,
    shared: usize,
    /// Most blocks that share the keys of a tile.
    splits: usize,
    /// Keys of a block; 0 for as even as can be.
    chunk: usize,
}

/// Tiles whose keys may be shared out.
struct Work {
    /// Places for tiles, each with a counter.
    cells: usize,
    /// Tiles that there will probably be.
    busy: usize,
    /// Blocks that the GPU holds at once.
    capacity: usize,
}

/// Blocks per tile, and the keys of a block.
fn split(s: &Shape, work: &Work, deterministic: bool) -> (usize, usize) {
    let counted = work.cells <= COUNTERS;
    if deterministic {
        let splits = s.tokens.div_ceil(FIXED_CHUNK);
        // The grid's third dimension ends at 65535.
        let fits = counted && splits <= 1 << 15 && s.scratch(splits) <= MAX_SCRATCH;
        return (if fits { splits } else { 1 }, FIXED_CHUNK);
    }
    let most = s.tokens.div_ceil(LEAST_CHUNK).clamp(1, MAX_SPLITS);
    let time = |splits: usize| {
        let waves = (work.busy * splits).div_ceil(work.capacity) as f64;
        waves * (1.0 / splits as f64 + SPLIT_COST)
    };
    let best = (1..=most).min_by(|&a, &b| time(a).total_cmp(&time(b)));
    (best.filter(|_| counted).unwrap_or(1), 0)
}

fn select(s: &Shape, props: &DeviceProps, deterministic: bool) -> Option<Choice> {
    let Some(tiles) = s.tiles() else {
        return rows(s, props, deterministic);
    };
    let (block, sms) = (props.shared_per_block as usize, props.sms as usize);
    let many = |tile: usize| !deterministic && s.fills(tile, sms);
    let prompts = WGMMA
        .iter()
        .filter(|w| props.has_warpgroup_products() && s.dim <= w.dim)
        .map(|w| (w.kernel, WGMMA_ROWS, WGMMA_THREADS, w.shared()))
        .take(1);
    let elsewhere = (
        tiles.prefill,
        PREFILL_ROWS,
        PREFILL_THREADS,
        tiles.prefill_shared(),
    );
    let prompt = prompts
        .chain([elsewhere])
        .find(|&(_, tile, _, shared)| many(tile) && shared <= block);
    if let Some((kernel, tile, threads, shared)) = prompt {
        return Some(Choice {
            kernel,
            grid: [s.slots(tile), s.kv_heads, 1],
            threads,
            shared,
            splits: 1,
            chunk: 0,
        });
    }
    let each = (s.rows.div_ceil(s.seqs) * s.group()).div_ceil(DECODE_ROWS);
    let busy = each * s.seqs * s.kv_heads;
    // Its sums have another order.
    let tiles = match tiles.dim == MANY.dim && busy >= MANY_TILES * sms && !deterministic {
        true => &MANY,
        false => tiles,
    };
    let shared = tiles.decode_shared();
    if shared > block {
        return rows(s, props, deterministic);
    }
    let together = props.shared_per_sm as usize / (shared + SHARED_OVERHEAD);
    let slots = s.slots(DECODE_ROWS);
    let work = Work {
        cells: slots * s.kv_heads,
        busy,
        capacity: together.clamp(1, tiles.blocks) * sms,
    };
    let (splits, chunk) = split(s, &work, deterministic);
    Some(Choice {
        kernel: tiles.decode,
        grid: [slots, s.kv_heads, splits],
        threads: 32 * tiles.warps,
        shared,
        splits,
        chunk,
    })
}

/// The kernels that take everything, one query head of one row at a time.
fn rows(s: &Shape, props: &DeviceProps, deterministic: bool) -> Option<Choice> {
    let half = s.cache == DType::F16;
    let Some(size) = ROWS_DIMS.iter().position(|&dim| s.dim <= dim) else {
        // The query, the sums and the weights of as many keys as there are threads.
        let shared = 4 * (2 * s.dim + ROWS_THREADS);
        return (shared <= 48 << 10).then(|| Choice {
            kernel: ANY[usize::from(!half)],
            grid: [s.rows, s.heads, 1],
            threads: ROWS_THREADS,
            shared,
            splits: 1,
            chunk: 0,
        });
    };
    let work = Work {
        cells: s.rows * s.heads,
        busy: s.rows * s.heads,
        capacity: ROWS_BLOCKS * props.sms as usize,
    };
    let (splits, chunk) = split(s, &work, deterministic);
    Some(Choice {
        kernel: if half { ROWS_F16 } else { ROWS_F32 }[size],
        grid: [s.rows, s.heads, splits],
        threads: ROWS_THREADS,
        shared: 0,
        splits,
        chunk,
    })
}

/// Whether the kernels for prompts take a step.
fn many_rows(s: &Shape, sms: usize, deterministic: bool) -> bool {
    !deterministic && s.fills(PREFILL_ROWS, sms)
}

/// That kernels can count what a shape has.
fn countable(s: &Shape) -> Result<()> {
    let small = |n: usize| i32::try_from(n).is_ok();
    let width = s.heads.saturating_mul(s.dim);
    if ![s.rows.saturating_mul(s.heads), s.tokens, s.seqs, width]
        .into_iter()
        .all(small)
        || s.heads > usize::from(u16::MAX)
    {
        return Err(Error::Unsupported {
            op: "paged_attn",
            what: format!("{s:?} on a GPU"),
        });
    }
    Ok(())
}

/// The choice for a shape, and that kernels can count what it has.
fn choose(s: &Shape, target: &Target<'_>) -> Result<Choice> {
    countable(s)?;
    let choice = select(s, target.props, target.deterministic);
    choice.ok_or_else(|| Error::Unsupported {
        op: "paged_attn",
        what: format!("head_dim {} on a GPU", s.dim),
    })
}

pub(super) fn paged_attn(
    o: &PagedAttn<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let shape = Shape::new(o);
    if !shape.is_some() {
        return Ok(());
    }
    if o.kv.k.is_quantized() {
        return quantized::paged_attn(o, target, list);
    }
    let c = choose(&shape, target)?;
    list.push(attention_launch(o, &c, (&target.scratch, true)));
    Ok(())
}

/// Attention by a chosen kernel.
/// `stored`: the op's caches are what earlier steps left, not what the launch before this one makes of them.
fn attention_launch(o: &PagedAttn<'_>, c: &Choice, (scratch, stored): (&Scratch, bool)) -> Launch {
    Launch {
        kernel: c.kernel,
        grid: c.grid.map(|n| n as u32),
        block: [c.threads as u32, 1, 1],
        shared_bytes: c.shared as u32,
        args: Args::new()
            .ptr(o.q.as_ptr() as u64)
            .ptr(o.k_cache.as_ptr() as u64)
            .ptr(o.v_cache.as_ptr() as u64)
            .ptr(o.block_table.as_ptr() as u64)
            .ptr(o.q_start.as_ptr() as u64)
            .ptr(o.kv_len.as_ptr() as u64)
            .ptr(o.out.as_mem().as_ptr() as u64)
            .ptr(scratch.address)
            .ptr(scratch.counters)
            .int(o.rows)
            .int(o.seqs)
            .int(o.pages_per_seq)
            .int(o.heads)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(c.splits)
            .int(c.chunk)
            .int(o.window.min(i32::MAX as usize))
            .float(o.scale)
            .float(o.softcap)
            .int(usize::from(stored)),
    }
}

/// Bytes of partial results, whatever the target asks for and wherever regions lie.
pub(super) fn paged_attn_scratch(o: &PagedAttn<'_>, props: &DeviceProps) -> u64 {
    let shape = Shape::new(o);
    if !shape.is_some() {
        return 0;
    }
    let bytes = |aligned: bool, deterministic: bool| {
        let shape = Shape { aligned, ..shape };
        if o.kv.k.is_quantized() {
            return quantized::scratch(o, &shape, props, deterministic);
        }
        let choice = select(&shape, props, deterministic);
        choice.map_or(0, |c| shape.scratch(c.splits))
    };
    let all = [(true, true), (true, false), (false, true), (false, false)];
    let most = all.map(|(aligned, fixed)| bytes(aligned, fixed));
    // And what one row leaves in the order of the product behind it (fresh.rs: leave).
    let behind = ordered_bytes(o.rows, o.heads * o.head_dim);
    (most.into_iter().max().unwrap_or(0) + behind) as u64
}
