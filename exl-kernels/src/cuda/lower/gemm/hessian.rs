//! The Hessian's update (cuda/gemm/hessian.cu), and products of two matrices over their rows
//! (cuda/gemm/transposed.cu).

use crate::Result;
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::{Kernel, Launch};
use crate::ops::{HessianSyrk, TransposedProduct};

pub(super) const SYRK: Kernel = Kernel::new("gemm/hessian", "exl_hessian_syrk");

pub(super) const TRANSPOSED: Kernel = Kernel::new("gemm/transposed", "exl_transposed_product");

/// Rows and columns of a block's tile.
const TILE: usize = 64;
/// Of a block of the product's.
const PRODUCT_TILE: usize = 128;

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

pub(in super::super) fn transposed_product(
    o: &TransposedProduct<'_>,
    _: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let tiles = |n: usize| n.div_ceil(PRODUCT_TILE) as u32;
    list.push(Launch {
        kernel: TRANSPOSED,
        grid: [tiles(o.n), tiles(o.m), 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.a.as_ptr() as u64)
            .ptr(o.minus.as_ref().map_or(0, |m| m.as_ptr() as u64))
            .ptr(o.b.as_ptr() as u64)
            .ptr(o.out.as_mem().as_ptr() as u64)
            .int(o.rows)
            .int(o.m)
            .int(o.n)
            .float(o.alpha),
    });
    Ok(())
}
