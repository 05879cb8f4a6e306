//! The quantizer's matrices on a GPU, and its ops over them.
//!
//! Every call waits for its result, so that what it was given may be dropped afterwards.

mod data;

use std::sync::Arc;

use super::lower::quant::factor_scratch;
use super::lower::{COUNTERS, Scratch, Target, lower, scratch_bytes};
use super::{Device, DeviceRegion, Event, Kernel, ReadyLaunch};
use crate::ops::{
    GatherRows, Gptq, GptqGroup, HessianFactor, HessianLoss, HessianSyrk, Op, Refine,
    TransposedProduct,
};
use crate::{DType, Error, Result};
pub use data::{DeviceCodes, DeviceFactor, DeviceMatrix, HostCodes};
use data::{whole, whole_mut};

/// Rows of a matrix whose diagonal elements are gathered at once: their indices fit 32 bits for
/// all matrices that have a Hessian.
const DIAGONAL_ROWS: usize = 8192;

/// Runs the quantizer's ops on a GPU.
#[derive(Debug)]
pub struct CudaQuantizer {
    device: Arc<Device>,
    scratch: Option<DeviceRegion>,
    counters: DeviceRegion,
    /// Of the last op, while kernels are timed.
    times: Option<Vec<(Kernel, f64)>>,
}

