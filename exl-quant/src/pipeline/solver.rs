//! What a conversion asks about the linears that share an input, on whatever device: Hessians,
//! their factor, rounded matrices and the error they leave.

mod gpu;
mod host;
#[cfg(test)]
mod tests;

use exl_tensor::Gpu;

use super::device::{Device, Tap};
use crate::measure::Curve;
use crate::{HessianAccumulator, Layout, Matrix, Part, Quantized, Result};
use gpu::GpuMoments;
use host::HostSolver;

/// Damping worth trying, as fractions of the mean diagonal.
const DAMPINGS: [f64; 5] = [0.003, 0.01, 0.03, 0.06, 0.12];

/// Rows that judge an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    Train,
    HoldOut,
    All,
}

/// A matrix rounded with the factor in use.
#[derive(Debug)]
pub(super) struct Rounded {
    pub(super) quantized: Quantized,
    /// What decoders make of it, `[inputs, outputs]`.
    pub(super) decoded: Matrix,
    /// For each kind of rows asked for: squared output error, and squared output of the original.
    pub(super) losses: Vec<(f64, f64)>,
}

/// The Hessians of one input and the factor of one of them. One factor is in use at a time.
pub(super) trait Solver {
    /// Uses the damping that does best on the hold-out rows at three bits for `weight`.
    fn choose_damping(&mut self, name: &str, weight: &Matrix) -> Result<()>;

    /// Uses this damping, or more when the Hessian is not positive definite with it.
    fn set_damping(&mut self, name: &str, damping: f64) -> Result<()>;

    /// The damping in use, and how often it had to be raised.
    fn damping(&self) -> (f64, u32);

    /// Rate and distortion of every candidate layout of a matrix.
    fn curve(&mut self, name: &str, weight: &Matrix) -> Result<Curve>;

    /// For each kind of rows asked for: squared output error of `decoded` in place of `weight`, and
    /// squared output of `weight`.
    fn judge(
        &mut self,
        weight: &Matrix,
        decoded: &Matrix,
        rows: &[Rows],
    ) -> Result<Vec<(f64, f64)>>;

    /// Rounds a matrix and judges it. Where the original was seen beside ([`Moments::add_pair`]),
    /// rounding aims at [`crate::CrossMoment::aim`] of it.
    fn round(
        &mut self,
        name: &str,
        weight: &Matrix,
        layout: &Layout,
        rows: &[Rows],
    ) -> Result<Rounded>;
}

/// Hessians of an input in the making.
#[derive(Debug)]
pub(super) enum Moments {
    Host(HessianAccumulator),
    Gpu(GpuMoments),
}

impl Moments {
    /// For an input of `dim` features.
    pub(super) fn new(device: &Device, dim: usize) -> Result<Self> {
        Ok(match device {
            Device::Cpu(_) => Moments::Host(HessianAccumulator::new(dim)),
            Device::Gpu(gpu) => Moments::Gpu(GpuMoments::new(gpu, dim)?),
        })
    }

    /// Adds the values of calibration row `row`.
    pub(super) fn add(&mut self, row: usize, tap: &mut Tap<'_>) -> Result<()> {
        let part = Part::of_row(row);
        match self {
            Moments::Host(acc) => acc.add(tap.values()?, part),
            Moments::Gpu(moments) => match tap.region()? {
                Some(region) => moments.add(&region, part),
                None => unreachable!("a conversion computes on one device"),
            },
        }
    }

    /// Adds what the values of a row have to do with how far they are from those of the original
    /// (`theirs`).
    pub(super) fn add_pair(&mut self, ours: &mut Tap<'_>, theirs: &mut Tap<'_>) -> Result<()> {
        match self {
            Moments::Host(acc) => acc.add_pair(ours.values()?, theirs.values()?),
            Moments::Gpu(moments) => match (ours.region()?, theirs.region()?) {
                (Some(ours), Some(theirs)) => moments.add_pair(&ours, &theirs),
                _ => unreachable!("a conversion computes on one device"),
            },
        }
    }

    /// Adds values on the host, of calibration row `row`.
    pub(super) fn add_rows(&mut self, row: usize, values: &[f32]) -> Result<()> {
        let part = Part::of_row(row);
        match self {
            Moments::Host(acc) => acc.add(values, part),
            Moments::Gpu(moments) => moments.add_rows(values, part),
        }
    }

    /// The finished Hessians.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`] naming `tensor` when a value is not finite.
    pub(super) fn finish(self, tensor: &str) -> Result<Box<dyn Solver>> {
        Ok(match self {
            Moments::Host(acc) => Box::new(HostSolver::new(acc.finish(tensor)?)),
            Moments::Gpu(moments) => Box::new(moments.finish(tensor)?),
        })
    }
}

/// Memory of the machine that is taken at most, in bytes: by Hessians of `inputs` features with their
/// factors, and by work on matrices of `weights` elements with this many threads.
pub(super) fn host_bytes(inputs: usize, weights: u64, threads: usize) -> (u64, u64) {
    host::bytes(inputs, weights, threads)
}

/// Device memory that Hessians of `inputs` features and matrices of `weights` elements with
/// `outputs` columns take at most.
pub(super) fn gpu_bytes(inputs: usize, weights: u64, outputs: u64) -> u64 {
    gpu::bytes(inputs, weights, outputs)
}

/// An error of a GPU.
fn gpu_error(error: exl_kernels::Error) -> crate::Error {
    exl_tensor::Error::Gpu(error).into()
}

fn open(gpu: &Gpu) -> Result<exl_kernels::cuda::CudaQuantizer> {
    exl_kernels::cuda::CudaQuantizer::new(gpu.device().clone()).map_err(gpu_error)
}
