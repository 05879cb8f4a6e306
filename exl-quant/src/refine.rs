//! Coordinate descent over the codes that GPTQ leaves.
//!
//! GPTQ settles every row before it sees the later ones. With all rows in place, each code is set
//! once more to what is best for its column given all others, scales unchanged. Every step lowers
//! the output error; after two rounds little is left to gain.

use rayon::prelude::*;

use crate::matrix::{Matrix, View, product};
use crate::quantized::Quantized;
use crate::scales::{code_range, scale_value};

/// Rounds over all rows.
const ROUNDS: usize = 2;
/// Columns that a thread works on at a time.
const BLOCK: usize = 64;
/// Matrices with more inputs stay as GPTQ rounds them: the work grows with the square of the
/// inputs, and the gain is least where they are many.
pub(crate) const MOST_INPUTS: usize = 8192;

/// A damped Hessian `[inputs, inputs]` in the order of the features.
#[derive(Clone, Copy, Debug)]
struct Damped<'a> {
    h: &'a [f32],
    /// Added to the diagonal.
    lambda: f32,
}

/// A block of columns.
struct Block {
    first: usize,
    cols: usize,
    /// `[inputs, cols]` in packed order.
    codes: Vec<u8>,
    /// `[inputs, cols]` by feature: the original less what the codes decode to.
    left: Vec<f32>,
    /// The damped Hessian times `left`.
    pull: Vec<f32>,
}

/// A row in packed order.
struct Row<'a> {
    /// Its place.
    at: usize,
    feature: usize,
    bits: u8,
    /// `[outputs]`.
    scales: &'a [f32],
}

/// Betters the codes of `q`, made of `weight` and decoding to `decoded`, against the Hessian `h` of
/// its inputs with `damping` times the mean diagonal added.
pub(crate) fn refine(
    q: &mut Quantized,
    (weight, decoded): (&Matrix, &Matrix),
    h: &[f32],
    damping: f64,
) {
    let (k, n) = (weight.rows, weight.cols);
    let mean = (0..k).map(|i| f64::from(h[i * k + i])).sum::<f64>() / k as f64;
    let h = Damped {
        h,
        lambda: (damping * mean) as f32,
    };
    let scales: Vec<Vec<f32>> = (0..q.layout.groups().len())
        .map(|g| {
            let codes = &q.scale_codes[g * n..][..n];
            codes
                .iter()
                .map(|&c| scale_value(q.scale_max[g], c))
                .collect()
        })
        .collect();
    let mut rows = Vec::with_capacity(k);
    for (group, scales) in q.layout.groups().iter().zip(&scales) {
        for _ in 0..group.rows {
            rows.push(Row {
                at: rows.len(),
                feature: q.order[rows.len()] as usize,
                bits: group.bits,
                scales,
            });
        }
    }
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    // Of a finished block only the codes stay in memory.
    let blocks: Vec<(usize, Vec<u8>)> = starts
        .into_par_iter()
        .map(|first| {
            let mut block = Block::new(q, (weight, decoded), first, h);
            for _ in 0..ROUNDS {
                for row in &rows {
                    block.settle(row, weight, h);
                }
            }
            (first, block.codes)
        })
        .collect();
    for (first, codes) in blocks {
        let cols = BLOCK.min(n - first);
        for r in 0..k {
            let from = &codes[r * cols..][..cols];
            q.codes[r * n + first..][..cols].copy_from_slice(from);
        }
    }
}

impl Block {
    fn new(
        q: &Quantized,
        (weight, decoded): (&Matrix, &Matrix),
        first: usize,
        h: Damped<'_>,
    ) -> Self {
        let (k, n) = (weight.rows, weight.cols);
        let cols = BLOCK.min(n - first);
        let mut left = Vec::with_capacity(k * cols);
        let mut codes = Vec::with_capacity(k * cols);
        for r in 0..k {
            let pairs = weight.row(r)[first..].iter().zip(&decoded.row(r)[first..]);
            left.extend(pairs.take(cols).map(|(w, d)| w - d));
            codes.extend_from_slice(&q.codes[r * n + first..][..cols]);
        }
        let mut pull = vec![0.0f32; k * cols];
        let whole = View::of(h.h, k, (0, 0), (k, k));
        let view = View::of(&left, cols, (0, 0), (k, cols));
        product(&mut pull, whole, view, 1.0, false);
        for (p, l) in pull.iter_mut().zip(&left) {
            *p += h.lambda * l;
        }
        Self {
            first,
            cols,
            codes,
            left,
            pull,
        }
    }

