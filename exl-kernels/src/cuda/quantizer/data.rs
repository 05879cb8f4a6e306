//! What the quantizer keeps in device memory.

use crate::cuda::DeviceRegion;
use crate::{DType, Mem, MemMut, Result};

/// A row-major F32 matrix in device memory.
#[derive(Clone, Debug)]
pub struct DeviceMatrix {
    pub(super) region: DeviceRegion,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl DeviceMatrix {
    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Its values, row after row.
    pub fn region(&self) -> &DeviceRegion {
        &self.region
    }

    pub(super) fn mem(&self) -> Result<Mem<'_>> {
        self.region.mem(0, self.region.bytes(), DType::F32)
    }
}

/// The factor of a Hessian's inverse, with the order of its rows.
#[derive(Clone, Debug)]
pub struct DeviceFactor {
    pub(super) upper: DeviceMatrix,
    pub(super) order: DeviceRegion,
    /// Where each feature is in that order.
    pub(super) places: DeviceRegion,
}

/// A rounded matrix in device memory.
#[derive(Debug)]
pub struct DeviceCodes {
    pub(super) codes: DeviceRegion,
    pub(super) scale_codes: DeviceRegion,
    pub(super) scale_max: DeviceRegion,
    pub(super) decoded: DeviceMatrix,
}

impl DeviceCodes {
    /// `[inputs, outputs]`: what every decoder makes of the codes, in the order of the features.
    pub fn decoded(&self) -> &DeviceMatrix {
        &self.decoded
    }
}

/// A rounded matrix on the host, as [`Gptq`](crate::ops::Gptq) describes its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCodes {
    /// `[inputs, outputs]` in packed order.
    pub codes: Vec<u8>,
    /// `[groups, outputs]`.
    pub scale_codes: Vec<u8>,
    /// `[groups]`: bits of the binary16 maxima.
    pub scale_max: Vec<u16>,
    /// Groups whose wanted maximum lies below the smallest of the format.
    pub underflows: usize,
}

/// All of a region.
pub(super) fn whole(region: &DeviceRegion, dtype: DType) -> Result<Mem<'_>> {
    region.mem(0, region.bytes(), dtype)
}

/// All of a region, to write.
///
/// # Safety
/// Nothing else may use the region meanwhile.
pub(super) unsafe fn whole_mut(region: &DeviceRegion, dtype: DType) -> Result<MemMut<'_>> {
    // SAFETY: the caller's promise.
    unsafe { region.mem_mut(0, region.bytes(), dtype) }
}
