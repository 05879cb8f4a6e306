//! Coordinate descent over the codes that GPTQ leaves.
//!
//! GPTQ settles every row before it sees the later ones. With all rows in place, each code is set
//! once more to what is best for its column given all others, scales unchanged. Every step lowers
//! the output error; after two rounds little is left to gain.

use rayon::prelude::*;

use crate::matrix::{Matrix, View, product};
use crate::quantized::Quantized;
use crate::scales::{code_range, scale_value};
use crate::wide::wide;

/// Rounds over all rows.
pub(crate) const ROUNDS: usize = 2;
/// Columns that a thread works on at a time.
const BLOCK: usize = 64;
/// On the CPU, matrices with more inputs stay as GPTQ rounds them: the work grows with the square of
/// the inputs, and the gain is least where they are many.
pub(crate) const MOST_INPUTS: usize = 8192;

/// Rows whose changes reach all others in one product.
const STEP: usize = 32;

/// A block of columns; rows in packed order.
struct Block {
    first: usize,
    cols: usize,
    /// `[inputs, cols]`.
    codes: Vec<u8>,
    /// `[inputs, cols]`: the original less what the codes decode to.
    left: Vec<f32>,
    /// The damped Hessian times `left`.
    pull: Vec<f32>,
    /// `[STEP, cols]`: what the rows of a step add to `left`.
    change: Vec<f32>,
}