    /// Sets the codes of a row to the best, all others given.
    fn settle(&mut self, row: &Row<'_>, weight: &Matrix, h: Damped<'_>) {
        let (k, cols) = (weight.rows, self.cols);
        let curve = h.h[row.feature * k + row.feature] + h.lambda;
        if curve <= 0.0 {
            return;
        }
        let (lo, hi) = code_range(row.bits);
        let mut change = [0.0f32; BLOCK];
        let mut changed = false;
        let weights = &weight.row(row.feature)[self.first..][..cols];
        let scales = &row.scales[self.first..][..cols];
        let (at, by_feature) = (row.at * cols, row.feature * cols);
        for c in 0..cols {
            let scale = scales[c];
            if scale <= 0.0 {
                continue;
            }
            let left = self.left[by_feature + c];
            let best = weights[c] - left + self.pull[by_feature + c] / curve;
            let code = (best / scale).round_ties_even().clamp(lo, hi);
            let code_bits = (code - lo) as u8;
            if code_bits != self.codes[at + c] {
                let decoded = half::f16::from_f32(code * scale).to_f32();
                change[c] = weights[c] - decoded - left;
                self.codes[at + c] = code_bits;
                self.left[by_feature + c] = weights[c] - decoded;
                changed = true;
            }
        }
        if !changed {
            return;
        }
        let change = &change[..cols];
        let of_row = &h.h[row.feature * k..][..k];
        for (pull, &f) in self.pull.chunks_exact_mut(cols).zip(of_row) {
            for (p, &d) in pull.iter_mut().zip(change) {
                *p += f * d;
            }
        }
        for (p, &d) in self.pull[by_feature..][..cols].iter_mut().zip(change) {
            *p += h.lambda * d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, normal};
    use crate::{Factor, Gptq, HessianAccumulator, Layout, Part, Quantizer, activity_order};

    fn hessian(dim: usize) -> crate::Hessian {
        // Neighbours move together, as the features of a model do.
        let tokens = 8 * dim;
        let own = noise(3, tokens * dim);
        let mut x = own.clone();
        for (at, v) in x.iter_mut().enumerate() {
            *v += own[at / 4 * 4];
        }
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&x, Part::Train).unwrap();
        acc.finish("t").unwrap().all
    }

    fn better(q: &mut Quantized, weight: &Matrix, h: &[f32], damping: f64) {
        let decoded = q.dequantize();
        refine(q, (weight, &decoded), h, damping);
    }

    #[test]
    fn the_error_falls_and_no_single_code_can_be_bettered_by_much() {
        let (k, n) = (128, 96);
        let h = hessian(k);
        let weight = Matrix::new(k, n, normal(5, k * n, 0.05)).unwrap();
        let factor = Factor::new("t", &h, &activity_order(&h), 0.01).unwrap();
        for layout in ["4x3b_32g", "1x8b_32g/1x6b_32g/2x2b_32g"] {
            let layout: Layout = layout.parse().unwrap();
            let gptq = Gptq { factor: &factor };
            let mut q = gptq.quantize("t", &weight, &layout).unwrap();
            let error = |q: &Quantized| {
                let left = crate::measure::difference(&weight, &q.dequantize());
                h.loss(&left).unwrap()
            };
            let before = error(&q);
            let scales = (q.scale_codes.clone(), q.scale_max.clone());
            better(&mut q, &weight, h.data(), 0.0);
            let after = error(&q);
            assert!(after < 0.97 * before, "{layout}: {before} {after}");
            assert_eq!(scales, (q.scale_codes.clone(), q.scale_max.clone()));
            for (group, codes) in q.layout.groups().iter().zip(q.codes.chunks(32 * n)) {
                assert!(codes.iter().all(|&c| u32::from(c) < 1 << group.bits));
            }
            better(&mut q, &weight, h.data(), 0.0);
            let again = error(&q);
            assert!(again <= after && again > 0.97 * after, "{after} {again}");
        }
    }

    #[test]
    fn same_codes_for_any_number_of_threads() {
        let (k, n) = (64, 160);
        let h = hessian(k);
        let weight = Matrix::new(k, n, normal(6, k * n, 0.05)).unwrap();
        let factor = Factor::new("t", &h, &activity_order(&h), 0.01).unwrap();
        let layout = Layout::uniform(3, 32, k).unwrap();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut q = Gptq { factor: &factor }
                    .quantize("t", &weight, &layout)
                    .unwrap();
                better(&mut q, &weight, h.data(), 0.01);
                q
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn dead_inputs_and_zero_scales_stay_as_they_are() {
        let (k, n) = (32, 32);
        let h = vec![0.0f32; k * k];
        let weight = Matrix::zeros(k, n);
        let order: Vec<u32> = (0..k as u32).collect();
        let factor = Factor::identity(&order).unwrap();
        let layout = Layout::uniform(4, 32, k).unwrap();
        let mut q = Gptq { factor: &factor }
            .quantize("t", &weight, &layout)
            .unwrap();
        let before = q.clone();
        better(&mut q, &weight, &h, 0.01);
        assert_eq!(q, before);
    }
}
