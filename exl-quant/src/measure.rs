//! Rate-distortion curves: what each way to store a matrix costs and loses.
//!
//! The loss of a layout is `tr(D^T H D)` with `D` the difference GPTQ leaves, fitted to the
//! training rows and judged on the hold-out rows: no forward pass is needed, and all layouts of a
//! matrix share one factorization. Of wide matrices only [`SAMPLE_COLUMNS`] columns are quantized,
//! in 32-column runs spread evenly, and the loss is scaled up.

use rayon::prelude::*;

use crate::gptq::{Gptq, Quantizer};
use crate::layout::{Layout, Recipe};
use crate::{Factor, HessianSet, Matrix, Result, activity_order};

/// Columns that stand for all columns of a wide matrix.
pub const SAMPLE_COLUMNS: usize = 512;

/// One point of a curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The layout.
    pub layout: Layout,
    /// Bits of everything stored, by the accounting of the format.
    pub bits: u64,
    /// Mean squared output error per token on the hold-out rows, summed over output features.
    pub loss: f64,
}

/// The curve of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Input features.
    pub inputs: usize,
    /// Output features, padded.
    pub outputs: usize,
    /// Mean squared output per token on the hold-out rows, summed over output features.
    pub energy: f64,
    /// The points in the order of [`candidates`].
    pub points: Vec<Point>,
}

/// Recipes worth measuring from 2.1 to 8.1 bits per weight, in the text form of [`Recipe`].
const RECIPES: [&str; 31] = [
    "1:2b_128g",
    "1:2b_64g",
    "1:2b_32g",
    "0.07:4b_64g/0.93:2b_64g",
    "0.125:3b_64g/0.875:2b_64g",
    "0.25:3b_64g/0.75:2b_64g",
    "0.07:6b_32g/0.25:3b_64g/0.68:2b_64g",
    "0.4:3b_64g/0.6:2b_64g",
    "0.55:3b_64g/0.45:2b_64g",
    "0.07:5b_64g/0.45:3b_64g/0.48:2b_64g",
    "0.75:3b_64g/0.25:2b_64g",
    "1:3b_128g",
    "1:3b_64g",
    "1:3b_32g",
    "0.07:6b_32g/0.93:3b_128g",
    "0.125:4b_128g/0.875:3b_128g",
    "0.25:4b_128g/0.75:3b_128g",
    "0.07:6b_32g/0.25:4b_128g/0.68:3b_128g",
    "0.5:4b_128g/0.5:3b_128g",
    "0.75:4b_128g/0.25:3b_128g",
    "1:4b_128g",
    "1:4b_32g",
    "0.07:8b_32g/0.93:4b_128g",
    "0.25:5b_128g/0.75:4b_128g",
    "0.5:5b_128g/0.5:4b_128g",
    "0.75:5b_128g/0.25:4b_128g",
    "1:5b_128g",
    "0.07:8b_32g/0.93:5b_128g",
    "0.5:6b_128g/0.5:5b_128g",
    "1:6b_128g",
    "0.3:8b_128g/0.7:6b_128g",
];

/// The layouts that are measured for a matrix with `inputs` features: [`RECIPES`] and 8 bits,
/// without repetitions (small matrices round several recipes to the same groups).
///
/// # Errors
/// [`crate::Error::Layout`] when `inputs` is no multiple of 32.
pub fn candidates(inputs: usize) -> Result<Vec<Layout>> {
    let mut out: Vec<Layout> = Vec::new();
    for text in RECIPES.into_iter().chain(["1:8b_128g"]) {
        let layout = text.parse::<Recipe>()?.layout(inputs)?;
        if !out.contains(&layout) {
            out.push(layout);
        }
    }
    Ok(out)
}

/// Measures every candidate layout of a matrix (`[inputs, outputs]`, padded).
///
/// # Errors
/// As [`Factor::new`] and [`Quantizer::quantize`].
pub fn measure(name: &str, weight: &Matrix, h: &HessianSet, damping: f64) -> Result<Curve> {
    let factor = Factor::new(name, &h.train, &activity_order(&h.train), damping)?;
    measure_with(name, weight, h, &factor)
}

