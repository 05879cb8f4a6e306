//! The quantizer's ops in f64: one row after the other, no blocks.

use half::f16;

use super::{floats, index};
use crate::Result;
use crate::ops::gptq::{FINALISTS, GRID, MAXIMA_RANGE, maxima, panels, range, ratios};
use crate::ops::{Gptq, HessianFactor, HessianLoss, Refine};

/// Smallest and largest `h` of the format's grid.
const H_MIN: f64 = 1.0 / 16_777_216.0;
const H_MAX: f64 = 255.875;

pub(super) fn hessian_factor(op: &mut HessianFactor<'_>) -> Result<()> {
    let (h, order, k) = (floats(&op.h)?, op.order.slice::<i32>()?, op.dim);
    let feature = |i: usize| index(order, k - 1 - i, k, "hessian_factor.order");
    // A = J (P h P^T + lambda I) J = L L^T, and U = J L^-1 J.
    let mut a = vec![0.0; k * k];
    for i in 0..k {
        for j in 0..=i {
            a[i * k + j] = h[feature(i)? * k + feature(j)?] * op.scale;
        }
        a[i * k + i] += op.lambda;
    }
    let mut positive = true;
    for i in 0..k {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|t| a[i * k + t] * a[j * k + t]).sum();
            let rest = a[i * k + j] - dot;
            if i == j {
                positive &= rest > 0.0 && rest.is_finite();
                a[i * k + i] = rest.sqrt();
            } else {
                a[i * k + j] = rest / a[j * k + j];
            }
        }
    }
    let mut inverse = vec![0.0; k * k];
    for j in 0..k {
        for i in j..k {
            let dot: f64 = (j..i).map(|t| a[i * k + t] * inverse[t * k + j]).sum();
            let unit = if i == j { 1.0 } else { 0.0 };
            inverse[i * k + j] = (unit - dot) / a[i * k + i];
        }
    }
    op.status.slice_mut::<i32>()?[0] = i32::from(positive);
    let upper = op.upper.slice_mut::<f32>()?;
    for r in 0..k {
        for c in 0..k {
            let value = inverse[(k - 1 - r) * k + k - 1 - c];
            upper[r * k + c] = if c < r { 0.0 } else { value as f32 };
        }
    }
    Ok(())
}

pub(super) fn hessian_loss(op: &mut HessianLoss<'_>) -> Result<()> {
    let (h, mut d) = (floats(&op.h)?, floats(&op.a)?);
    if let Some(b) = &op.b {
        d.iter_mut().zip(floats(b)?).for_each(|(x, y)| *x -= y);
    }
    let (k, n) = (op.dim, op.columns);
    let mut sum = 0.0;
    for c in 0..n {
        for i in 0..k {
            let dot: f64 = (0..k).map(|j| h[i * k + j] * d[j * n + c]).sum();
            sum += d[i * n + c] * dot;
        }
    }
    op.out.slice_mut::<f32>()?[0] = (op.scale * sum) as f32;
    Ok(())
}

pub(super) fn gptq(op: &mut Gptq<'_>) -> Result<()> {
    let (weight, u) = (floats(&op.weight)?, floats(&op.upper)?);
    let (k, n) = (op.inputs, op.outputs);
    let order = op.order.slice::<i32>()?;
    let features = (0..k).map(|r| index(order, r, k, "gptq.order"));
    let features: Vec<usize> = features.collect::<Result<_>>()?;
    let rows = features.iter().flat_map(|&f| &weight[f * n..][..n]);
    let mut w: Vec<f64> = rows.copied().collect();
    let groups: Vec<(usize, usize, u8)> = panels(op.groups).concat();
    for (g, &(first, end, bits)) in groups.iter().enumerate() {
        let costs: Vec<f64> = (first..end).map(|r| u[r * k + r].powi(-2)).collect();
        let found = Group::new(&w[first * n..end * n], n, bits, &costs).search();
        let h = f64::from(f16::from_bits(found.scale_max)) / 256.0;
        let scales: Vec<f64> = found.codes.iter().map(|&s| scale_value(h, s)).collect();
        op.scale_codes.slice_mut::<u8>()?[g * n..][..n].copy_from_slice(&found.codes);
        op.scale_max.slice_mut::<i32>()?[g] =
            i32::from(found.scale_max) | i32::from(found.underflow) << 16;
        let (lo, hi) = code_range(bits);
        for r in first..end {
            for c in 0..n {
                let q = match scales[c] > 0.0 {
                    true => (w[r * n + c] / scales[c]).round_ties_even().clamp(lo, hi),
                    false => 0.0,
                };
                let decoded = rounded(q * scales[c]);
                op.codes.slice_mut::<u8>()?[r * n + c] = (q - lo) as u8;
                op.decoded.slice_mut::<f32>()?[features[r] * n + c] = decoded as f32;
                let error = (w[r * n + c] - decoded) / u[r * k + r];
                for later in r + 1..k {
                    w[later * n + c] -= u[r * k + later] * error;
                }
            }
        }
    }
    Ok(())
}

