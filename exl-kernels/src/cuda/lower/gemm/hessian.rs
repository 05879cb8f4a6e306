//! The Hessian's update (cuda/gemm/hessian.cu).

use crate::Result;
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::{Kernel, Launch};
use crate::ops::HessianSyrk;

pub(super) const SYRK: Kernel = Kernel::new("gemm/hessian", "exl_hessian_syrk");

/// Rows and columns of a block's tile.
const TILE: usize = 64;

pub(in super::super) fn hessian_syrk(
    o: &HessianSyrk<'_>,
    _: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let tiles = o.dim.div_ceil(TILE) as u32;
    list.push(Launch {
        kernel: SYRK,
        grid: [tiles, tiles, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.x.as_ptr() as u64)
            .ptr(o.h.as_mem().as_ptr() as u64)
            .int(o.rows)
            .int(o.dim),
    });
    Ok(())
}
