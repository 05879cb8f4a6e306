//! Rate-distortion curves: what each way to store a matrix costs and loses.
//!
//! The loss of a layout is `tr(D^T H D)` with `D` the difference GPTQ leaves, fitted to the
//! training rows and judged on the hold-out rows: no forward pass is needed, and all layouts of a
//! matrix share one factorization. Of wide matrices only [`SAMPLE_COLUMNS`] columns are quantized,
//! in 32-column runs spread evenly, and the loss is scaled up.

use rayon::prelude::*;

use crate::gptq::{Gptq, Quantizer};
use crate::layout::Layout;
use crate::mix::Probes;
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
    let energy = scale * h.hold_out.loss(&sample)?;
    curve_of((weight.rows, weight.cols), energy, |layouts| {
        let lost = |layout: &Layout| {
            let q = Gptq { factor }.quantize(name, &sample, layout)?;
            Ok(scale * h.hold_out.loss(&difference(&sample, &q.dequantize()))?)
        };
        let mut losses = Vec::with_capacity(layouts.len());
        // A thread that waits inside one layout would begin another one, and hold both.
        for some in layouts.chunks(candidate_threads(weight.rows, rayon::current_num_threads())) {
            losses.extend(some.par_iter().map(lost).collect::<Result<Vec<f64>>>()?);
        }
        Ok(losses)
    })
}

/// What candidates that are tried at the same time may take together, in bytes.
const TOGETHER: usize = 1 << 30;

/// How many of `count` candidates are tried at the same time when each takes `each` bytes.
pub(crate) fn together(each: usize, count: usize) -> usize {
    (TOGETHER / each.max(1)).clamp(1, count.max(1))
}

/// Bytes that a layout takes while it is tried on [`SAMPLE_COLUMNS`] columns of `inputs` rows: the
/// working copy, codes by block and in order, decoded values, their difference, and products with it.
pub(crate) fn candidate_bytes(inputs: usize) -> usize {
    SAMPLE_COLUMNS * inputs * (4 + 1 + 1 + 4 + 4 + 4)
}

/// Layouts that are tried at the same time.
pub(crate) fn candidate_threads(inputs: usize, threads: usize) -> usize {
    together(candidate_bytes(inputs), threads)
}

/// The curve of a matrix whose layouts `run` measures.
pub(crate) fn curve_of(
    (inputs, outputs): (usize, usize),
    energy: f64,
    mut run: impl FnMut(&[Layout]) -> Result<Vec<f64>>,
) -> Result<Curve> {
    let probes = Probes::new(inputs)?;
    let measured = run(probes.layouts())?;
    let mixes = probes.losses(&measured).mixes(outputs)?;
    let mut points: Vec<Point> = Vec::new();
    let all = probes.layouts().iter().cloned().zip(measured);
    for (layout, loss) in all.chain(mixes) {
        if points.iter().all(|p| p.layout != layout) {
            let bits = layout.bits(outputs);
            points.push(Point { layout, bits, loss });
        }
    }
    Ok(Curve {
        inputs,
        outputs,
        energy,
        points,
    })
}

/// The smallest layout that is measured for a matrix with `inputs` features.
///
/// # Errors
/// [`crate::Error::Layout`] when `inputs` is no positive multiple of 32.
pub fn smallest(inputs: usize) -> Result<Layout> {
    Layout::uniform(2, 128, inputs)
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
        let least = bpw.iter().copied().fold(f64::INFINITY, f64::min);
        let most = bpw.iter().copied().fold(0.0, f64::max);
        assert!(least < 2.8 && most > 8.0, "{bpw:?}");
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
    fn any_number_of_rows_has_a_curve() {
        assert!(smallest(48).is_err() && Probes::new(48).is_err() && Probes::new(0).is_err());
        for rows in [32, 96, 160, 416] {
            let weight = Matrix::new(rows, 32, normal(7, rows * 32, 0.05)).unwrap();
            let curve = measure("t", &weight, &set(rows), 0.02).unwrap();
            let least = curve.points.iter().map(|p| p.bits).min().unwrap();
            assert_eq!(least, smallest(rows).unwrap().bits(32));
            for p in &curve.points {
                assert_eq!((p.layout.rows(), p.bits), (rows, p.layout.bits(32)));
                assert!(p.loss.is_finite() && p.loss > 0.0, "{}", p.layout);
            }
        }
    }
}