impl CudaQuantizer {
    /// On a GPU. Scratch memory is taken when it is needed and kept.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(device: Arc<Device>) -> Result<Self> {
        Ok(Self {
            counters: DeviceRegion::zeroed(&device, 4 * COUNTERS, "counters")?,
            scratch: None,
            times: None,
            device,
        })
    }

    /// Times the kernels of every further op, one after the other: for looking closely, not for speed.
    pub fn time_kernels(&mut self, on: bool) {
        self.times = on.then(Vec::new);
    }

    /// Seconds of each kernel of the last op, in their order; none unless they are timed.
    pub fn kernel_times(&self) -> &[(Kernel, f64)] {
        self.times.as_deref().unwrap_or(&[])
    }

    /// Bytes of device memory that Hessians of `dim` features take at most: two sums, two factors,
    /// and the matrix in 64 bits that one is made from. With a matrix to correct weights by there is
    /// one factor; its inverse comes when the 64 bits are gone.
    pub fn hessian_bytes(dim: usize) -> u64 {
        16 * (dim * dim) as u64 + factor_scratch(dim)
    }

    /// A matrix of zeros, for `what`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver reports.
    pub fn zeros(&self, rows: usize, cols: usize, what: &str) -> Result<DeviceMatrix> {
        let region = DeviceRegion::zeroed(&self.device, 4 * rows * cols, what)?;
        Ok(DeviceMatrix { region, rows, cols })
    }

    /// Copies `[rows, cols]` values to the GPU, for `what`.
    ///
    /// # Errors
    /// [`Error::Argument`] when they are not as many; as [`CudaQuantizer::zeros`].
    pub fn upload(
        &self,
        values: &[f32],
        (rows, cols): (usize, usize),
        what: &str,
    ) -> Result<DeviceMatrix> {
        if values.len() != rows * cols {
            let (want, have) = (rows * cols, values.len());
            return Err(Error::argument(what, want.to_string(), have.to_string()));
        }
        let region = DeviceRegion::alone(&self.device, size_of_val(values), what)?;
        let bytes = bytemuck::cast_slice(values);
        self.device.copy_in(&region, 0, bytes)?;
        Ok(DeviceMatrix { region, rows, cols })
    }

    /// Copies a matrix to the host.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn download(&self, matrix: &DeviceMatrix) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; matrix.rows * matrix.cols];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.device.copy_out(&matrix.region, 0, bytes)?;
        Ok(values)
    }

    /// `h += x^T x` for the F32 rows of `x`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `h` is not square or `x` has no whole rows; what the driver
    /// reports.
    pub fn accumulate(&mut self, h: &mut DeviceMatrix, x: &DeviceRegion) -> Result<()> {
        let (dim, bytes) = (h.cols, h.region.bytes());
        let mut op = Op::HessianSyrk(HessianSyrk {
            x: x.mem(0, x.bytes(), DType::F32)?,
            // SAFETY: `h` is borrowed exclusively, an allocation of its own.
            h: unsafe { h.region.mem_mut(0, bytes, DType::F32) }?,
            rows: x.bytes() / (4 * dim.max(1)),
            dim,
        });
        self.run(&mut op)
    }

    /// `out += alpha (a - minus)^T b`; the number of rows follows from the size of `b`.
    ///
    /// # Errors
    /// [`Error::Argument`] when sizes do not belong together; what the driver reports.
    pub fn add_product(
        &mut self,
        out: &mut DeviceMatrix,
        (a, minus): (&DeviceRegion, Option<&DeviceRegion>),
        b: &DeviceRegion,
        alpha: f32,
    ) -> Result<()> {
        let ((m, n), bytes) = (out.shape(), out.region.bytes());
        let mut op = Op::TransposedProduct(TransposedProduct {
            a: whole(a, DType::F32)?,
            minus: minus.map(|r| whole(r, DType::F32)).transpose()?,
            b: whole(b, DType::F32)?,
            // SAFETY: `out` is borrowed exclusively, an allocation of its own.
            out: unsafe { out.region.mem_mut(0, bytes, DType::F32) }?,
            rows: b.bytes() / (4 * n.max(1)),
            m,
            n,
            alpha,
        });
        self.run(&mut op)
    }

    /// `W + alpha (H + lambda I)^-1 M^T W` for a weight `[inputs, outputs]` and a square matrix `M`, with
    /// the factor of `H`.
    ///
    /// # Errors
    /// As [`CudaQuantizer::round`].
    pub fn corrected(
        &mut self,
        weight: &DeviceMatrix,
        (m, alpha): (&DeviceMatrix, f32),
        factor: &DeviceFactor,
    ) -> Result<DeviceMatrix> {
        let ((k, n), what) = (weight.shape(), "what rounding aims at");
        // What factoring needed would lie idle beside the inverse.
        self.scratch = None;
        let mut inverse = self.zeros(k, k, "the inverse of a Hessian")?;
        self.accumulate(&mut inverse, factor.upper.region())?;
        let mut product = self.zeros(k, n, what)?;
        self.add_product(&mut product, (m.region(), None), weight.region(), 1.0)?;
        // The factor is that of the packed order.
        let packed = self.gathered(&product, &factor.order)?;
        drop(product);
        let mut out = self.gathered(weight, &factor.order)?;
        self.add_product(&mut out, (inverse.region(), None), packed.region(), alpha)?;
        drop(packed);
        self.gathered(&out, &factor.places)
    }

    /// The rows of a matrix that `index` names.
    fn gathered(&mut self, x: &DeviceMatrix, index: &DeviceRegion) -> Result<DeviceMatrix> {
        let (rows, cols) = x.shape();
        let region =
            DeviceRegion::alone(&self.device, x.region.bytes(), "a matrix in another order")?;
        let mut op = Op::GatherRows(GatherRows {
            x: x.mem()?,
            index: whole(index, DType::I32)?,
            // SAFETY: nothing else has the new region.
            out: unsafe { whole_mut(&region, DType::F32) }?,
            x_rows: rows,
            rows,
            dim: cols,
        });
        self.run(&mut op)?;
        drop(op);
        Ok(DeviceMatrix { region, rows, cols })
    }

    /// The diagonal of a square matrix.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn diagonal(&mut self, h: &DeviceMatrix) -> Result<Vec<f32>> {
        let dim = h.cols;
        let mut all = Vec::with_capacity(dim);
        for first in (0..dim).step_by(DIAGONAL_ROWS) {
            let rows = DIAGONAL_ROWS.min(dim - first);
            let index: Vec<i32> = (0..rows).map(|i| (i * (dim + 1) + first) as i32).collect();
            let index = self.integers(&index)?;
            let out = self.zeros(rows, 1, "a diagonal")?;
            let mut op = Op::GatherRows(GatherRows {
                x: h.region.mem(4 * first * dim, 4 * rows * dim, DType::F32)?,
                index: index.mem(0, 4 * rows, DType::I32)?,
                // SAFETY: nothing else has the new region.
                out: unsafe { out.region.mem_mut(0, 4 * rows, DType::F32) }?,
                x_rows: rows * dim,
                rows,
                dim: 1,
            });
            self.run(&mut op)?;
            all.extend(self.download(&out)?);
        }
        Ok(all)
    }

    /// Factors `scale h + lambda I` with rows and columns in `order`; nothing when the matrix is not
    /// positive definite.
    ///
    /// # Errors
    /// [`Error::Argument`] when `order` is no permutation; as [`CudaQuantizer::zeros`].
    pub fn factor(
        &mut self,
        h: &DeviceMatrix,
        order: &[u32],
        (scale, lambda): (f64, f64),
    ) -> Result<Option<DeviceFactor>> {
        let dim = h.cols;
        check_order(order, dim)?;
        let mut places = vec![0i32; dim];
        for (place, &feature) in (0..).zip(order) {
            places[feature as usize] = place;
        }
        let order: Vec<i32> = order.iter().map(|o| o.cast_signed()).collect();
        let (order, places) = (self.integers(&order)?, self.integers(&places)?);
        let bytes = 4 * dim * dim;
        let region = DeviceRegion::alone(&self.device, bytes, "the factor of a Hessian")?;
        let status = self.integers(&[0])?;
        let mut op = Op::HessianFactor(HessianFactor {
            h: h.mem()?,
            order: order.mem(0, 4 * dim, DType::I32)?,
            // SAFETY: nothing else has the new regions.
            upper: unsafe { region.mem_mut(0, bytes, DType::F32) }?,
            // SAFETY: as above.
            status: unsafe { status.mem_mut(0, 4, DType::I32) }?,
            dim,
            scale,
            lambda,
        });
        self.run(&mut op)?;
        let mut good = [0i32];
        let bytes = bytemuck::cast_slice_mut(&mut good);
        self.device.copy_out(&status, 0, bytes)?;
        let upper = DeviceMatrix {
            region,
            rows: dim,
            cols: dim,
        };
        Ok((good[0] == 1).then_some(DeviceFactor {
            upper,
            order,
            places,
        }))
    }

    /// Rounds `weight` (`[inputs, outputs]`).
    ///
    /// # Errors
    /// [`Error::Argument`] when sizes do not belong together; as [`CudaQuantizer::zeros`].
    pub fn round(
        &mut self,
        weight: &DeviceMatrix,
        factor: &DeviceFactor,
        groups: &[GptqGroup],
    ) -> Result<DeviceCodes> {
        let (inputs, outputs) = weight.shape();
        let region = |bytes: usize| DeviceRegion::alone(&self.device, bytes, "a quantized matrix");
        let out = DeviceCodes {
            codes: region(inputs * outputs)?,
            scale_codes: region(groups.len() * outputs)?,
            scale_max: region(4 * groups.len())?,
            decoded: DeviceMatrix {
                region: region(4 * inputs * outputs)?,
                rows: inputs,
                cols: outputs,
            },
        };
        // SAFETY: nothing else has the new regions.
        let new = |region, dtype| unsafe { whole_mut(region, dtype) };
        let mut op = Op::Gptq(Gptq {
            weight: weight.mem()?,
            upper: factor.upper.mem()?,
            order: whole(&factor.order, DType::I32)?,
            groups,
            codes: new(&out.codes, DType::U8)?,
            scale_codes: new(&out.scale_codes, DType::U8)?,
            scale_max: new(&out.scale_max, DType::I32)?,
            decoded: new(&out.decoded.region, DType::F32)?,
            inputs,
            outputs,
        });
        self.run(&mut op)?;
        drop(op);
        Ok(out)
    }

    /// Betters the codes of `rounded`, made of `weight` with the order of `factor`, in `rounds` rounds
    /// against `scale h + lambda I`.
    ///
    /// # Errors
    /// As [`CudaQuantizer::round`].
    pub fn refine(
        &mut self,
        weight: &DeviceMatrix,
        (h, scale, lambda): (&DeviceMatrix, f64, f64),
        factor: &DeviceFactor,
        (groups, rounds): (&[GptqGroup], usize),
        rounded: &DeviceCodes,
    ) -> Result<DeviceCodes> {
        let (inputs, outputs) = weight.shape();
        let region = |bytes: usize| DeviceRegion::alone(&self.device, bytes, "a quantized matrix");
        let new = DeviceCodes {
            codes: region(inputs * outputs)?,
            scale_codes: rounded.scale_codes.clone(),
            scale_max: rounded.scale_max.clone(),
            decoded: DeviceMatrix {
                region: region(4 * inputs * outputs)?,
                rows: inputs,
                cols: outputs,
            },
        };
        let mut op = Op::Refine(Refine {
            weight: weight.mem()?,
            h: h.mem()?,
            order: whole(&factor.order, DType::I32)?,
            groups,
            codes: whole(&rounded.codes, DType::U8)?,
            scale_codes: whole(&rounded.scale_codes, DType::U8)?,
            scale_max: whole(&rounded.scale_max, DType::I32)?,
            decoded: rounded.decoded.mem()?,
            // SAFETY: nothing else has the new regions.
            new_codes: unsafe { whole_mut(&new.codes, DType::U8) }?,
            // SAFETY: as above.
            new_decoded: unsafe { whole_mut(&new.decoded.region, DType::F32) }?,
            inputs,
            outputs,
            rounds,
            scale,
            lambda,
        });
        self.run(&mut op)?;
        drop(op);
        Ok(new)
    }

    /// Copies codes and scales to the host.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn codes(&self, from: &DeviceCodes) -> Result<HostCodes> {
        let bytes = |region: &DeviceRegion| -> Result<Vec<u8>> {
            let mut bytes = vec![0; region.bytes()];
            self.device.copy_out(region, 0, &mut bytes)?;
            Ok(bytes)
        };
        let maxima = bytes(&from.scale_max)?;
        let words = maxima.as_chunks::<4>().0.iter();
        let words: Vec<u32> = words.map(|&w| u32::from_le_bytes(w)).collect();
        Ok(HostCodes {
            codes: bytes(&from.codes)?,
            scale_codes: bytes(&from.scale_codes)?,
            scale_max: words.iter().map(|&w| w as u16).collect(),
            underflows: words.iter().filter(|&w| w >> 16 != 0).count(),
        })
    }

    /// `scale tr(D^T h D)` with `D = a - b`, or `a` alone.
    ///
    /// # Errors
    /// [`Error::Argument`] when sizes do not belong together; what the driver reports.
    pub fn loss(
        &mut self,
        h: &DeviceMatrix,
        scale: f64,
        a: &DeviceMatrix,
        b: Option<&DeviceMatrix>,
    ) -> Result<f64> {
        let out = self.zeros(1, 1, "a loss")?;
        let mut op = Op::HessianLoss(HessianLoss {
            h: h.mem()?,
            a: a.mem()?,
            b: b.map(DeviceMatrix::mem).transpose()?,
            // SAFETY: nothing else has the new region.
            out: unsafe { out.region.mem_mut(0, 4, DType::F32) }?,
            dim: a.rows,
            columns: a.cols,
            scale,
        });
        self.run(&mut op)?;
        Ok(f64::from(self.download(&out)?[0]))
    }

    fn integers(&self, values: &[i32]) -> Result<DeviceRegion> {
        let region = DeviceRegion::alone(&self.device, size_of_val(values), "indices")?;
        let bytes = bytemuck::cast_slice(values);
        self.device.copy_in(&region, 0, bytes)?;
        Ok(region)
    }

    /// Runs an op over device memory and waits for it.
    fn run(&mut self, op: &mut Op<'_>) -> Result<()> {
        let props = self.device.props();
        let bytes = scratch_bytes(op, props) as usize;
        if self.scratch.as_ref().is_none_or(|s| s.bytes() < bytes) {
            // The old memory goes first: both together may not fit.
            self.scratch = None;
            let what = "scratch memory of the quantizer";
            self.scratch = Some(DeviceRegion::alone(&self.device, bytes.max(256), what)?);
        }
        let scratch = self.scratch.as_ref().expect("set above");
        let target = Target {
            props,
            scratch: Scratch {
                address: scratch.address(),
                bytes: scratch.bytes() as u64,
                counters: self.counters.address(),
            },
            deterministic: false,
        };
        let mut launches = Vec::new();
        lower(op, &target, &mut launches)?;
        // SAFETY: the op borrows its regions, scratch and counters are held here, and this function
        // waits for the launches.
        let ready = launches.iter().map(|l| unsafe { self.device.ready(l) });
        let ready = ready.collect::<Result<Vec<ReadyLaunch>>>()?;
        if let Some(times) = &mut self.times {
            *times = time_each(&self.device, &ready)?;
            return Ok(());
        }
        let overlap = self.device.overlaps_launches();
        self.device.stream().launch_all(&ready, overlap)?;
        self.device.synchronize()
    }
}