/// What all blocks share.
struct Problem<'a> {
    weight: &'a Matrix,
    /// The damped Hessian in packed order, `[inputs, inputs]`.
    h: Vec<f32>,
    order: &'a [u32],
    /// Width and scales (`[outputs]`) of every row.
    rows: Vec<(u8, &'a [f32])>,
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
    let scales: Vec<Vec<f32>> = (0..q.layout.groups().len())
        .map(|g| {
            let codes = &q.scale_codes[g * n..][..n];
            codes
                .iter()
                .map(|&c| scale_value(q.scale_max[g], c))
                .collect()
        })
        .collect();
    let groups = q.layout.groups().iter().zip(&scales);
    let problem = Problem {
        weight,
        h: in_order(h, &q.order, damping),
        order: &q.order,
        rows: groups
            .flat_map(|(group, scales)| std::iter::repeat_n((group.bits, &scales[..]), group.rows))
            .collect(),
    };
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    // Of a finished block only the codes stay in memory.
    let blocks: Vec<(usize, Vec<u8>)> = starts
        .into_par_iter()
        .map(|first| {
            let mut block = Block::new(&problem, (q, decoded), first);
            for _ in 0..ROUNDS {
                for step in (0..k).step_by(STEP) {
                    wide(
                        #[inline(always)]
                        || block.settle(&problem, step),
                    );
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

/// The damped Hessian with rows and columns in packed order.
fn in_order(h: &[f32], order: &[u32], damping: f64) -> Vec<f32> {
    let k = order.len();
    let mean = (0..k).map(|i| f64::from(h[i * k + i])).sum::<f64>() / k as f64;
    let lambda = (damping * mean) as f32;
    let mut out = vec![0.0; k * k];
    out.par_chunks_exact_mut(k)
        .enumerate()
        .for_each(|(r, row)| {
            let from = &h[order[r] as usize * k..][..k];
            for (to, &feature) in row.iter_mut().zip(order) {
                *to = from[feature as usize];
            }
            row[r] += lambda;
        });
    out
}

impl Block {
    fn new(problem: &Problem<'_>, (q, decoded): (&Quantized, &Matrix), first: usize) -> Self {
        let (k, n) = (problem.weight.rows, problem.weight.cols);
        let cols = BLOCK.min(n - first);
        let mut left = Vec::with_capacity(k * cols);
        let mut codes = Vec::with_capacity(k * cols);
        for (r, &feature) in problem.order.iter().enumerate() {
            let row = |m: &Matrix, c: usize| m.row(feature as usize)[first + c];
            left.extend((0..cols).map(|c| row(problem.weight, c) - row(decoded, c)));
            codes.extend_from_slice(&q.codes[r * n + first..][..cols]);
        }
        let mut pull = vec![0.0f32; k * cols];
        let whole = View::of(&problem.h, k, (0, 0), (k, k));
        let view = View::of(&left, cols, (0, 0), (k, cols));
        product(&mut pull, whole, view, 1.0, false);
        Self {
            first,
            cols,
            codes,
            left,
            pull,
            change: vec![0.0; STEP * cols],
        }
    }

    /// Sets the codes of the rows from `step` on to the best, row after row, all others given.
    #[inline(always)]
    fn settle(&mut self, problem: &Problem<'_>, step: usize) {
        let (k, cols) = (problem.weight.rows, self.cols);
        let end = (step + STEP).min(k);
        self.change.fill(0.0);
        let mut changed = false;
        for r in step..end {
            if !self.settle_row(problem, r, step) {
                continue;
            }
            changed = true;
            // The rest of the step waits for it.
            let change = &self.change[(r - step) * cols..][..cols];
            let factors = &problem.h[r * k..][r + 1..end];
            let later = self.pull[(r + 1) * cols..].chunks_exact_mut(cols);
            for (pull, &f) in later.zip(factors) {
                for (p, &d) in pull.iter_mut().zip(change) {
                    *p += f * d;
                }
            }
        }
        if changed {
            self.pass_on(problem, (step, end));
        }
    }

    /// Sets the codes of row `r`; false when they were the best already.
    #[inline(always)]
    fn settle_row(&mut self, problem: &Problem<'_>, r: usize, step: usize) -> bool {
        let (k, cols) = (problem.weight.rows, self.cols);
        let curve = problem.h[r * k + r];
        if curve <= 0.0 {
            return false;
        }
        let (bits, scales) = problem.rows[r];
        let (lo, hi) = code_range(bits);
        let mut changed = false;
        let weights = &problem.weight.row(problem.order[r] as usize)[self.first..][..cols];
        let scales = &scales[self.first..][..cols];
        for c in 0..cols {
            let (at, scale) = (r * cols + c, scales[c]);
            if scale <= 0.0 {
                continue;
            }
            let best = weights[c] - self.left[at] + self.pull[at] / curve;
            let code = (best / scale).round_ties_even().clamp(lo, hi);
            let code_bits = (code - lo) as u8;
            if code_bits != self.codes[at] {
                let left = weights[c] - half::f16::from_f32(code * scale).to_f32();
                self.change[(r - step) * cols + c] = left - self.left[at];
                self.codes[at] = code_bits;
                self.left[at] = left;
                changed = true;
            }
        }
        changed
    }

    /// Passes the changes of a step on to the rows that come later in a round: those after it, and
    /// those up to its end for the next round.
    #[inline(always)]
    fn pass_on(&mut self, problem: &Problem<'_>, (step, end): (usize, usize)) {
        let (k, cols) = (problem.weight.rows, self.cols);
        let rows = end - step;
        let change = View::of(&self.change, cols, (0, 0), (rows, cols));
        let h = View::of(&problem.h, k, (end, step), (k - end, rows));
        product(&mut self.pull[end * cols..], h, change, 1.0, true);
        let h = View::of(&problem.h, k, (0, step), (step, rows));
        product(&mut self.pull[..step * cols], h, change, 1.0, true);
        // Inside the step each row lacks its own change and those after it.
        for r in step..end {
            let factors = &problem.h[r * k..][r..end];
            let pull = &mut self.pull[r * cols..][..cols];
            let changes = self.change[(r - step) * cols..].chunks_exact(cols);
            for (change, &f) in changes.zip(factors) {
                for (p, &d) in pull.iter_mut().zip(change) {
                    *p += f * d;
                }
            }
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
