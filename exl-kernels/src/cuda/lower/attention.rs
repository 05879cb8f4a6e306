//! Rotation with append to the cache, and attention (cuda/attn).

use super::{COUNTERS, Target};
use crate::cuda::launch::Args;
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
use crate::{DType, Error, Result};

const UNIT: &str = "attn/simt";

const ROPE_F16: Kernel = Kernel::new(UNIT, "exl_rope_append_f16");
const ROPE_F32: Kernel = Kernel::new(UNIT, "exl_rope_append_f32");
/// By storage and head size.
const ROWS_F16: [Kernel; 4] = [
    Kernel::new(UNIT, "exl_paged_attn_f16_32"),
    Kernel::new(UNIT, "exl_paged_attn_f16_64"),
    Kernel::new(UNIT, "exl_paged_attn_f16_128"),
    Kernel::new(UNIT, "exl_paged_attn_f16_256"),
];
const ROWS_F32: [Kernel; 4] = [
    Kernel::new(UNIT, "exl_paged_attn_f32_32"),
    Kernel::new(UNIT, "exl_paged_attn_f32_64"),
    Kernel::new(UNIT, "exl_paged_attn_f32_128"),
    Kernel::new(UNIT, "exl_paged_attn_f32_256"),
];

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    ROPE_F16,
    ROPE_F32,
    ROWS_F16[0],
    ROWS_F16[1],
    ROWS_F16[2],
    ROWS_F16[3],
    ROWS_F32[0],
    ROWS_F32[1],
    ROWS_F32[2],
    ROWS_F32[3],
];

/// Threads of an attention block (attn/simt.cu: WARPS).
const THREADS: u32 = 128;
/// Fewest keys that are worth a block.
const SPLIT_KEYS: usize = 64;
/// Blocks that should be there for each multiprocessor.
const BLOCKS_PER_SM: usize = 4;
/// Most blocks that share a head of a row.
const MAX_SPLITS: usize = 32;
/// Values of k and q that a block of the rotation takes.
const ROPE_VALUES: usize = 2048;

pub(super) fn rope_append(
    o: &RopeAppend<'_>,
    _: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let kernel = match o.k_cache.dtype() {
        DType::F16 => ROPE_F16,
        _ => ROPE_F32,
    };
    let values = (o.heads + o.kv_heads) * o.head_dim;
    list.push(Launch {
        kernel,
        grid: [o.rows as u32, values.div_ceil(ROPE_VALUES) as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.q.as_mem().as_ptr() as u64)
            .ptr(o.k.as_ptr() as u64)
            .ptr(o.v.as_ptr() as u64)
            .ptr(o.positions.as_ptr() as u64)
            .ptr(o.slots.as_ptr() as u64)
            .ptr(o.inv_freq.as_ptr() as u64)
            .ptr(o.k_cache.as_mem().as_ptr() as u64)
            .ptr(o.v_cache.as_mem().as_ptr() as u64)
            .int(o.heads)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(o.inv_freq.len())
            .int(usize::from(o.style == RopeStyle::GptJ))
            .float(o.attention_factor),
    });
    Ok(())
}

/// Blocks that share the keys of one head of one row.
fn splits(o: &PagedAttn<'_>, props: &DeviceProps) -> usize {
    let cells = o.rows * o.heads;
    if cells > COUNTERS {
        return 1;
    }
    let wanted = (BLOCKS_PER_SM * props.sms as usize).div_ceil(cells.max(1));
    let most = (o.pages_per_seq * PAGE_TOKENS / SPLIT_KEYS).clamp(1, MAX_SPLITS);
    wanted.clamp(1, most)
}

pub(super) fn paged_attn(
    o: &PagedAttn<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let size = [32, 64, 128, 256].iter().position(|&n| o.head_dim <= n);
    let size = size.ok_or_else(|| Error::Unsupported {
        op: "paged_attn",
        what: format!("head_dim {} on a GPU", o.head_dim),
    })?;
    let kernel = match o.k_cache.dtype() {
        DType::F16 => ROWS_F16[size],
        _ => ROWS_F32[size],
    };
    let splits = splits(o, target.props);
    // The grid's third dimension ends at 65535.
    if o.rows > u16::MAX as usize {
        return Err(Error::Unsupported {
            op: "paged_attn",
            what: format!("{} rows", o.rows),
        });
    }
    list.push(Launch {
        kernel,
        grid: [splits as u32, o.heads as u32, o.rows as u32],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.q.as_ptr() as u64)
            .ptr(o.k_cache.as_ptr() as u64)
            .ptr(o.v_cache.as_ptr() as u64)
            .ptr(o.block_table.as_ptr() as u64)
            .ptr(o.q_start.as_ptr() as u64)
            .ptr(o.kv_len.as_ptr() as u64)
            .ptr(o.out.as_mem().as_ptr() as u64)
            .ptr(target.scratch.address)
            .ptr(target.scratch.counters)
            .int(o.rows)
            .int(o.seqs)
            .int(o.pages_per_seq)
            .int(o.heads)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(splits)
            .int(o.window)
            .float(o.scale)
            .float(o.softcap),
    });
    Ok(())
}

/// Bytes for the partial results of splits.
pub(super) fn paged_attn_scratch(o: &PagedAttn<'_>, props: &DeviceProps) -> u64 {
    match splits(o, props) {
        1 => 0,
        n => (o.rows * o.heads * n * (o.head_dim + 2) * 4) as u64,
    }
}
