//! Blocked GPTQ and plain rounding.
//!
//! Columns are cut into fixed blocks that run in parallel; inside a block rows are rounded 32 at a
//! time, their errors passed on to the rest of the panel by a small product and to the rest of the
//! matrix by one product per panel. Only the choice of a group's maximum scale looks at all
//! blocks. Nothing depends on the number of threads.

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::layout::Layout;
use crate::linalg::Factor;
use crate::matrix::{Matrix, View, product_at};
use crate::quantized::{Quantized, Stats};
use crate::scales::{GroupBlock, GroupScales, code_range, scale_value, search};
use crate::wide::wide;
use crate::{Error, Result};

/// Columns per block.
const BLOCK: usize = 64;
/// Rows rounded before their errors are passed on by a product.
const STEP: usize = 32;
/// Rows whose errors reach the rest of the matrix in one product.
const PANEL: usize = 128;

/// Turns a weight matrix into codes and scales.
pub trait Quantizer {
    /// Quantizes `weight` (`[inputs, outputs]`, outputs a multiple of 32) with `layout`.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not belong together, [`Error::Numeric`] when a weight is
    /// not finite or too large for the format.
    fn quantize(&self, name: &str, weight: &Matrix, layout: &Layout) -> Result<Quantized>;
}

/// GPTQ with activation order: rounding errors are compensated by the rows that follow.
#[derive(Clone, Copy, Debug)]
pub struct Gptq<'a> {
    /// The factored Hessian of the layer's inputs.
    pub factor: &'a Factor,
}

/// Rounding to nearest with searched scales, for layers without calibration data.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn;

impl Quantizer for Gptq<'_> {
    fn quantize(&self, name: &str, weight: &Matrix, layout: &Layout) -> Result<Quantized> {
        run(name, weight, layout, self.factor)
    }
}

impl Quantizer for Rtn {
    fn quantize(&self, name: &str, weight: &Matrix, layout: &Layout) -> Result<Quantized> {
        let order: Vec<u32> = (0..weight.rows as u32).collect();
        run(name, weight, layout, &Factor::identity(&order)?)
    }
}

/// One block of columns on its way through the rows.
struct Block {
    first: usize,
    cols: usize,
    /// `[K, cols]` in packed order: not yet rounded rows with all compensation so far.
    w: Vec<f32>,
    codes: Vec<u8>,
    /// `[panel rows, cols]` errors over pivots.
    errors: Vec<f32>,
}

fn run(name: &str, weight: &Matrix, layout: &Layout, factor: &Factor) -> Result<Quantized> {
    check(name, weight, layout, factor)?;
    let mut blocks = split(weight, factor.order());
    let mut scales: Vec<GroupScales> = Vec::with_capacity(layout.groups().len());
    for panel in panels(layout) {
        for &(start, end, bits) in &panel {
            let found = group_scales(&blocks, (start, end), bits, factor);
            let panel_rows = (panel[0].0, panel[panel.len() - 1].1);
            blocks.par_iter_mut().for_each(|block| {
                let codes = &found.codes[block.first..][..block.cols];
                let scale: Vec<f32> = codes
                    .iter()
                    .map(|&c| scale_value(found.scale_max, c))
                    .collect();
                for step in (start..end).step_by(STEP) {
                    wide(
                        #[inline(always)]
                        || round_step(block, factor, (step, panel_rows.0), &scale, bits),
                    );
                    pass_on(
                        block,
                        factor,
                        (step, step + STEP),
                        panel_rows.0,
                        panel_rows.1,
                    );
                }
                if end == panel_rows.1 {
                    let last = factor.dim();
                    pass_on_from(block, factor, panel_rows, last);
                }
            });
            scales.push(found);
        }
    }
    Ok(assemble(weight, layout, factor, blocks, scales))
}

fn check(name: &str, weight: &Matrix, layout: &Layout, factor: &Factor) -> Result<()> {
    if factor.dim() != weight.rows {
        let what = format!("{name}: rows of the Hessian");
        return Err(Error::shape(what, weight.rows, factor.dim()));
    }
    check_weight(name, weight, layout)
}

/// Refuses what no rounding can work on.
pub(crate) fn check_weight(name: &str, weight: &Matrix, layout: &Layout) -> Result<()> {
    if layout.rows() != weight.rows {
        let what = format!("{name}: rows of the layout");
        return Err(Error::shape(what, weight.rows, layout.rows()));
    }
    if weight.cols == 0 || !weight.cols.is_multiple_of(32) {
        return Err(Error::shape(
            format!("{name}: columns"),
            "a multiple of 32",
            weight.cols,
        ));
    }
    if let Some((r, c)) = weight.non_finite() {
        return Err(Error::numeric(
            name,
            format!(
                "the weight of input {r}, output {c} is {}",
                weight.row(r)[c]
            ),
        ));
    }
    let largest = weight.data.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    if largest > 65504.0 {
        return Err(Error::numeric(
            name,
            format!("a weight of {largest:e} is beyond 16-bit floats, which the format decodes to"),
        ));
    }
    Ok(())
}

/// Whole groups of at most [`PANEL`] rows together (a larger group stands alone), as
/// (first row, end row, bits).
fn panels(layout: &Layout) -> Vec<Vec<(usize, usize, u8)>> {
    let mut out: Vec<Vec<(usize, usize, u8)>> = Vec::new();
    let (mut at, mut filled) = (0, usize::MAX);
    for g in layout.groups() {
        if filled.saturating_add(g.rows) > PANEL {
            out.push(Vec::new());
            filled = 0;
        }
        let last = out.len() - 1;
        out[last].push((at, at + g.rows, g.bits));
        filled += g.rows;
        at += g.rows;
    }
    out
}

