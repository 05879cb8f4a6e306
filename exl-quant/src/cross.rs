//! What a linear's rounding should make up for: the errors of the layers before it.
//!
//! Behind quantized layers a linear sees `Y` where the original saw `X`. The weights that come nearest
//! to the original's outputs there are not the original's own: `W + (H + lambda I)^-1 C W`, with
//! `H = E[Y^T Y]` and `C = E[Y^T (X - Y)]`, minimizes `|X W - Y T|^2` (GPTAQ, arXiv 2504.02692). A
//! share of that step is what rounding aims at.

use rayon::prelude::*;

use crate::hessian::{PANEL_ROWS, TILE, not_finite, token_rows};
use crate::matrix::{View, product, product_at};
use crate::{Error, Factor, Matrix, Result};

/// The share of the step with endless text. The whole step fits the calibration rows better and other
/// text no better: on demo-4m 0.5 and 1 leave the same divergence.
const SHARE: f64 = 0.5;

/// The sum of `y^T (x - y)`.
#[derive(Clone, Debug)]
pub(crate) struct CrossAccumulator {
    dim: usize,
    sum: Vec<f32>,
    tokens: u64,
}

/// The mean `C = E[y^T (x - y)]` over token rows: `y` as a linear sees them behind quantized layers,
/// `x` the same ones in the original.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossMoment {
    dim: usize,
    data: Vec<f32>,
    tokens: u64,
}

impl CrossAccumulator {
    pub(crate) fn new(dim: usize) -> Self {
        Self {
            dim,
            sum: vec![0.0; dim * dim],
            tokens: 0,
        }
    }

    /// Adds token rows, `[tokens, dim]` both.
    pub(crate) fn add(&mut self, y: &[f32], x: &[f32]) -> Result<()> {
        let dim = self.dim;
        let tokens = token_rows(y, dim)?;
        if x.len() != y.len() {
            return Err(Error::shape("inputs of the original", y.len(), x.len()));
        }
        for first in (0..tokens).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(tokens - first);
            let panel = first * dim..(first + rows) * dim;
            let (y, x) = (&y[panel.clone()], &x[panel]);
            let away: Vec<f32> = x.iter().zip(y).map(|(x, y)| x - y).collect();
            let strips = self.sum.par_chunks_mut(TILE * dim).enumerate();
            strips.for_each(|(i, sum)| {
                let y = View::of(y, dim, (0, i * TILE), (rows, sum.len() / dim));
                let away = View::of(&away, dim, (0, 0), (rows, dim));
                product_at(sum, y, away, 1.0, true);
            });
        }
        self.tokens += tokens as u64;
        Ok(())
    }

    /// The mean; an error that names `tensor` when it is not finite.
    pub(crate) fn finish(&self, tensor: &str) -> Result<CrossMoment> {
        let (dim, scale) = (self.dim, 1.0 / self.tokens.max(1) as f64);
        let data: Vec<f32> = self
            .sum
            .iter()
            .map(|&x| (f64::from(x) * scale) as f32)
            .collect();
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            return Err(not_finite(tensor, at / dim, at % dim));
        }
        Ok(CrossMoment {
            dim,
            data,
            tokens: self.tokens,
        })
    }
}

impl CrossMoment {
    /// What rounding `weight` (`[inputs, outputs]`) aims at, with the factor of the inputs' Hessian:
    /// `W + share (H + lambda I)^-1 C W`.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not belong together.
    pub fn aim(&self, weight: &Matrix, factor: &Factor) -> Result<Matrix> {
        if weight.rows != self.dim {
            return Err(Error::shape("rows of a weight", self.dim, weight.rows));
        }
        let mut lacking = Matrix::zeros(weight.rows, weight.cols);
        let strips = lacking.data.par_chunks_mut(TILE * weight.cols).enumerate();
        strips.for_each(|(i, out)| {
            let rows = out.len() / weight.cols;
            let c = View::of(&self.data, self.dim, (i * TILE, 0), (rows, self.dim));
            let w = View::of(
                &weight.data,
                weight.cols,
                (0, 0),
                (weight.rows, weight.cols),
            );
            product(out, c, w, 1.0, false);
        });
        let mut aim = factor.solve(&lacking)?;
        let share = share(self.tokens, self.dim) as f32;
        for (aim, &w) in aim.data.iter_mut().zip(&weight.data) {
            *aim = w + share * *aim;
        }
        Ok(aim)
    }
}