pub(super) fn refine(op: &mut Refine<'_>) -> Result<()> {
    let (weight, h, old) = (floats(&op.weight)?, floats(&op.h)?, floats(&op.decoded)?);
    let (k, n) = (op.inputs, op.outputs);
    let order = op.order.slice::<i32>()?;
    let features = (0..k).map(|r| index(order, r, k, "refine.order"));
    let features: Vec<usize> = features.collect::<Result<_>>()?;
    // D, and the group and width of every row.
    let mut left: Vec<f64> = weight.iter().zip(&old).map(|(w, d)| w - d).collect();
    let groups: Vec<(usize, u8)> = op
        .groups
        .iter()
        .enumerate()
        .flat_map(|(g, group)| std::iter::repeat_n((g, group.bits), group.rows))
        .collect();
    let (scale_codes, maxima) = (op.scale_codes.slice::<u8>()?, op.scale_max.slice::<i32>()?);
    let codes = op.new_codes.slice_mut::<u8>()?;
    codes.copy_from_slice(op.codes.slice::<u8>()?);
    let decoded = op.new_decoded.slice_mut::<f32>()?;
    decoded.copy_from_slice(op.decoded.slice::<f32>()?);
    for r in (0..op.rounds).flat_map(|_| 0..k) {
        let (g, bits) = groups[r];
        let (lo, hi) = code_range(bits);
        let largest = f64::from(f16::from_bits(maxima[g] as u16)) / 256.0;
        let row = features[r];
        let curve = h[row * k + row] * op.scale + op.lambda;
        for c in 0..n {
            let scale = scale_value(largest, scale_codes[g * n + c]);
            if curve <= 0.0 || scale <= 0.0 {
                continue;
            }
            let dot: f64 = (0..k).map(|j| h[row * k + j] * left[j * n + c]).sum();
            let at = row * n + c;
            let pull = dot * op.scale + op.lambda * left[at];
            let best = f64::from(decoded[at]) + pull / curve;
            let q = (best / scale).round_ties_even().clamp(lo, hi);
            codes[r * n + c] = (q - lo) as u8;
            decoded[at] = rounded(q * scale) as f32;
            left[at] = weight[at] - f64::from(decoded[at]);
        }
    }
    Ok(())
}

fn rounded(x: f64) -> f64 {
    f16::from_f64(x).to_f64()
}

/// The scale every decoder computes.
fn scale_value(h: f64, code: u8) -> f64 {
    let s = f64::from(code) + 1.0;
    rounded(s * s * rounded(h))
}

/// Largest and smallest signed code.
fn code_range(bits: u8) -> (f64, f64) {
    let half = f64::from(1u32 << (bits - 1));
    (-half, half - 1.0)
}

/// Scales of one group.
struct Found {
    scale_max: u16,
    codes: Vec<u8>,
    underflow: bool,
}

/// The rows of a group and what their columns lose at the tabulated scales.
struct Group<'a> {
    w: &'a [f64],
    n: usize,
    bits: u8,
    /// Of each row, relative to the largest.
    costs: Vec<f64>,
    /// Scale at which the largest weight of a column just fits.
    beta: Vec<f64>,
    /// `[GRID, n]`.
    table: Vec<f64>,
    /// Loss with everything rounded to zero.
    total: Vec<f64>,
    /// Best tabulated scale.
    best: Vec<f64>,
}

impl<'a> Group<'a> {
    fn new(w: &'a [f64], n: usize, bits: u8, costs: &[f64]) -> Self {
        let top = costs.iter().copied().fold(0.0, f64::max);
        let span = f64::from((1u32 << bits) - 1) / 2.0;
        let mut group = Self {
            w,
            n,
            bits,
            costs: costs.iter().map(|c| c / top).collect(),
            beta: vec![0.0; n],
            table: vec![0.0; GRID * n],
            total: vec![0.0; n],
            best: vec![0.0; n],
        };
        for c in 0..n {
            let column = w.iter().skip(c).step_by(n);
            group.beta[c] = column.fold(0.0, |m: f64, x| m.max(x.abs())) / span;
            group.total[c] = group.loss(c, 0.0);
            let mut least = f64::INFINITY;
            for (j, &ratio) in ratios(bits).iter().enumerate() {
                let scale = group.beta[c] * f64::from(ratio);
                let loss = group.loss(c, scale);
                group.table[j * n + c] = loss;
                if loss < least {
                    least = loss;
                    group.best[c] = scale;
                }
            }
        }
        group
    }

