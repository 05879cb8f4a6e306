//! Products with unquantized matrices.

use gemm::{Parallelism, gemm};
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

/// `out[r, c] = sum_k x[r, k] w[c, k]` for the columns `first..first + columns` of a matrix;
/// `tile` holds those columns as f32 `[columns, inputs]`, `out` is `[rows, stride]`.
pub(super) fn columns(
    x: &[f32],
    tile: &[f32],
    out: &mut [f32],
    (rows, inputs, stride): (usize, usize, usize),
) {
    let columns = tile.len() / inputs;
    assert!(columns <= stride && out.len() >= rows * stride && x.len() >= rows * inputs);
    // SAFETY: the assertion bounds every access; `out` is exclusively borrowed.
    unsafe {
        gemm(
            rows,
            columns,
            inputs,
            out.as_mut_ptr(),
            1,
            stride as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            tile.as_ptr(),
            inputs as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Dot products of one row with some columns, straight from the storage type.
pub(super) fn dots(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32], isa: Isa) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is only made after detection.
        Isa::Avx512 => unsafe { dots_avx512(w, first, x, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { dots_avx2(w, first, x, out) },
        _ => dots_any(w, first, x, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn dots_avx512(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    dots_any(w, first, x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_avx2(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    dots_any(w, first, x, out);
}

/// Independent partial sums: enough for two registers of 16 and their latency.
const LANES: usize = 64;

#[inline(always)]
fn dots_any(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    let k = x.len();
    for (c, out) in out.iter_mut().enumerate() {
        let at = (first + c) * k;
        *out = match w {
            Dense::F32(v) => dot(&v[at..at + k], x, |v| v),
            Dense::F16(v) => dot_halves(&v[at..at + k], x),
            Dense::Bf16(v) => {
                let v: &[u16] = bytemuck::cast_slice(&v[at..at + k]);
                dot(v, x, |v| f32::from_bits(u32::from(v) << 16))
            }
        };
    }
}

#[inline(always)]
fn dot<T: Copy>(w: &[T], x: &[f32], value: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (w_chunks, x_chunks) = (w.chunks_exact(LANES), x.chunks_exact(LANES));
    let tail: f32 = w_chunks
        .remainder()
        .iter()
        .zip(x_chunks.remainder())
        .map(|(&w, x)| value(w) * x)
        .sum();
    for (w, x) in w_chunks.zip(x_chunks) {
        for i in 0..LANES {
            lanes[i] = value(w[i]).mul_add(x[i], lanes[i]);
        }
    }
    fold(&mut lanes) + tail
}

#[inline(always)]
fn dot_halves(w: &[f16], x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut wide = [0f32; LANES];
    let (w_chunks, x_chunks) = (w.chunks_exact(LANES), x.chunks_exact(LANES));
    let rest = w_chunks.remainder().iter().zip(x_chunks.remainder());
    let tail: f32 = rest.map(|(w, x)| w.to_f32() * x).sum();
    for (w, x) in w_chunks.zip(x_chunks) {
        w.convert_to_f32_slice(&mut wide);
        for i in 0..LANES {
            lanes[i] = wide[i].mul_add(x[i], lanes[i]);
        }
    }
    fold(&mut lanes) + tail
}

#[inline(always)]
fn fold(lanes: &mut [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}
