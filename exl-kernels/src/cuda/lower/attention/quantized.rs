//! Quantized caches (cuda/kv, cuda/attn/decode_quantized.cu).
//!
//! Few query rows of heads of 64 or 128 values read the codes themselves. For prompts and for all
//! other heads the pages of the step are unpacked into scratch memory, one page there for each of the
//! cache, and the kernels for 16-bit floats read them; their output is transformed back.

use super::fresh::LEAVING;
use super::rope::{axis_starts, regions};
use super::tiles::SHARED_OVERHEAD;
use super::{Choice, Shape, Work, attention_launch, choose, many_rows, select, split};
use crate::cuda::launch::Args;
use crate::cuda::lower::{Scratch, Target};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
use crate::{DType, Error, KvFormat, KvType, Mem, MemMut, Result};

pub(super) const APPEND: Kernel = Kernel::new("kv/append", "exl_kv_append");
/// A warp for each scale of 4-bit codes that is tried: one step's latency counts.
pub(super) const APPEND_FEW: Kernel = Kernel::new("kv/append", "exl_kv_append_few");
pub(super) const UNPACK: Kernel = Kernel::new("kv/unpack", "exl_kv_unpack");
pub(super) const RESTORE: Kernel = Kernel::new("kv/unpack", "exl_kv_restore");
const APPEND_THREADS: usize = 128;
/// Scales that are tried (cuda/kv/append.cu: SHARES).
const SCALES: usize = 7;
const UNPACK_THREADS: usize = 256;
/// Values that a thread of the unpacking takes.
const UNPACK_EACH: usize = 16;
/// Values of shared memory behind a head: compilers read the rest of a block before they know that it is
/// not there.
const PADDING: usize = 32;
/// Most values of a head: they lie in shared memory that every GPU gives without being asked.
const MAX_DIM: usize = (48 << 10) / 4 - PADDING;

/// Query rows of a tile.
const ROWS: usize = 8;

/// A kernel for heads of `dim` values in a cache of one type.
pub(super) struct Fused {
    dim: usize,
    kv: KvType,
    pub(super) kernel: Kernel,
    /// Warps of a block, and blocks that fit a multiprocessor's registers.
    warps: usize,
    blocks: usize,
}

const fn fused(dim: usize, blocks: usize, k: KvFormat, v: KvFormat, entry: &'static str) -> Fused {
    Fused {
        dim,
        kv: KvType { k, v },
        kernel: Kernel::new("attn/decode_quantized", entry),
        warps: 4,
        blocks,
    }
}

pub(super) const FUSED: [Fused; 8] = {
    use KvFormat::{Q4, Q6, Q8};
    [
        fused(64, 4, Q8, Q8, "exl_attn_decode_64_q8_q8"),
        fused(64, 4, Q6, Q6, "exl_attn_decode_64_q6_q6"),
        fused(64, 4, Q4, Q4, "exl_attn_decode_64_q4_q4"),
        fused(64, 4, Q8, Q4, "exl_attn_decode_64_q8_q4"),
        fused(128, 3, Q8, Q8, "exl_attn_decode_128_q8_q8"),
        fused(128, 3, Q6, Q6, "exl_attn_decode_128_q6_q6"),
        fused(128, 4, Q4, Q4, "exl_attn_decode_128_q4_q4"),
        fused(128, 3, Q8, Q4, "exl_attn_decode_128_q8_q4"),
    ]
};

impl Fused {
    /// Both terms of the queries, and the sums of all warps.
    fn shared(&self) -> usize {
        let row = self.dim + 8;
        2 * 2 * ROWS * row + self.warps * 4 * ROWS * row
    }
}

fn bits(format: KvFormat) -> usize {
    format.code_bits().unwrap_or(16) as usize
}

/// The kernel that reads the codes itself, if there is one for the step.
pub(super) fn direct(
    s: &Shape,
    kv: KvType,
    props: &DeviceProps,
    deterministic: bool,
) -> Option<Choice> {
    let f = FUSED.iter().find(|f| f.dim == s.dim && f.kv == kv)?;
    let shared = f.shared();
    let sms = props.sms as usize;
    if !s.aligned || shared > props.shared_per_block as usize || many_rows(s, sms, deterministic) {
        return None;
    }
    let each = (s.rows.div_ceil(s.seqs) * s.group()).div_ceil(ROWS);
    let together = props.shared_per_sm as usize / (shared + SHARED_OVERHEAD);
    let slots = s.slots(ROWS);
    let work = Work {
        cells: slots * s.kv_heads,
        busy: each * s.seqs * s.kv_heads,
        capacity: together.clamp(1, f.blocks) * sms,
    };
    let (splits, chunk) = split(s, &work, deterministic);
    Some(Choice {
        kernel: f.kernel,
        grid: [slots, s.kv_heads, splits],
        threads: 32 * f.warps,
        shared,
        splits,
        chunk,
    })
}

/// Bytes of the unpacked keys, and of the values.
fn unpacked_bytes(o: &PagedAttn<'_>) -> usize {
    let page = o.kv.k.key_page_bytes(o.kv_heads, o.head_dim);
    let pages = o.k_cache.bytes() / page.max(1);
    pages * KvFormat::F16.page_bytes(o.kv_heads, o.head_dim)
}

/// The shape that attention has over the unpacked cache.
fn unpacked_shape(o: &PagedAttn<'_>) -> Shape {
    Shape {
        cache: DType::F16,
        ..Shape::new(o)
    }
}

