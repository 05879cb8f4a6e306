//! Accumulating `X^T X` of a linear layer's inputs.

use rayon::prelude::*;

use crate::cross::{CrossAccumulator, CrossMoment};
use crate::matrix::{View, product_at};
use crate::{Error, Result};

/// Edge of the square tiles a Hessian is accumulated in: small enough that a K = 512 matrix still
/// gives every core work and skips most of the mirrored half.
pub(crate) const TILE: usize = 128;

/// Token rows multiplied at once.
pub(crate) const PANEL_ROWS: usize = 4096;

/// `H = sum x^T x` of one calibration part, upper tiles only.
#[derive(Clone, Debug)]
struct Accumulator {
    dim: usize,
    tiles: Vec<Vec<f32>>,
    tokens: u64,
}

/// The symmetric mean `E[x^T x]` over token rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Hessian {
    dim: usize,
    data: Vec<f32>,
    tokens: u64,
}

/// Which part of the calibration rows a batch belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Rows the quantizer fits to.
    Train,
    /// Rows that only judge.
    HoldOut,
}

impl Part {
    /// Every eighth calibration row judges, from row 7 on, so that small sets keep their rows.
    pub fn of_row(row: usize) -> Self {
        if row % 8 == 7 {
            Part::HoldOut
        } else {
            Part::Train
        }
    }
}

/// Accumulates the Hessians of a linear layer's inputs, training and hold-out rows apart.
///
/// Products are 32-bit over panels of at most 4096 tokens; 12% of the rows (see [`Part::of_row`])
/// are kept apart so that damping and refinements can be judged on rows they have not seen.
#[derive(Clone, Debug)]
pub struct HessianAccumulator {
    train: Accumulator,
    hold_out: Accumulator,
    cross: Option<CrossAccumulator>,
}

impl HessianAccumulator {
    /// An empty accumulator for `dim` input features.
    pub fn new(dim: usize) -> Self {
        Self {
            train: Accumulator::new(dim),
            hold_out: Accumulator::new(dim),
            cross: None,
        }
    }

    /// Adds the token rows of `x` (`[tokens, dim]`).
    ///
    /// # Errors
    /// [`Error::Shape`] when the length is no multiple of `dim`.
    pub fn add(&mut self, x: &[f32], part: Part) -> Result<()> {
        match part {
            Part::Train => self.train.add(x),
            Part::HoldOut => self.hold_out.add(x),
        }
    }

    /// Adds what token rows `y` (`[tokens, dim]`) have to do with how far they are from those of the
    /// original, `x`: see [`CrossMoment`]. Their Hessian is not touched.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ or are no multiple of `dim`.
    pub fn add_pair(&mut self, y: &[f32], x: &[f32]) -> Result<()> {
        let dim = self.train.dim;
        let cross = self.cross.get_or_insert_with(|| CrossAccumulator::new(dim));
        cross.add(y, x)
    }

    /// The means: over training rows, over hold-out rows (training ones when there are none), and
    /// over both.
    ///
    /// # Errors
    /// [`Error::Numeric`] naming `tensor` when a value is not finite.
    pub fn finish(&self, tensor: &str) -> Result<HessianSet> {
        let mut both = self.train.clone();
        for (a, b) in both.tiles.iter_mut().zip(&self.hold_out.tiles) {
            for (x, y) in a.iter_mut().zip(b) {
                *x += y;
            }
        }
        both.tokens += self.hold_out.tokens;
        let all = both.mean(tensor)?;
        let cross = self.cross.as_ref().map(|c| c.finish(tensor));
        let cross = cross.transpose()?;
        if self.hold_out.tokens == 0 || self.train.tokens == 0 {
            return Ok(HessianSet {
                train: all.clone(),
                hold_out: all.clone(),
                all,
                cross,
            });
        }
        Ok(HessianSet {
            train: self.train.mean(tensor)?,
            hold_out: self.hold_out.mean(tensor)?,
            all,
            cross,
        })
    }
}