fn split(weight: &Matrix, order: &[u32]) -> Vec<Block> {
    let starts: Vec<usize> = (0..weight.cols).step_by(BLOCK).collect();
    starts
        .par_iter()
        .map(|&first| {
            let cols = BLOCK.min(weight.cols - first);
            let mut w = Vec::with_capacity(weight.rows * cols);
            for &feature in order {
                w.extend_from_slice(&weight.row(feature as usize)[first..first + cols]);
            }
            Block {
                first,
                cols,
                w,
                codes: vec![0; weight.rows * cols],
                errors: Vec::new(),
            }
        })
        .collect()
}

fn group_scales(
    blocks: &[Block],
    (start, end): (usize, usize),
    bits: u8,
    factor: &Factor,
) -> GroupScales {
    // Only ratios matter. Squares of the pivots themselves may lie beyond f32, where inputs are
    // tiny; the largest weight is one, which keeps sums in range.
    let least = (start..end)
        .map(|r| factor.pivot(r))
        .fold(f32::INFINITY, f32::min);
    let weights: Vec<f32> = (start..end)
        .map(|r| (least / factor.pivot(r)).powi(2))
        .collect();
    let views: Vec<GroupBlock<'_>> = blocks
        .iter()
        .map(|b| GroupBlock {
            w: &b.w[start * b.cols..end * b.cols],
            cols: b.cols,
        })
        .collect();
    search(&views, bits, &weights)
}

/// Rounds the rows `step..step + STEP`, each error passed on to the later rows of the step.
#[inline(always)]
fn round_step(
    block: &mut Block,
    factor: &Factor,
    (step, panel): (usize, usize),
    scale: &[f32],
    bits: u8,
) {
    let cols = block.cols;
    let (lo, hi) = code_range(bits);
    block.errors.truncate((step - panel) * cols);
    let mut decoded = vec![0.0f32; cols];
    let mut narrow = vec![half::f16::ZERO; cols];
    let mut error = vec![0.0f32; cols];
    for r in step..step + STEP {
        let row = &block.w[r * cols..][..cols];
        let codes = &mut block.codes[r * cols..][..cols];
        for (((&w, &s), c), d) in row.iter().zip(scale).zip(codes).zip(&mut decoded) {
            let q = if s > 0.0 {
                (w / s).round_ties_even().clamp(lo, hi)
            } else {
                0.0
            };
            *c = (q - lo) as u8;
            *d = q * s;
        }
        narrow.convert_from_f32_slice(&decoded);
        narrow.convert_to_f32_slice(&mut decoded);
        let inverse = 1.0 / factor.pivot(r);
        for ((e, &w), &d) in error.iter_mut().zip(row).zip(&decoded) {
            *e = (w - d) * inverse;
        }
        block.errors.extend_from_slice(&error);
        if factor.is_identity() {
            continue;
        }
        let u = factor.row(r);
        for (later, &f) in (r + 1..step + STEP).zip(&u[r + 1..]) {
            for (w, &e) in block.w[later * cols..][..cols].iter_mut().zip(&error) {
                *w -= f * e;
            }
        }
    }
}

/// Passes the errors of the rows `from.0..from.1` of the panel starting at `panel` on to the rows
/// `from.1..end`.
fn pass_on(block: &mut Block, factor: &Factor, from: (usize, usize), panel: usize, end: usize) {
    if factor.is_identity() || from.1 >= end {
        return;
    }
    let (k, cols, rows) = (factor.dim(), block.cols, from.1 - from.0);
    let u = View::of(factor.upper(), k, (from.0, from.1), (rows, end - from.1));
    let e = View::of(&block.errors, cols, (from.0 - panel, 0), (rows, cols));
    product_at(&mut block.w[from.1 * cols..end * cols], u, e, -1.0, true);
}

/// Passes a whole panel's errors on to all rows after it.
fn pass_on_from(block: &mut Block, factor: &Factor, panel: (usize, usize), end: usize) {
    pass_on(block, factor, panel, panel.0, end);
    block.errors.clear();
}

fn assemble(
    weight: &Matrix,
    layout: &Layout,
    factor: &Factor,
    blocks: Vec<Block>,
    scales: Vec<GroupScales>,
) -> Quantized {
    let (k, n) = (weight.rows, weight.cols);
    let mut codes = vec![0u8; k * n];
    for block in &blocks {
        for r in 0..k {
            let from = &block.codes[r * block.cols..][..block.cols];
            codes[r * n + block.first..][..block.cols].copy_from_slice(from);
        }
    }
    let stats = Stats {
        underflows: scales.iter().filter(|s| s.underflow).count(),
        damping: factor.damping(),
        damping_retries: factor.retries(),
    };
    Quantized {
        inputs: k,
        outputs: n,
        layout: layout.clone(),
        order: factor.order().to_vec(),
        codes,
        scale_codes: scales
            .iter()
            .flat_map(|s| s.codes.iter().copied())
            .collect(),
        scale_max: scales.iter().map(|s| s.scale_max).collect(),
        stats,
    }
}

#[cfg(test)]
mod tests;