/// As [`measure`] with a factor of `h.train` that other matrices share.
///
/// # Errors
/// As [`Quantizer::quantize`].
pub fn measure_with(name: &str, weight: &Matrix, h: &HessianSet, factor: &Factor) -> Result<Curve> {
    let (sample, scale) = sample_columns(weight, SAMPLE_COLUMNS);
    let layouts = candidates(weight.rows)?;
    let points = layouts
        .into_par_iter()
        .map(|layout| {
            let q = Gptq { factor }.quantize(name, &sample, &layout)?;
            let loss = scale * h.hold_out.loss(&difference(&sample, &q.dequantize()))?;
            Ok(Point {
                bits: layout.bits(weight.cols),
                layout,
                loss,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Curve {
        inputs: weight.rows,
        outputs: weight.cols,
        energy: scale * h.hold_out.loss(&sample)?,
        points,
    })
}

/// `a - b`.
pub(crate) fn difference(a: &Matrix, b: &Matrix) -> Matrix {
    let data = a.data.iter().zip(&b.data).map(|(x, y)| x - y).collect();
    Matrix {
        rows: a.rows,
        cols: a.cols,
        data,
    }
}

/// At most `limit` columns in runs of 32, and by how much a sum over them is to be scaled.
pub(crate) fn sample_columns(weight: &Matrix, limit: usize) -> (Matrix, f64) {
    let runs = weight.cols / 32;
    let take = (limit / 32).max(1);
    if runs <= take {
        return (weight.clone(), 1.0);
    }
    let mut out = Matrix::zeros(weight.rows, take * 32);
    for i in 0..take {
        let first = i * runs / take * 32;
        for r in 0..weight.rows {
            let from = &weight.row(r)[first..first + 32];
            out.row_mut(r)[i * 32..][..32].copy_from_slice(from);
        }
    }
    (out, runs as f64 / take as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, normal};
    use crate::{HessianAccumulator, Part};

    fn set(dim: usize) -> HessianSet {
        let mut acc = HessianAccumulator::new(dim);
        for row in 0..16 {
            acc.add(&noise(row as u64 + 1, 64 * dim), Part::of_row(row))
                .unwrap();
        }
        acc.finish("t").unwrap()
    }

    #[test]
    fn curves_fall_with_size() {
        let weight = Matrix::new(256, 64, normal(1, 256 * 64, 0.05)).unwrap();
        let curve = measure("t", &weight, &set(256), 0.02).unwrap();
        let bpw: Vec<f64> = curve
            .points
            .iter()
            .map(|p| p.bits as f64 / (256.0 * 64.0))
            .collect();
        assert!(bpw[0] < 2.8 && *bpw.last().unwrap() > 8.0, "{bpw:?}");
        let loss_at = |bits: u8| {
            let uniform = Layout::uniform(bits, 128, 256).unwrap();
            curve
                .points
                .iter()
                .find(|p| p.layout == uniform)
                .unwrap()
                .loss
        };
        for pair in [(2u8, 3u8), (3, 4), (4, 5), (5, 6), (6, 8)] {
            assert!(loss_at(pair.1) < 0.5 * loss_at(pair.0), "{pair:?}");
        }
        assert!(curve.energy > loss_at(2));
    }

    #[test]
    fn a_sample_of_columns_stands_for_all() {
        let weight = Matrix::new(64, 1024, normal(2, 64 * 1024, 0.05)).unwrap();
        let (sample, scale) = sample_columns(&weight, 512);
        assert_eq!((sample.cols, scale), (512, 2.0));
        let h = set(64).all;
        let (all, part) = (h.loss(&weight).unwrap(), scale * h.loss(&sample).unwrap());
        assert!((all - part).abs() < 0.1 * all, "{all} {part}");
    }

    #[test]
    fn small_matrices_have_fewer_layouts() {
        let small = candidates(32).unwrap();
        assert!(small.len() < candidates(512).unwrap().len());
        assert!(small.iter().all(|l| l.rows() == 32));
        assert!(candidates(48).is_err());
    }
}
