//! Coordinate descent over codes (cuda/quant/refine.cu).

use super::{Parts, at, check_sizes, out, push};
use crate::Result;
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::{Kernel, Launch};
use crate::ops::Refine;

pub(super) const LOAD: Kernel = Kernel::new("quant/refine", "exl_refine_load");
pub(super) const BEGIN: Kernel = Kernel::new("quant/refine", "exl_refine_begin");
pub(super) const PULL: Kernel = Kernel::new("quant/refine", "exl_refine_pull");
pub(super) const SETTLE: Kernel = Kernel::new("quant/refine", "exl_refine_settle");
pub(super) const PASS: Kernel = Kernel::new("quant/refine", "exl_refine_pass");

/// Rows and columns of a tile of the products, and rows of a panel.
const TILE: usize = 128;
/// Rows that share their scales, at least.
const STEP: usize = 32;
/// Columns of a block that settles.
const COLUMNS: usize = 32;

/// Scratch memory, as addresses.
pub(super) struct Space {
    /// F32 `[inputs, inputs]`: the damped Hessian in packed order.
    pub(super) packed: u64,
    /// F32 `[inputs, outputs]`.
    pub(super) pull: u64,
    /// F32 `[TILE, outputs]`.
    pub(super) change: u64,
    pub(super) end: u64,
}

impl Space {
    pub(super) fn new(o: &Refine<'_>, base: u64) -> Self {
        let (k, n) = (o.inputs, o.outputs);
        let mut parts = Parts { next: base };
        Self {
            packed: parts.take(4 * k * k),
            pull: parts.take(4 * k * n),
            change: parts.take(4 * TILE * n),
            end: parts.next,
        }
    }
}

/// Bytes of scratch for it.
pub(in crate::cuda::lower) fn refine_scratch(o: &Refine<'_>) -> u64 {
    Space::new(o, 0).end
}

pub(in crate::cuda::lower) fn refine(
    o: &Refine<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let (k, n) = (o.inputs, o.outputs);
    check_sizes("refine", &[k, n])?;
    let space = Space::new(o, target.scratch.address);
    if k == 0 {
        return Ok(());
    }
    let tiles = (n.div_ceil(TILE), k.div_ceil(TILE));
    let load = Args::new()
        .ptr(at(&o.h))
        .ptr(at(&o.order))
        .ptr(space.packed)
        .int(k)
        .long(o.scale.to_bits())
        .long(o.lambda.to_bits());
    push(list, LOAD, (k, 1), load);
    let begin = Args::new()
        .ptr(at(&o.codes))
        .ptr(at(&o.decoded))
        .ptr(out(&o.new_codes))
        .ptr(out(&o.new_decoded))
        .int(n);
    push(list, BEGIN, (k, 1), begin);
    let pull = Args::new()
        .ptr(space.packed)
        .ptr(at(&o.order))
        .ptr(at(&o.weight))
        .ptr(at(&o.decoded))
        .ptr(space.pull)
        .int(k)
        .int(n);
    push(list, PULL, tiles, pull);
    let steps = steps(o);
    for first in (0..o.rounds).flat_map(|_| (0..k).step_by(TILE)) {
        let end = (first + TILE).min(k);
        push(
            list,
            SETTLE,
            (n / COLUMNS, 1),
            settle(o, &space, &steps, (first, end)),
        );
        if tiles.1 > 1 {
            let pass = Args::new()
                .ptr(space.pull)
                .ptr(space.packed)
                .ptr(space.change)
                .int(first)
                .int(end)
                .int(k)
                .int(n);
            push(list, PASS, tiles, pass);
        }
    }
    Ok(())
}

/// Group and width of every [`STEP`] rows.
fn steps(o: &Refine<'_>) -> Vec<(usize, u8)> {
    let groups = o.groups.iter().enumerate();
    groups
        .flat_map(|(g, group)| std::iter::repeat_n((g, group.bits), group.rows / STEP))
        .collect()
}

fn settle(
    o: &Refine<'_>,
    space: &Space,
    steps: &[(usize, u8)],
    (first, end): (usize, usize),
) -> Args {
    let step = |i: usize| steps.get(first / STEP + i).copied().unwrap_or((0, 0));
    let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
    let bits = |i: usize| usize::from(step(i).1);
    Args::new()
        .ptr(space.pull)
        .ptr(space.packed)
        .ptr(at(&o.order))
        .ptr(at(&o.scale_codes))
        .ptr(at(&o.scale_max))
        .ptr(out(&o.new_codes))
        .ptr(out(&o.new_decoded))
        .ptr(space.change)
        .int(first)
        .int(end)
        .int(o.inputs)
        .int(o.outputs)
        .block(&[
            pair(step(0).0, step(1).0),
            pair(step(2).0, step(3).0),
            pair(bits(0), bits(1)),
            pair(bits(2), bits(3)),
        ])
}
