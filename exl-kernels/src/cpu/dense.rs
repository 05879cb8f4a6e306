//! Unquantized matrices and products with them.

mod tile;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Isa;
use crate::{DType, Error, Mem, Result};

/// A `[outputs, inputs]` matrix in its storage type.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dense<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Dense<'a> {
    pub(super) fn new(mem: &Mem<'a>) -> Result<Self> {
        Ok(match mem.dtype() {
            DType::F32 => Dense::F32(mem.slice()?),
            DType::F16 => Dense::F16(mem.slice()?),
            DType::Bf16 => Dense::Bf16(mem.slice()?),
            other => {
                return Err(Error::argument(
                    "matrix",
                    "a float type",
                    format!("{other:?}"),
                ));
            }
        })
    }

    /// Elements `from..from + to.len()` as f32.
    pub(super) fn copy_to(&self, from: usize, to: &mut [f32], isa: Isa) {
        match self {
            Dense::F32(v) => to.copy_from_slice(&v[from..from + to.len()]),
            Dense::F16(v) => v[from..from + to.len()].convert_to_f32_slice(to),
            Dense::Bf16(v) => {
                let v: &[u16] = bytemuck::cast_slice(&v[from..from + to.len()]);
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: `Isa::Avx512` is only made after detection.
                    Isa::Avx512 => unsafe { widen_avx512(v, to) },
                    _ => widen(v, to),
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen_avx512(v: &[u16], to: &mut [f32]) {
    widen(v, to);
}

#[inline(always)]
fn widen(v: &[u16], to: &mut [f32]) {
    for (to, v) in to.iter_mut().zip(v) {
        *to = f32::from_bits(u32::from(*v) << 16);
    }
}

/// Products of every row of `x` (`[rows, inputs]`) with the columns `first..first + columns` of `w`;
/// that of row `r` and the `c`-th of them goes to `out[r * stride + c]`.
///
/// An element's sum has one order, whatever the other rows and columns are.
pub(super) fn products(
    w: &Dense<'_>,
    (first, columns): (usize, usize),
    (x, inputs): (&[f32], usize),
    (out, stride): (&mut [f32], usize),
    isa: Isa,
) {
    let rows = x.len() / inputs;
    let range = first * inputs..(first + columns) * inputs;
    assert!(rows == 0 || out.len() >= (rows - 1) * stride + columns);
    let shape = tile::Shape {
        columns,
        rows,
        inputs,
        x: x.as_ptr(),
        out: out.as_mut_ptr(),
        stride,
    };
    // SAFETY: the slices have what the shape says: `range` and the assertion above.
    unsafe {
        match w {
            Dense::F32(w) => tile::run(w[range].as_ptr(), &shape, isa),
            Dense::F16(w) => tile::run(w[range].as_ptr(), &shape, isa),
            Dense::Bf16(w) => tile::run(w[range].as_ptr(), &shape, isa),
        }
    }
}