    /// Weighted squared rounding error of a column at a scale.
    fn loss(&self, column: usize, scale: f64) -> f64 {
        let (lo, hi) = code_range(self.bits);
        let column = self.w.iter().skip(column).step_by(self.n);
        let terms = column.zip(&self.costs).map(|(w, cost)| {
            let q = match scale > 0.0 {
                true => (w / scale).round_ties_even().clamp(lo, hi),
                false => 0.0,
            };
            cost * (w - q * scale).powi(2)
        });
        terms.sum()
    }

    fn search(&self) -> Found {
        let widest = self.best.iter().copied().fold(0.0, f64::max);
        if widest <= 0.0 {
            return Found {
                scale_max: f16::from_f64(H_MIN * 256.0).to_bits(),
                codes: vec![0; self.n],
                underflow: false,
            };
        }
        let mut ranking: Vec<(f64, f64)> = candidates(widest / 256.0)
            .into_iter()
            .map(|h| ((0..self.n).map(|c| self.judge(c, h)).sum(), h))
            .collect();
        // Stable: equal ones keep their order.
        ranking.sort_by(|a, b| a.0.total_cmp(&b.0));
        ranking.truncate(FINALISTS);
        let mut least = f64::INFINITY;
        let mut found = Found {
            scale_max: 0,
            codes: Vec::new(),
            underflow: widest / 256.0 < H_MIN,
        };
        for &(_, h) in &ranking {
            let best: Vec<(f64, u8)> = (0..self.n).map(|c| self.best_code(c, h)).collect();
            let loss = best.iter().map(|b| b.0).sum();
            if loss < least {
                least = loss;
                found.scale_max = f16::from_f64(h * 256.0).to_bits();
                found.codes = best.iter().map(|b| b.1).collect();
            }
        }
        found
    }

    /// Loss of a column at the better of the two codes around its best scale, from the table.
    fn judge(&self, c: usize, h: f64) -> f64 {
        if self.beta[c] <= 0.0 {
            return 0.0;
        }
        let s = (self.best[c] / h).sqrt().clamp(1.0, 16.0);
        let at = |s: f64| self.lookup(c, s * s * h);
        at(s.floor()).min(at(s.ceil()))
    }

    fn lookup(&self, c: usize, scale: f64) -> f64 {
        let (lo, hi) = range(self.bits);
        let (lo, hi) = (f64::from(lo), f64::from(hi));
        let per_ln = (GRID - 1) as f64 / (hi / lo).ln();
        let p = (scale / (self.beta[c] * lo)).ln() * per_ln;
        let (first, last) = (self.table[c], self.table[(GRID - 1) * self.n + c]);
        if p <= 0.0 {
            // Below the table clipping grows towards losing everything.
            first + (self.total[c] - first).max(0.0) * (-p / per_ln).min(1.0)
        } else if p >= (GRID - 1) as f64 {
            // Above it rounding error grows with the square of the scale.
            last * (2.0 * (p / per_ln - (hi / lo).ln())).exp()
        } else {
            let (j, f) = (p as usize, p.fract());
            let at = |j: usize| self.table[j * self.n + c];
            at(j) * (1.0 - f) + at(j + 1) * f
        }
    }

    /// The exact best code of a column for one `h`, and the loss it leaves.
    fn best_code(&self, c: usize, h: f64) -> (f64, u8) {
        let stored = f64::from(f16::from_f64(h * 256.0)) / 256.0;
        let base = (self.best[c] / h).sqrt().floor().clamp(1.0, 16.0) as i32;
        let mut best = (f64::INFINITY, 0);
        for offset in [0, 1, -1, 2] {
            let code = ((base + offset).clamp(1, 16) - 1) as u8;
            let loss = self.loss(c, scale_value(stored, code));
            if loss < best.0 {
                best = (loss, code);
            }
        }
        // A column of zeros decodes to zeros at any scale; code 0 is what padding carries.
        if self.best[c] <= 0.0 {
            best.1 = 0;
        }
        best
    }
}

/// Values of `h` on the binary16 grid around the one that gives the widest column the code 16.
fn candidates(h: f64) -> Vec<f64> {
    let start = h * f64::from(MAXIMA_RANGE.0);
    let mut list: Vec<f64> = maxima()
        .iter()
        .map(|&f| rounded((start * f64::from(f)).clamp(H_MIN, H_MAX)))
        .collect();
    list.dedup();
    list
}
