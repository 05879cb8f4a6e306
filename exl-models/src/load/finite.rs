//! Looking for NaN and infinity.

use exl_tensor::DType;

use exl_format::TensorView;

use super::read::dtype;
use crate::{Error, Result};

/// Tensors up to this size are looked through on every load.
const FULL_BYTES: usize = 8 << 20;
/// Of larger ones, this many evenly spaced samples of [`SAMPLE_BYTES`].
const SAMPLES: usize = 256;
const SAMPLE_BYTES: usize = 4096;

/// Looks at every value of a dense tensor: damaged downloads and overflowed casts show as NaN or
/// infinity. The converter runs it before it spends hours; loading only samples large tensors.
///
/// # Errors
/// [`Error::NotFinite`] with the position of the first such value.
pub fn check_finite(view: &TensorView) -> Result<()> {
    check_range(view, 0, view.data.len())
}

/// Looks at all of a small tensor and at samples of a large one.
pub(super) fn spot_check(view: &TensorView) -> Result<()> {
    let bytes = view.data.len();
    if bytes <= FULL_BYTES {
        return check_finite(view);
    }
    let stride = bytes / SAMPLES / SAMPLE_BYTES * SAMPLE_BYTES;
    (0..SAMPLES).try_for_each(|i| check_range(view, i * stride, i * stride + SAMPLE_BYTES))
}

fn check_range(view: &TensorView, start: usize, end: usize) -> Result<()> {
    let dtype = dtype(view)?;
    let bytes = &view.data[start..end];
    let width = dtype.bytes();
    let Some(found) = bytes.chunks_exact(width).position(|v| !is_finite(dtype, v)) else {
        return Ok(());
    };
    Err(Error::NotFinite {
        file: view.file.clone(),
        name: view.name.clone(),
        index: start / width + found,
        value: value(dtype, &bytes[found * width..][..width]),
    })
}

/// All exponent bits set means NaN or infinity in every IEEE-like format.
fn is_finite(dtype: DType, v: &[u8]) -> bool {
    match dtype {
        DType::F32 => f32::from_le_bytes([v[0], v[1], v[2], v[3]]).is_finite(),
        DType::F16 => u16::from_le_bytes([v[0], v[1]]) & 0x7c00 != 0x7c00,
        DType::Bf16 => u16::from_le_bytes([v[0], v[1]]) & 0x7f80 != 0x7f80,
        DType::I32 | DType::U8 => true,
    }
}

fn value(dtype: DType, v: &[u8]) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([v[0], v[1], v[2], v[3]]),
        DType::F16 => half::f16::from_le_bytes([v[0], v[1]]).to_f32(),
        DType::Bf16 => half::bf16::from_le_bytes([v[0], v[1]]).to_f32(),
        DType::I32 | DType::U8 => 0.0,
    }
}
