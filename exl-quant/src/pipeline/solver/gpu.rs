//! The mathematics on a GPU: the same steps over matrices in device memory.
//!
//! Sums over tokens are kept as sums; every use divides by the number of tokens.

use exl_kernels::cuda::{CudaQuantizer, DeviceCodes, DeviceFactor, DeviceMatrix, DeviceRegion};
use exl_kernels::ops::GptqGroup;
use exl_tensor::Gpu;

use super::{DAMPINGS, Rounded, Rows, Solver, gpu_error, open};
use crate::cross::share;
use crate::gptq::check_weight;
use crate::hessian::not_finite;
use crate::linalg::damped;
use crate::measure::{Curve, curve_of, sample_columns};
use crate::quantized::{Quantized, Stats};
use crate::refine::ROUNDS;
use crate::{GroupSpec, Layout, Matrix, Part, Result, SAMPLE_COLUMNS, order_by};

const HESSIAN: &str = "the Hessian of a layer's inputs";
const MATRIX: &str = "a matrix to quantize";

/// A sum of outer products of one part of the calibration rows.
#[derive(Debug)]
struct Sum {
    matrix: DeviceMatrix,
    tokens: u64,
}

/// Hessians in the making.
#[derive(Debug)]
pub(in super::super) struct GpuMoments {
    kernels: CudaQuantizer,
    dim: usize,
    train: Sum,
    hold_out: Sum,
    /// Of `(x - y)^T y`: the transpose of what [`crate::CrossMoment`] is the mean of.
    cross: Option<Sum>,
}

impl GpuMoments {
    pub(super) fn new(gpu: &Gpu, dim: usize) -> Result<Self> {
        let kernels = open(gpu)?;
        let sum = || {
            let matrix = kernels.zeros(dim, dim, HESSIAN).map_err(gpu_error)?;
            Ok::<_, crate::Error>(Sum { matrix, tokens: 0 })
        };
        Ok(Self {
            train: sum()?,
            hold_out: sum()?,
            cross: None,
            dim,
            kernels,
        })
    }

    /// Adds rows of `dim` features.
    pub(super) fn add(&mut self, x: &DeviceRegion, part: Part) -> Result<()> {
        let sum = match part {
            Part::Train => &mut self.train,
            Part::HoldOut => &mut self.hold_out,
        };
        let added = self.kernels.accumulate(&mut sum.matrix, x);
        sum.tokens += (x.bytes() / (4 * self.dim.max(1))) as u64;
        added.map_err(gpu_error)
    }

    /// As [`GpuMoments::add`], from the host.
    pub(super) fn add_rows(&mut self, values: &[f32], part: Part) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let shape = (values.len() / self.dim.max(1), self.dim);
        let placed = self.kernels.upload(values, shape, "rows of an expert");
        self.add(placed.map_err(gpu_error)?.region(), part)
    }

    /// As [`super::Moments::add_pair`].
    pub(super) fn add_pair(&mut self, ours: &DeviceRegion, theirs: &DeviceRegion) -> Result<()> {
        let dim = self.dim;
        if self.cross.is_none() {
            let matrix = self.kernels.zeros(dim, dim, HESSIAN).map_err(gpu_error)?;
            self.cross = Some(Sum { matrix, tokens: 0 });
        }
        let cross = self.cross.as_mut().expect("set above");
        let added = self
            .kernels
            .add_product(&mut cross.matrix, (theirs, Some(ours)), ours, 1.0);
        cross.tokens += (ours.bytes() / (4 * dim.max(1))) as u64;
        added.map_err(gpu_error)
    }

    pub(super) fn finish(mut self, tensor: &str) -> Result<GpuSolver> {
        let mut sums: Vec<Sum> = [self.train, self.hold_out]
            .into_iter()
            .filter(|s| s.tokens > 0)
            .collect();
        let mut diagonals = Vec::new();
        for sum in &sums {
            let diagonal = self.kernels.diagonal(&sum.matrix).map_err(gpu_error)?;
            // A feature that is not finite shows here; of the others, products are bounded.
            if let Some(at) = diagonal.iter().position(|x| !x.is_finite()) {
                return Err(not_finite(tensor, at, at));
            }
            let scale = 1.0 / sum.tokens as f64;
            let mean = diagonal.iter().map(|&x| (f64::from(x) * scale) as f32);
            diagonals.push(mean.collect::<Vec<f32>>());
        }
        if let Some(cross) = &self.cross {
            // With these inputs finite, one of the original's that is not shows here.
            let diagonal = self.kernels.diagonal(&cross.matrix).map_err(gpu_error)?;
            if let Some(at) = diagonal.iter().position(|x| !x.is_finite()) {
                return Err(not_finite(tensor, at, at));
            }
        }
        if sums.is_empty() {
            // As on the CPU: a mean of nothing is zero.
            let matrix = self.kernels.zeros(self.dim, self.dim, HESSIAN);
            let matrix = matrix.map_err(gpu_error)?;
            sums.push(Sum { matrix, tokens: 1 });
            diagonals.push(vec![0.0; self.dim]);
        }
        let diagonal = diagonals.swap_remove(0);
        Ok(GpuSolver {
            kernels: self.kernels,
            order: order_by(&diagonal),
            sums,
            cross: self.cross,
            diagonal,
            factor: None,
        })
    }
}

