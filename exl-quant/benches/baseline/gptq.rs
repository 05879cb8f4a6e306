//! GPTQ row by row, scales chosen when a group is reached.

use exl_quant::{Factor, Layout, Matrix, Quantized, Stats, scale_value};
use half::f16;

use crate::scales::{code_range, search};

/// Quantizes `weight` (`[inputs, outputs]`) in the order of `factor`.
pub(crate) fn quantize(weight: &Matrix, layout: &Layout, factor: &Factor) -> Quantized {
    let (k, n) = (weight.rows, weight.cols);
    let mut w = Vec::with_capacity(k * n);
    for &feature in factor.order() {
        w.extend_from_slice(weight.row(feature as usize));
    }
    let mut out = Quantized {
        inputs: k,
        outputs: n,
        layout: layout.clone(),
        order: factor.order().to_vec(),
        codes: vec![0; k * n],
        scale_codes: Vec::new(),
        scale_max: Vec::new(),
        stats: Stats::default(),
    };
    let mut start = 0;
    for group in layout.groups() {
        let rows = (start, start + group.rows);
        let scales = search(&w[rows.0 * n..rows.1 * n], n, group.bits);
        let values = scales.codes.iter().map(|&c| scale_value(scales.maximum, c));
        let group = Group {
            rows,
            bits: group.bits,
            scales: values.collect(),
        };
        round(&group, factor, &mut w, &mut out.codes);
        out.scale_codes.extend(scales.codes);
        out.scale_max.push(scales.maximum);
        start = rows.1;
    }
    out
}

/// Rows `rows.0..rows.1` in packed order with their scale in each column.
struct Group {
    rows: (usize, usize),
    bits: u8,
    scales: Vec<f32>,
}

/// Rounds a group's rows and makes up for their errors in all rows after them.
fn round(group: &Group, factor: &Factor, w: &mut [f32], codes: &mut [u8]) {
    let (k, n, (start, end)) = (factor.dim(), group.scales.len(), group.rows);
    let upper = factor.upper();
    let mut errors = vec![0.0f32; (end - start) * n];
    for r in start..end {
        let (done, later) = w.split_at_mut((r + 1) * n);
        let error = &mut errors[(r - start) * n..][..n];
        let pivot = upper[r * k + r];
        round_row(group, &done[r * n..], &mut codes[r * n..][..n], error);
        error.iter_mut().for_each(|e| *e /= pivot);
        for (i, row) in later.chunks_exact_mut(n).take(end - r - 1).enumerate() {
            subtract(row, upper[r * k + r + 1 + i], error);
        }
    }
    for (i, row) in w[end * n..].chunks_exact_mut(n).enumerate() {
        for (r, error) in (start..end).zip(errors.chunks_exact(n)) {
            subtract(row, upper[r * k + end + i], error);
        }
    }
}

/// Codes of a row, and the weights less what they decode to.
fn round_row(group: &Group, row: &[f32], codes: &mut [u8], error: &mut [f32]) {
    let (lo, hi) = code_range(group.bits);
    let columns = row.iter().zip(&group.scales);
    for ((&w, &scale), (code, e)) in columns.zip(codes.iter_mut().zip(error)) {
        // A scale that fell to zero decodes to zero, whatever the code.
        let q = match scale > 0.0 {
            true => (w / scale).round_ties_even().clamp(lo, hi),
            false => 0.0,
        };
        *code = (q - lo) as u8;
        *e = w - f16::from_f32(q * scale).to_f32();
    }
}

fn subtract(row: &mut [f32], factor: f32, error: &[f32]) {
    for (w, e) in row.iter_mut().zip(error) {
        *w -= factor * e;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_quant::{Hessian, Quantizer, Recipe, Rtn, activity_order};

    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let value = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        (0..count).map(value).collect()
    }

    /// Correlated inputs of very different size.
    fn hessian(k: usize) -> Hessian {
        let x = noise(400 * k, 3);
        let mut h = vec![0.0f32; k * k];
        for token in x.chunks_exact(k) {
            let common = token[0];
            let value = |i: usize| (token[i] + common) * (1.0 + 8.0 / (1 + i % 37) as f32);
            for i in 0..k {
                for j in 0..k {
                    h[i * k + j] += value(i) * value(j) / 400.0;
                }
            }
        }
        Hessian::from_full(k, h, 400).unwrap()
    }

    fn loss(hessian: &Hessian, weight: &Matrix, quantized: &Quantized) -> f64 {
        let decoded = quantized.dequantize();
        let differences = weight.data.iter().zip(&decoded.data).map(|(a, b)| a - b);
        let differences = Matrix::new(weight.rows, weight.cols, differences.collect()).unwrap();
        hessian.loss(&differences).unwrap()
    }

    #[test]
    fn compensation_beats_rounding() {
        let (k, n) = (160, 64);
        let h = hessian(k);
        let weight = Matrix::new(k, n, noise(k * n, 5)).unwrap();
        let order = activity_order(&h);
        let factor = Factor::new("w", &h, &order, crate::DAMPING).unwrap();
        let recipe: Recipe = "0.1:4b_64g/0.9:3b_64g".parse().unwrap();
        let layout = recipe.whole_groups(k).unwrap();
        assert_eq!(layout.to_string(), "1x4b_64g/1x3b_64g/1x3b_32g");
        let ours = loss(&h, &weight, &quantize(&weight, &layout, &factor));
        let plain = Rtn.quantize("w", &weight, &layout).unwrap();
        let plain = loss(&h, &weight, &plain);
        assert!(ours < 0.7 * plain, "{ours} {plain}");
    }

    #[test]
    fn nothing_is_passed_on_without_correlation() {
        let (k, n) = (64, 32);
        let mut h = vec![0.0f32; k * k];
        (0..k).for_each(|i| h[i * k + i] = (k - i) as f32);
        let h = Hessian::from_full(k, h, 1).unwrap();
        let weight = Matrix::new(k, n, noise(k * n, 9)).unwrap();
        let order: Vec<u32> = (0..k as u32).collect();
        let factor = Factor::new("w", &h, &order, crate::DAMPING).unwrap();
        let layout = Layout::uniform(8, 32, k).unwrap();
        let decoded = quantize(&weight, &layout, &factor).dequantize();
        for (a, b) in weight.data.iter().zip(&decoded.data) {
            // Half a step of the widest column at 8 bits, and the roundings to 16 bits.
            assert!((a - b).abs() < 3e-3, "{a} {b}");
        }
    }
}
