//! Rotation with append to the cache (cuda/rope).

use super::quantized;
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::{Kernel, Launch};
use crate::ops::{RopeAppend, RopeStyle};
use crate::{DType, Error, Result};

/// For caches of 16-bit and 32-bit floats.
pub(super) const ROPE: [Kernel; 2] = [
    Kernel::new("rope/rope_append", "exl_rope_append_f16"),
    Kernel::new("rope/rope_append", "exl_rope_append_f32"),
];
/// Threads of a block of the rotation, and heads that one takes at a time.
const ROPE_THREADS: usize = 256;
const ROPE_HEADS: usize = 4;

/// First frequencies of the second and of the third axis; beyond all where there is one.
pub(super) fn axis_starts(o: &RopeAppend<'_>) -> [usize; 2] {
    let [a, b, _] = o.sections.unwrap_or([i32::MAX as usize, 0, 0]);
    [a, a + b]
}

/// The first arguments, whatever the cache is.
pub(super) fn regions(o: &RopeAppend<'_>) -> Args {
    Args::new()
        .ptr(o.q.as_mem().as_ptr() as u64)
        .ptr(o.k.as_ptr() as u64)
        .ptr(o.v.as_ptr() as u64)
        .ptr(o.positions.as_ptr() as u64)
        .ptr(o.slots.as_ptr() as u64)
        .ptr(o.inv_freq.as_ptr() as u64)
        .ptr(o.k_cache.as_mem().as_ptr() as u64)
        .ptr(o.v_cache.as_mem().as_ptr() as u64)
}

pub(in crate::cuda::lower) fn rope_append(
    o: &RopeAppend<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    if o.kv.k.is_quantized() {
        return quantized::rope_append(o, target.props, list);
    }
    let heads = o.heads + o.kv_heads;
    if [o.rows, heads.saturating_mul(o.head_dim)]
        .iter()
        .any(|&n| i32::try_from(n).is_err())
    {
        return Err(Error::Unsupported {
            op: "rope_append",
            what: format!("{} rows of {heads} heads on a GPU", o.rows),
        });
    }
    if o.rows == 0 || heads * o.head_dim == 0 {
        return Ok(());
    }
    let pairs = o.inv_freq.len();
    let [second, third] = axis_starts(o);
    // Several blocks per row while that gives the GPU more to do.
    let side = ROPE_THREADS / pairs.clamp(1, ROPE_THREADS);
    let useful = heads.div_ceil(side * ROPE_HEADS);
    let blocks = (8 * target.props.sms as usize).div_ceil(o.rows);
    list.push(Launch {
        kernel: ROPE[usize::from(o.k_cache.dtype() != DType::F16)],
        grid: [o.rows as u32, useful.min(blocks) as u32, 1],
        block: [ROPE_THREADS as u32, 1, 1],
        shared_bytes: 0,
        args: regions(o)
            .int(o.heads)
            .int(o.kv_heads)
            .int(o.head_dim)
            .int(pairs)
            .int(usize::from(o.style == RopeStyle::GptJ))
            .float(o.attention_factor)
            .int(second)
            .int(third),
    });
    Ok(())
}