/// Bytes of scratch memory for one way to run it.
pub(super) fn scratch(o: &PagedAttn<'_>, shape: &Shape, props: &DeviceProps, fixed: bool) -> usize {
    if let Some(c) = direct(shape, o.kv, props, fixed) {
        return shape.scratch(c.splits);
    }
    let inner = Shape {
        cache: DType::F16,
        ..*shape
    };
    let splits = select(&inner, props, fixed).map_or(1, |c| c.splits);
    2 * unpacked_bytes(o) + inner.scratch(splits)
}

fn unsupported(op: &'static str, what: String) -> Error {
    Error::Unsupported {
        op,
        what: format!("{what} on a GPU"),
    }
}

pub(super) fn paged_attn(
    o: &PagedAttn<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let shape = Shape::new(o);
    if let Some(c) = direct(&shape, o.kv, target.props, target.deterministic) {
        super::countable(&shape)?;
        let launch = attention_launch(o, &c, (&target.scratch, true));
        // Its rows are left in order for nobody yet: no test compares them.
        list.push(Launch {
            args: launch.args.clone().block(&LEAVING),
            ..launch
        });
        return Ok(());
    }
    let grid = [o.pages_per_seq, 2 * o.seqs, o.heads];
    if grid.iter().any(|&n| n > usize::from(u16::MAX)) || o.head_dim > MAX_DIM {
        let what = format!("{} pages of {} sequences", o.pages_per_seq, o.seqs);
        return Err(unsupported("paged_attn", what));
    }
    let half = unpacked_bytes(o);
    let address = target.scratch.address;
    let (k_at, v_at) = (address, address + half as u64);
    let scratch = Scratch {
        address: address + 2 * half as u64,
        bytes: target.scratch.bytes.saturating_sub(2 * half as u64),
        counters: target.scratch.counters,
    };
    let c = choose(&unpacked_shape(o), target)?;
    list.push(unpack(o, k_at, v_at));
    let floats = |at: u64| {
        let at = std::ptr::without_provenance::<u8>(at as usize);
        // SAFETY: lowering reads no memory; the launch before this one writes it.
        unsafe { Mem::from_raw(at, half, DType::F16, o.k_cache.place()) }
    };
    let out = o.out.as_mem();
    // SAFETY: the region of the op itself, which nothing else writes meanwhile.
    let out = unsafe {
        MemMut::from_raw(
            out.as_ptr().cast_mut(),
            out.bytes(),
            out.dtype(),
            out.place(),
        )
    };
    let inner = PagedAttn {
        k_cache: floats(k_at),
        v_cache: floats(v_at),
        kv: KvType::F16,
        out,
        ..*o
    };
    list.push(attention_launch(&inner, &c, (&scratch, false)));
    list.push(Launch {
        kernel: RESTORE,
        grid: [o.rows as u32, o.heads as u32, 1],
        block: [32, 1, 1],
        shared_bytes: 4 * o.head_dim as u32,
        args: Args::new()
            .ptr(o.out.as_mem().as_ptr() as u64)
            .ptr(o.q_start.as_ptr() as u64)
            .int(o.seqs)
            .int(o.heads)
            .int(o.head_dim),
    });
    Ok(())
}

fn unpack(o: &PagedAttn<'_>, k_at: u64, v_at: u64) -> Launch {
    let values = PAGE_TOKENS * o.kv_heads * o.head_dim;
    let parts = values.div_ceil(UNPACK_THREADS * UNPACK_EACH);
    Launch {
        kernel: UNPACK,
        grid: [parts as u32, o.pages_per_seq as u32, 2 * o.seqs as u32],
        block: [UNPACK_THREADS as u32, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.k_cache.as_ptr() as u64)
            .ptr(o.v_cache.as_ptr() as u64)
            .ptr(k_at)
            .ptr(v_at)
            .ptr(o.block_table.as_ptr() as u64)
            .ptr(o.q_start.as_ptr() as u64)
            .ptr(o.kv_len.as_ptr() as u64)
            .int(o.pages_per_seq)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(bits(o.kv.k))
            .int(bits(o.kv.v))
            .int(o.window.min(i32::MAX as usize)),
    }
}

pub(super) fn rope_append(
    o: &RopeAppend<'_>,
    props: &DeviceProps,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let heads = o.heads + 2 * o.kv_heads;
    if o.head_dim > MAX_DIM || heads > usize::from(u16::MAX) || i32::try_from(o.rows).is_err() {
        let what = format!("{} rows of {heads} heads of {} values", o.rows, o.head_dim);
        return Err(unsupported("rope_append", what));
    }
    if o.rows == 0 || o.head_dim == 0 {
        return Ok(());
    }
    let [second, third] = axis_starts(o);
    let width = (o.kv_heads * o.head_dim).max(1);
    // As long as all blocks run side by side, of which a multiprocessor holds two.
    let searches = [o.kv.k, o.kv.v].contains(&KvFormat::Q4);
    let few = searches && o.rows * heads <= 2 * props.sms as usize;
    let (kernel, threads) = match few {
        true => (APPEND_FEW, SCALES * APPEND_THREADS),
        false => (APPEND, APPEND_THREADS),
    };
    list.push(Launch {
        kernel,
        grid: [o.rows as u32, heads as u32, 1],
        block: [threads as u32, 1, 1],
        shared_bytes: 4 * (o.head_dim + PADDING) as u32,
        args: regions(o)
            .ptr(o.k_centers.as_ptr() as u64)
            .int(o.k_centers.len() / width)
            .int(o.heads)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(o.inv_freq.len())
            .int(usize::from(o.style == RopeStyle::GptJ))
            .float(o.attention_factor)
            .int(bits(o.kv.k))
            .int(bits(o.kv.v))
            .int(second)
            .int(third),
    });
    Ok(())
}