/// A factor, the damping asked for and the one used, and how often it was raised.
#[derive(Debug)]
struct InUse {
    factor: DeviceFactor,
    wanted: f64,
    damping: f64,
    retries: u32,
}

/// Finished Hessians.
#[derive(Debug)]
pub(super) struct GpuSolver {
    kernels: CudaQuantizer,
    /// Training rows, then hold-out rows; one that stands for both when there are no others.
    sums: Vec<Sum>,
    cross: Option<Sum>,
    /// Of the mean over training rows.
    diagonal: Vec<f32>,
    order: Vec<u32>,
    factor: Option<InUse>,
}

impl GpuSolver {
    fn make_factor(&mut self, name: &str, wanted: f64) -> Result<InUse> {
        let scale = 1.0 / self.sums[0].tokens as f64;
        let (kernels, order) = (&mut self.kernels, &self.order);
        let sum = &self.sums[0].matrix;
        let (factor, damping, retries) = damped(name, &self.diagonal, wanted, |lambda| {
            let found = kernels.factor(sum, order, (scale, lambda));
            found.map_err(gpu_error)
        })?;
        Ok(InUse {
            factor,
            wanted,
            damping,
            retries,
        })
    }

    fn in_use(&self) -> &InUse {
        self.factor.as_ref().expect("a damping was chosen")
    }

    /// What rounding `weight` aims at, as [`crate::CrossMoment::aim`].
    fn aim(&mut self, weight: &DeviceMatrix) -> Result<DeviceMatrix> {
        let Some(cross) = &self.cross else {
            return Ok(weight.clone());
        };
        let alpha = share(cross.tokens, self.order.len()) / cross.tokens.max(1) as f64;
        let factor = &self.factor.as_ref().expect("a damping was chosen").factor;
        let aim = self
            .kernels
            .corrected(weight, (&cross.matrix, alpha as f32), factor);
        aim.map_err(gpu_error)
    }

    fn upload(&self, matrix: &Matrix) -> Result<DeviceMatrix> {
        let shape = (matrix.rows, matrix.cols);
        let placed = self.kernels.upload(&matrix.data, shape, MATRIX);
        placed.map_err(gpu_error)
    }

    fn rounded(&mut self, weight: &DeviceMatrix, layout: &Layout) -> Result<DeviceCodes> {
        let factor = &self.factor.as_ref().expect("a damping was chosen").factor;
        let codes = self.kernels.round(weight, factor, &groups(layout));
        codes.map_err(gpu_error)
    }

    fn refined(
        &mut self,
        weight: &DeviceMatrix,
        layout: &Layout,
        rounded: &DeviceCodes,
    ) -> Result<DeviceCodes> {
        let used = self.factor.as_ref().expect("a damping was chosen");
        let mean = self.diagonal.iter().map(|&x| f64::from(x)).sum::<f64>();
        let lambda = used.damping * mean / self.diagonal.len() as f64;
        let sum = &self.sums[0];
        let h = (&sum.matrix, 1.0 / sum.tokens as f64, lambda);
        let how = (&groups(layout)[..], ROUNDS);
        let codes = self.kernels.refine(weight, h, &used.factor, how, rounded);
        codes.map_err(gpu_error)
    }

    fn judge_placed(
        &mut self,
        weight: &DeviceMatrix,
        decoded: &DeviceMatrix,
        rows: &[Rows],
    ) -> Result<Vec<(f64, f64)>> {
        let mut losses = Vec::with_capacity(rows.len());
        for &rows in rows {
            let loss = self.loss(rows, weight, Some(decoded))?;
            losses.push((loss, self.loss(rows, weight, None)?));
        }
        Ok(losses)
    }

    /// Mean squared output error of `a - b`, or output of `a`.
    fn loss(&mut self, rows: Rows, a: &DeviceMatrix, b: Option<&DeviceMatrix>) -> Result<f64> {
        let last = self.sums.len() - 1;
        let sums = match rows {
            Rows::Train => &self.sums[..1],
            Rows::HoldOut => &self.sums[last..],
            Rows::All => &self.sums[..],
        };
        let tokens: u64 = sums.iter().map(|s| s.tokens).sum();
        let mut loss = 0.0;
        for sum in sums {
            let part = self.kernels.loss(&sum.matrix, 1.0 / tokens as f64, a, b);
            loss += part.map_err(gpu_error)?;
        }
        Ok(loss)
    }
}