/// The finished Hessians of one input.
#[derive(Clone, Debug)]
pub struct HessianSet {
    /// Over the rows the weights are fitted to.
    pub train: Hessian,
    /// Over the rows that judge.
    pub hold_out: Hessian,
    /// Over all rows: what a change of the weights does to the outputs.
    pub all: Hessian,
    /// Over the rows that the original was seen on too, if there are such.
    pub cross: Option<CrossMoment>,
}

impl Accumulator {
    fn new(dim: usize) -> Self {
        let n = dim.div_ceil(TILE);
        let tiles = (0..n).flat_map(|i| (i..n).map(move |j| (i, j)));
        let size = |i: usize| TILE.min(dim - i * TILE);
        let tiles = tiles.map(|(i, j)| vec![0.0; size(i) * size(j)]).collect();
        Self {
            dim,
            tiles,
            tokens: 0,
        }
    }

    fn add(&mut self, x: &[f32]) -> Result<()> {
        let dim = self.dim;
        let tokens = token_rows(x, dim)?;
        let places = tile_places(dim);
        for first in (0..tokens).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(tokens - first);
            self.tiles
                .par_iter_mut()
                .zip(&places)
                .for_each(|(tile, &(i, j))| {
                    let size = |t: usize| TILE.min(dim - t * TILE);
                    let a = View::of(x, dim, (first, i * TILE), (rows, size(i)));
                    let b = View::of(x, dim, (first, j * TILE), (rows, size(j)));
                    product_at(tile, a, b, 1.0, true);
                });
        }
        self.tokens += tokens as u64;
        Ok(())
    }

    fn mean(&self, tensor: &str) -> Result<Hessian> {
        let dim = self.dim;
        let mut data = vec![0.0f32; dim * dim];
        let scale = 1.0 / (self.tokens.max(1) as f64);
        for (tile, (i, j)) in self.tiles.iter().zip(tile_places(dim)) {
            let cols = TILE.min(dim - j * TILE);
            for (at, &x) in tile.iter().enumerate() {
                let (r, c) = (i * TILE + at / cols, j * TILE + at % cols);
                let x = (f64::from(x) * scale) as f32;
                // The diagonal tiles hold both halves; rounding may differ between them, so the
                // upper half wins.
                if r <= c {
                    data[r * dim + c] = x;
                    data[c * dim + r] = x;
                }
            }
        }
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            return Err(not_finite(tensor, at / dim, at % dim));
        }
        Ok(Hessian {
            dim,
            data,
            tokens: self.tokens,
        })
    }
}

/// How many rows of `dim` features there are.
pub(crate) fn token_rows(x: &[f32], dim: usize) -> Result<usize> {
    if dim == 0 || !x.len().is_multiple_of(dim) {
        let want = format!("[tokens, {dim}]");
        return Err(Error::shape("calibration inputs", want, x.len()));
    }
    Ok(x.len() / dim)
}

/// The error for activations that are not finite.
pub(crate) fn not_finite(tensor: &str, i: usize, j: usize) -> Error {
    Error::numeric(
        tensor,
        format!(
            "calibration inputs hold NaN or infinity at feature {i} or {j}; the model's activations \
             overflow, check its weights"
        ),
    )
}

fn tile_places(dim: usize) -> Vec<(usize, usize)> {
    let n = dim.div_ceil(TILE);
    (0..n).flat_map(|i| (i..n).map(move |j| (i, j))).collect()
}

impl Hessian {
    /// From a full symmetric matrix `[dim, dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Numeric`] when it is none.
    pub fn from_full(dim: usize, data: Vec<f32>, tokens: u64) -> Result<Self> {
        if data.len() != dim * dim {
            return Err(Error::shape("Hessian elements", dim * dim, data.len()));
        }
        if data.iter().any(|x| !x.is_finite()) {
            return Err(Error::numeric("Hessian", "an element is not finite"));
        }
        Ok(Self { dim, data, tokens })
    }