/// Runs launches one after the other, each between two events.
fn time_each(device: &Device, launches: &[ReadyLaunch]) -> Result<Vec<(Kernel, f64)>> {
    let mut events = vec![Event::new(device)?];
    let stream = device.stream();
    stream.record(&events[0])?;
    for launch in launches {
        stream.launch(launch, false)?;
        let event = Event::new(device)?;
        stream.record(&event)?;
        events.push(event);
    }
    stream.synchronize()?;
    let pairs = launches.iter().zip(events.windows(2));
    pairs
        .map(|(launch, pair)| {
            let seconds = f64::from(pair[1].elapsed_ms(&pair[0])?) / 1e3;
            Ok((launch.kernel(), seconds))
        })
        .collect()
}

fn check_order(order: &[u32], dim: usize) -> Result<()> {
    let mut seen = vec![false; dim];
    let fresh = |&o: &u32| {
        let seen = seen.get_mut(o as usize);
        seen.is_some_and(|s| !std::mem::replace(s, true))
    };
    if order.len() == dim && order.iter().all(fresh) {
        return Ok(());
    }
    let what = format!("a permutation of {dim} features");
    Err(Error::argument("order", what, "something else"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations() {
        assert!(check_order(&[2, 0, 1], 3).is_ok());
        for bad in [&[0, 1][..], &[0, 1, 1], &[0, 1, 3], &[0, 1, 2, 3]] {
            assert!(check_order(bad, 3).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn memory_of_a_hessian_is_known() {
        let k = 4096u64;
        let want = (16 + 8) * k * k + 8 * 64 * k;
        assert_eq!(CudaQuantizer::hessian_bytes(4096), want);
    }
}
