//! Choosing the scales of one group: a maximum shared by all columns and a 4-bit code per column.
//!
//! The format stores `scale = rn16(s^2 h)` with `s` in 1..=16 and `h = rn16(q_scale_max / 256)`.
//! The search is joint and on the format's own grid: for every column the loss is tabulated over a
//! range of scales, every `h` worth trying is judged from the tables with each column at its best
//! code, and the best few are evaluated exactly. The loss of row `r` weighs `1 / U[r][r]^2`, which
//! is what GPTQ pays for an error there.

use half::f16;
use rayon::prelude::*;

use crate::wide::wide;

/// Tabulated scales per column.
const GRID: usize = 20;
/// Values of `h` judged from the tables.
const MAXIMA: usize = 48;
/// Values of `h` evaluated exactly.
const FINALISTS: usize = 3;
/// Adding and subtracting this rounds an f32 below 2^22 to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// Smallest and largest `h`: one step of the subnormal grid, and what 256 h can hold.
const H_MIN: f32 = 1.0 / 16_777_216.0;
const H_MAX: f32 = 255.875;

/// The effective scale of a column as every decoder computes it: two roundings, in this order.
pub fn scale_value(scale_max: u16, code: u8) -> f32 {
    let h = f16::from_f32(f16::from_bits(scale_max).to_f32() / 256.0).to_f32();
    let s = f32::from(code) + 1.0;
    f16::from_f32(s * s * h).to_f32()
}

/// Scales of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupScales {
    /// Bits of the binary16 maximum.
    pub(crate) scale_max: u16,
    /// One code per column, 0..=15.
    pub(crate) codes: Vec<u8>,
    /// The wanted maximum lay below the smallest that survives.
    pub(crate) underflow: bool,
}

/// The rows of one group in one block of columns, `[rows, cols]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupBlock<'a> {
    pub(crate) w: &'a [f32],
    pub(crate) cols: usize,
}

/// Loss of each column over the tabulated scales.
struct Table {
    /// Scale at which the largest weight just fits.
    beta: Vec<f32>,
    /// `[GRID, cols]`.
    loss: Vec<f32>,
    /// Loss with everything rounded to zero.
    total: Vec<f32>,
    /// Best tabulated scale.
    best: Vec<f32>,
}

/// Largest and smallest signed code.
pub(crate) fn code_range(bits: u8) -> (f32, f32) {
    let half = (1u32 << (bits - 1)) as f32;
    (-half, half - 1.0)
}

/// Tabulated range as fractions of the scale that just fits, per width: at few bits the best scale
/// clips the tails, at many it does not.
fn range(bits: u8) -> (f32, f32) {
    match bits {
        2 => (0.30, 1.15),
        3 => (0.42, 1.15),
        4 => (0.52, 1.12),
        5 => (0.64, 1.10),
        6 => (0.74, 1.08),
        _ => (0.86, 1.05),
    }
}

fn ratio(bits: u8, j: usize) -> f32 {
    let (lo, hi) = range(bits);
    lo * (hi / lo).powf(j as f32 / (GRID - 1) as f32)
}