/// Share of the step to take when it was found on `tokens` rows of `dim` features.
///
/// What it takes from chance costs `share^2 dim / tokens` of the part of the error that the inputs do not
/// tell, and more as `H` is of other rows too, so that the share has to fall with `dim / tokens`. The
/// factor 2 is cautious: neighbouring tokens are not independent.
pub(crate) fn share(tokens: u64, dim: usize) -> f64 {
    SHARE / (1.0 + 2.0 * dim as f64 / tokens.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use crate::{HessianAccumulator, Part, activity_order};

    /// Inputs that are off in a way which they tell themselves.
    fn inputs(tokens: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
        let y = noise(3, tokens * dim);
        let mut x = y.clone();
        for (x, y) in x.chunks_exact_mut(dim).zip(y.chunks_exact(dim)) {
            for i in 0..dim {
                x[i] += 0.1 * y[i] - 0.05 * y[(i + 1) % dim];
            }
        }
        (y, x)
    }

    #[test]
    fn the_moment_is_what_the_definition_says() {
        let (tokens, dim) = (300, 160);
        let (y, x) = (noise(1, tokens * dim), noise(2, tokens * dim));
        let mut acc = CrossAccumulator::new(dim);
        acc.add(&y[..100 * dim], &x[..100 * dim]).unwrap();
        acc.add(&y[100 * dim..], &x[100 * dim..]).unwrap();
        let c = acc.finish("t").unwrap();
        for (i, j) in [(0, 0), (3, 150), (150, 3), (159, 159)] {
            let sum: f64 = (0..tokens)
                .map(|t| {
                    let away = f64::from(x[t * dim + j]) - f64::from(y[t * dim + j]);
                    f64::from(y[t * dim + i]) * away
                })
                .sum();
            let got = f64::from(c.data[i * dim + j]);
            assert!((got - sum / tokens as f64).abs() < 1e-5, "{i},{j}: {got}");
        }
    }

    #[test]
    fn rounding_aims_nearer_to_the_outputs_of_the_original() {
        let (tokens, dim, n) = (4000, 64, 32);
        let (y, x) = inputs(tokens, dim);
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&y, Part::Train).unwrap();
        acc.add_pair(&y, &x).unwrap();
        let set = acc.finish("t").unwrap();
        let factor = Factor::new("t", &set.train, &activity_order(&set.train), 1e-4).unwrap();
        let weight = Matrix::new(dim, n, noise(5, dim * n)).unwrap();
        let aim = set.cross.unwrap().aim(&weight, &factor).unwrap();
        let off = |w: &Matrix| {
            let product = |x: &[f32], w: &Matrix, c: usize| -> f64 {
                let terms = x.iter().enumerate();
                terms
                    .map(|(k, &x)| f64::from(x) * f64::from(w.row(k)[c]))
                    .sum()
            };
            let mut sum = 0.0;
            for t in 0..200 {
                let (x, y) = (&x[t * dim..][..dim], &y[t * dim..][..dim]);
                for c in 0..n {
                    sum += (product(x, &weight, c) - product(y, w, c)).powi(2);
                }
            }
            sum
        };
        // Half of the step leaves a quarter of the error; 0.266 with the share for so many tokens.
        let left = off(&aim) / off(&weight);
        assert!((0.25..0.28).contains(&left), "{left}");
    }

    #[test]
    fn little_text_moves_little() {
        assert!((share(1 << 40, 64) - SHARE).abs() < 1e-6);
        assert!(share(32, 768) < 0.011);
        assert!(share(0, 64).is_finite());
    }

    #[test]
    fn bad_inputs_are_refused() {
        let mut acc = CrossAccumulator::new(32);
        assert!(acc.add(&[0.0; 64], &[0.0; 32]).is_err());
        assert!(acc.add(&[0.0; 33], &[0.0; 33]).is_err());
        acc.add(&[1.0; 32], &[f32::NAN; 32]).unwrap();
        let error = acc.finish("layers.3.down").unwrap_err().to_string();
        assert!(error.contains("layers.3.down"), "{error}");
    }
}