    /// Input features.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// `[dim, dim]`, symmetric.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// Token rows behind the mean.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.dim).map(|i| self.data[i * self.dim + i]).collect()
    }

    /// `tr(D^T H D)` for a difference `d` of `[dim, columns]`: the mean squared output error per
    /// token, summed over output features.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows differ from the dimension.
    pub fn loss(&self, d: &crate::Matrix) -> Result<f64> {
        Ok(self.column_losses(d)?.iter().sum())
    }

    /// [`Hessian::loss`] for each output feature.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows differ from the dimension.
    pub fn column_losses(&self, d: &crate::Matrix) -> Result<Vec<f64>> {
        if d.rows != self.dim {
            return Err(Error::shape(
                "rows of a weight difference",
                self.dim,
                d.rows,
            ));
        }
        const CHUNK: usize = 64;
        let chunks: Vec<usize> = (0..d.cols).step_by(CHUNK).collect();
        let parts: Vec<Vec<f64>> = chunks
            .par_iter()
            .map(|&first| {
                let n = CHUNK.min(d.cols - first);
                let mut hd = vec![0.0f32; self.dim * n];
                let h = View::of(&self.data, self.dim, (0, 0), (self.dim, self.dim));
                let view = View::of(&d.data, d.cols, (0, first), (self.dim, n));
                product(&mut hd, h, view);
                let mut sums = vec![0.0f64; n];
                for r in 0..self.dim {
                    let row = &d.row(r)[first..first + n];
                    for ((s, &x), &y) in sums.iter_mut().zip(row).zip(&hd[r * n..][..n]) {
                        *s += f64::from(x) * f64::from(y);
                    }
                }
                sums
            })
            .collect();
        Ok(parts.into_iter().flatten().collect())
    }
}

fn product(out: &mut [f32], a: View<'_>, b: View<'_>) {
    crate::matrix::product(out, a, b, 1.0, false);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Matrix;
    use crate::testing::noise;

    #[test]
    fn accumulates_the_mean_outer_product() {
        let dim = 160;
        let x = noise(7, 300 * dim);
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&x[..100 * dim], Part::Train).unwrap();
        acc.add(&x[100 * dim..200 * dim], Part::HoldOut).unwrap();
        acc.add(&x[200 * dim..], Part::Train).unwrap();
        let set = acc.finish("x").unwrap();
        assert_eq!((set.train.tokens(), set.hold_out.tokens()), (200, 100));
        for (i, j) in [(0, 0), (3, 150), (150, 3), (159, 159), (130, 131)] {
            let want: f64 = (0..300)
                .map(|t| f64::from(x[t * dim + i]) * f64::from(x[t * dim + j]))
                .sum::<f64>()
                / 300.0;
            let got = f64::from(set.all.data()[i * dim + j]);
            assert!((want - got).abs() < 1e-5, "{i},{j}: {want} {got}");
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let dim = 200;
        let x = noise(1, 500 * dim);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut acc = HessianAccumulator::new(dim);
                acc.add(&x, Part::Train).unwrap();
                acc.finish("x").unwrap().all
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn loss_is_the_output_error() {
        let (tokens, dim, cols) = (50, 32, 5);
        let x = noise(2, tokens * dim);
        let d = Matrix::new(dim, cols, noise(3, dim * cols)).unwrap();
        let mut acc = HessianAccumulator::new(dim);
        acc.add(&x, Part::Train).unwrap();
        let got = acc.finish("x").unwrap().all.loss(&d).unwrap();
        let mut want = 0.0f64;
        for t in 0..tokens {
            for c in 0..cols {
                let y: f64 = (0..dim)
                    .map(|k| f64::from(x[t * dim + k]) * f64::from(d.row(k)[c]))
                    .sum();
                want += y * y / tokens as f64;
            }
        }
        assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
    }

    #[test]
    fn non_finite_inputs_are_named() {
        let mut acc = HessianAccumulator::new(32);
        let mut x = vec![1.0f32; 64];
        x[40] = f32::INFINITY;
        acc.add(&x, Part::Train).unwrap();
        let error = acc.finish("layers.3.down").unwrap_err().to_string();
        assert!(error.contains("layers.3.down"), "{error}");
        assert!(acc.add(&x[..33], Part::Train).is_err());
    }

    #[test]
    fn every_eighth_row_judges() {
        let held: Vec<usize> = (0..20)
            .filter(|&r| Part::of_row(r) == Part::HoldOut)
            .collect();
        assert_eq!(held, [7, 15]);
    }
}