/// Finds the scales of a group given as blocks of columns; `weights[r]` is the loss of a unit
/// squared error in row `r`.
pub(crate) fn search(blocks: &[GroupBlock<'_>], bits: u8, weights: &[f32]) -> GroupScales {
    let tables: Vec<Table> = blocks
        .par_iter()
        .map(|block| {
            wide(
                #[inline(always)]
                || tabulate(block, bits, weights),
            )
        })
        .collect();
    let columns: usize = blocks.iter().map(|b| b.cols).sum();
    let widest = tables
        .iter()
        .flat_map(|t| &t.best)
        .fold(0.0f32, |a, &b| a.max(b));
    if widest <= 0.0 {
        let scale_max = f16::from_f32(H_MIN * 256.0).to_bits();
        return GroupScales {
            scale_max,
            codes: vec![0; columns],
            underflow: false,
        };
    }
    let maxima = candidates(widest / 256.0);
    let judged: Vec<Vec<f64>> = tables
        .par_iter()
        .map(|t| {
            wide(
                #[inline(always)]
                || judge(t, bits, &maxima),
            )
        })
        .collect();
    let mut ranking: Vec<(f64, usize)> = (0..maxima.len())
        .map(|i| (judged.iter().map(|j| j[i]).sum(), i))
        .collect();
    ranking.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    ranking.truncate(FINALISTS);
    let finals: Vec<f32> = ranking.iter().map(|&(_, i)| maxima[i]).collect();
    let exact: Vec<Vec<(f64, Vec<u8>)>> = blocks
        .par_iter()
        .zip(&tables)
        .map(|(block, table)| {
            finals
                .iter()
                .map(|&h| {
                    wide(
                        #[inline(always)]
                        || best_codes(block, table, bits, weights, h),
                    )
                })
                .collect()
        })
        .collect();
    let loss = |i: usize| exact.iter().map(|e| e[i].0).sum::<f64>();
    let winner = (0..finals.len())
        .min_by(|&a, &b| loss(a).total_cmp(&loss(b)).then(a.cmp(&b)))
        .expect("there is at least one finalist");
    GroupScales {
        scale_max: f16::from_f32(finals[winner] * 256.0).to_bits(),
        codes: exact
            .into_iter()
            .flat_map(|mut e| e.swap_remove(winner).1)
            .collect(),
        underflow: widest / 256.0 < H_MIN,
    }
}

/// Values of `h` on the binary16 grid around the one that gives the widest column the code 16.
fn candidates(h: f32) -> Vec<f32> {
    let (lo, hi) = (0.45f32, 1.7f32);
    let mut list: Vec<f32> = (0..MAXIMA)
        .map(|i| h * lo * (hi / lo).powf(i as f32 / (MAXIMA - 1) as f32))
        .map(|x| f16::from_f32(x.clamp(H_MIN, H_MAX)).to_f32())
        .collect();
    list.dedup();
    list
}

#[inline(always)]
fn tabulate(block: &GroupBlock<'_>, bits: u8, weights: &[f32]) -> Table {
    let cols = block.cols;
    let mut beta = vec![0.0f32; cols];
    let mut total = vec![0.0f32; cols];
    for (row, &weight) in block.w.chunks_exact(cols).zip(weights) {
        for ((b, t), &w) in beta.iter_mut().zip(&mut total).zip(row) {
            *b = b.max(w.abs());
            *t += weight * w * w;
        }
    }
    let span = ((1u32 << bits) - 1) as f32 / 2.0;
    beta.iter_mut().for_each(|b| *b /= span);
    let mut loss = vec![0.0f32; GRID * cols];
    let mut scale = vec![0.0f32; cols];
    for (j, out) in loss.chunks_exact_mut(cols).enumerate() {
        let f = ratio(bits, j);
        for (s, &b) in scale.iter_mut().zip(&beta) {
            *s = b * f;
        }
        column_losses(block, bits, weights, &scale, out);
    }
    let best = (0..cols)
        .map(|n| {
            let j = (0..GRID)
                .min_by(|&a, &b| loss[a * cols + n].total_cmp(&loss[b * cols + n]))
                .expect("the grid is not empty");
            beta[n] * ratio(bits, j)
        })
        .collect();
    Table {
        beta,
        loss,
        total,
        best,
    }
}

/// Weighted squared rounding error of every column at the given scales.
#[inline(always)]
fn column_losses(
    block: &GroupBlock<'_>,
    bits: u8,
    weights: &[f32],
    scale: &[f32],
    out: &mut [f32],
) {
    let (lo, hi) = code_range(bits);
    let inverse: Vec<f32> = scale
        .iter()
        .map(|&s| if s > 0.0 { 1.0 / s } else { 0.0 })
        .collect();
    out.fill(0.0);
    for (row, &weight) in block.w.chunks_exact(block.cols).zip(weights) {
        for (((o, &w), &s), &i) in out.iter_mut().zip(row).zip(scale).zip(&inverse) {
            let q = (w * i + ROUND) - ROUND;
            let q = if q < lo { lo } else { q };
            let q = if q > hi { hi } else { q };
            let e = w - q * s;
            *o += weight * e * e;
        }
    }
}

/// Sum over columns of the loss from the tables, for each `h`.
#[inline(always)]
fn judge(table: &Table, bits: u8, maxima: &[f32]) -> Vec<f64> {
    let cols = table.beta.len();
    let (lo, hi) = range(bits);
    let per_ln = (GRID - 1) as f32 / (hi / lo).ln();
    let squares: Vec<f32> = (0..=16).map(|s| 2.0 * (s as f32).max(1e-3).ln()).collect();
    let logarithms: Vec<f32> = maxima.iter().map(|h| h.ln()).collect();
    let mut sums = vec![0.0f64; maxima.len()];
    for n in 0..cols {
        let beta = table.beta[n];
        if beta <= 0.0 {
            continue;
        }
        let origin = (beta * lo).ln();
        let ends = (
            table.loss[n],
            table.loss[(GRID - 1) * cols + n],
            table.total[n],
        );
        let lookup = |ln_scale: f32| {
            let p = (ln_scale - origin) * per_ln;
            if p <= 0.0 {
                // Below the table clipping grows towards losing everything.
                ends.0 + (ends.2 - ends.0).max(0.0) * (-p / per_ln).min(1.0)
            } else if p >= (GRID - 1) as f32 {
                // Above it rounding error grows with the square of the scale.
                ends.1 * (2.0 * (p / per_ln - (hi / lo).ln())).exp()
            } else {
                let j = p as usize;
                let f = p - j as f32;
                table.loss[j * cols + n] * (1.0 - f) + table.loss[(j + 1) * cols + n] * f
            }
        };
        for ((sum, &h), &ln_h) in sums.iter_mut().zip(maxima).zip(&logarithms) {
            let s = (table.best[n] / h).sqrt().clamp(1.0, 16.0);
            let a = s as usize;
            let b = a + usize::from(s > a as f32);
            let loss = lookup(squares[a] + ln_h).min(lookup(squares[b] + ln_h));
            *sum += f64::from(loss);
        }
    }
    sums
}

/// The exact best code of every column for one `h`, and the loss it leaves.
#[inline(always)]
fn best_codes(
    block: &GroupBlock<'_>,
    table: &Table,
    bits: u8,
    weights: &[f32],
    h: f32,
) -> (f64, Vec<u8>) {
    let cols = block.cols;
    let scale_max = f16::from_f32(h * 256.0).to_bits();
    let base: Vec<i32> = table
        .best
        .iter()
        .map(|&t| (t / h).sqrt().floor().clamp(1.0, 16.0) as i32)
        .collect();
    let mut best = vec![f32::INFINITY; cols];
    let mut codes = vec![0u8; cols];
    let mut scale = vec![0.0f32; cols];
    let mut loss = vec![0.0f32; cols];
    let values: Vec<f32> = (0..16).map(|c| scale_value(scale_max, c)).collect();
    for offset in [0, 1, -1, 2] {
        for (s, &b) in scale.iter_mut().zip(&base) {
            *s = values[((b + offset).clamp(1, 16) - 1) as usize];
        }
        column_losses(block, bits, weights, &scale, &mut loss);
        for n in 0..cols {
            if loss[n] < best[n] {
                best[n] = loss[n];
                codes[n] = ((base[n] + offset).clamp(1, 16) - 1) as u8;
            }
        }
    }
    // A column of zeros decodes to zeros at any scale; code 0 is what padding carries.
    for (code, &t) in codes.iter_mut().zip(&table.best) {
        if t <= 0.0 {
            *code = 0;
        }
    }
    (best.iter().map(|&x| f64::from(x)).sum(), codes)
}

#[cfg(test)]
mod tests;