impl Solver for GpuSolver {
    fn choose_damping(&mut self, name: &str, weight: &Matrix) -> Result<()> {
        let (sample, _) = sample_columns(weight, SAMPLE_COLUMNS);
        let layout = Layout::uniform(3, 128, sample.rows)?;
        check_weight(name, &sample, &layout)?;
        let placed = self.upload(&sample)?;
        let mut best: Option<(f64, InUse)> = None;
        for damping in DAMPINGS {
            self.factor = None;
            self.factor = Some(self.make_factor(name, damping)?);
            let codes = self.rounded(&placed, &layout)?;
            let loss = self.loss(Rows::HoldOut, &placed, Some(codes.decoded()))?;
            if best.as_ref().is_none_or(|b| loss < b.0) {
                best = self.factor.take().map(|f| (loss, f));
            }
        }
        self.factor = best.map(|(_, f)| InUse {
            wanted: f.damping,
            ..f
        });
        Ok(())
    }

    fn set_damping(&mut self, name: &str, damping: f64) -> Result<()> {
        if self.factor.as_ref().is_none_or(|f| f.wanted != damping) {
            self.factor = None;
            self.factor = Some(self.make_factor(name, damping)?);
        }
        Ok(())
    }

    fn damping(&self) -> (f64, u32) {
        (self.in_use().damping, self.in_use().retries)
    }

    fn curve(&mut self, name: &str, weight: &Matrix) -> Result<Curve> {
        let (sample, scale) = sample_columns(weight, SAMPLE_COLUMNS);
        let placed = self.upload(&sample)?;
        let energy = scale * self.loss(Rows::HoldOut, &placed, None)?;
        curve_of((weight.rows, weight.cols), energy, |layouts| {
            let mut losses = Vec::with_capacity(layouts.len());
            for layout in layouts {
                check_weight(name, &sample, layout)?;
                let codes = self.rounded(&placed, layout)?;
                losses.push(scale * self.loss(Rows::HoldOut, &placed, Some(codes.decoded()))?);
            }
            Ok(losses)
        })
    }

    fn judge(
        &mut self,
        weight: &Matrix,
        decoded: &Matrix,
        rows: &[Rows],
    ) -> Result<Vec<(f64, f64)>> {
        let (weight, decoded) = (self.upload(weight)?, self.upload(decoded)?);
        self.judge_placed(&weight, &decoded, rows)
    }

    fn round(
        &mut self,
        name: &str,
        weight: &Matrix,
        layout: &Layout,
        rows: &[Rows],
    ) -> Result<Rounded> {
        check_weight(name, weight, layout)?;
        let placed = self.upload(weight)?;
        let aim = self.aim(&placed)?;
        let mut codes = self.rounded(&aim, layout)?;
        let better = self.refined(&aim, layout, &codes)?;
        let before = self.loss(Rows::HoldOut, &aim, Some(codes.decoded()))?;
        if self.loss(Rows::HoldOut, &aim, Some(better.decoded()))? < before {
            codes = better;
        }
        drop(aim);
        let losses = self.judge_placed(&placed, codes.decoded(), rows)?;
        let host = self.kernels.codes(&codes).map_err(gpu_error)?;
        let (damping, damping_retries) = self.damping();
        let decoded = self.kernels.download(codes.decoded()).map_err(gpu_error)?;
        Ok(Rounded {
            quantized: Quantized {
                inputs: weight.rows,
                outputs: weight.cols,
                layout: layout.clone(),
                order: self.order.clone(),
                codes: host.codes,
                scale_codes: host.scale_codes,
                scale_max: host.scale_max,
                stats: Stats {
                    underflows: host.underflows,
                    damping,
                    damping_retries,
                },
            },
            decoded: Matrix::new(weight.rows, weight.cols, decoded)?,
            losses,
        })
    }
}

/// The groups as the ops name them.
pub(super) fn groups(layout: &Layout) -> Vec<GptqGroup> {
    let group = |g: &GroupSpec| GptqGroup {
        rows: g.rows,
        bits: g.bits,
    };
    layout.groups().iter().map(group).collect()
}

/// Rows of errors that wait for a product, at most: groups of layouts that are measured have 128.
const PANEL_ROWS: u64 = 128;
/// Floats of scratch memory per column beside the rows: tables and sums of the scale search.
const COLUMN_WORDS: u64 = 40;

/// Device memory of Hessians with `inputs` features and of matrices with `weights` elements and
/// `outputs` columns, the largest of each.
pub(super) fn bytes(inputs: usize, weights: u64, outputs: u64) -> u64 {
    // The matrix, what rounding it aims at, its working copy, what it decodes to, codes and their scales;
    // the codes bettered and what those decode to.
    let rounding = 23 * weights + 4 * (PANEL_ROWS + COLUMN_WORDS) * outputs;
    CudaQuantizer::hessian_bytes(inputs) + rounding
}
