//! Products with unquantized matrices.

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

/// Dot products of one row with some columns, straight from the storage type.
pub(super) fn dots(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32], isa: Isa) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is only made after detection.
        Isa::Avx512 => unsafe { dots_avx512(w, first, x, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { dots_avx2(w, first, x, out) },
        _ => dots_any::<false>(w, first, x, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn dots_avx512(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    dots_any::<true>(w, first, x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_avx2(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    dots_any::<true>(w, first, x, out);
}

/// Dot products of one column, widened, with every row of `x`; that of row `r` goes to
/// `out[r * stride]`. Bit for bit what [`dots`] gives.
pub(super) fn dots_with(column: &[f32], x: &[f32], (out, stride): (&mut [f32], usize), isa: Isa) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is only made after detection.
        Isa::Avx512 => unsafe { dots_with_avx512(column, x, out, stride) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { dots_with_avx2(column, x, out, stride) },
        _ => dots_with_any::<false>(column, x, out, stride),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn dots_with_avx512(column: &[f32], x: &[f32], out: &mut [f32], stride: usize) {
    dots_with_any::<true>(column, x, out, stride);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_with_avx2(column: &[f32], x: &[f32], out: &mut [f32], stride: usize) {
    dots_with_any::<true>(column, x, out, stride);
}

#[inline(always)]
fn dots_with_any<const FUSED: bool>(column: &[f32], x: &[f32], out: &mut [f32], stride: usize) {
    let rows = x.chunks_exact(column.len());
    for (x, out) in rows.zip(out.iter_mut().step_by(stride)) {
        *out = dot::<f32, FUSED>(column, x, |v| v);
    }
}

/// Independent partial sums: enough for two registers of 16 and their latency.
const LANES: usize = 64;

#[inline(always)]
fn dots_any<const FUSED: bool>(w: &Dense<'_>, first: usize, x: &[f32], out: &mut [f32]) {
    let k = x.len();
    for (c, out) in out.iter_mut().enumerate() {
        let at = (first + c) * k;
        *out = match w {
            Dense::F32(v) => dot::<f32, FUSED>(&v[at..at + k], x, |v| v),
            Dense::F16(v) => dot_halves::<FUSED>(&v[at..at + k], x),
            Dense::Bf16(v) => {
                let v: &[u16] = bytemuck::cast_slice(&v[at..at + k]);
                dot::<u16, FUSED>(v, x, |v| f32::from_bits(u32::from(v) << 16))
            }
        };
    }
}

#[inline(always)]
fn dot<T: Copy, const FUSED: bool>(w: &[T], x: &[f32], value: impl Fn(T) -> f32) -> f32 {
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
            lanes[i] = multiply_add::<FUSED>(value(w[i]), x[i], lanes[i]);
        }
    }
    fold(&mut lanes) + tail
}

#[inline(always)]
fn dot_halves<const FUSED: bool>(w: &[f16], x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut wide = [0f32; LANES];
    let (w_chunks, x_chunks) = (w.chunks_exact(LANES), x.chunks_exact(LANES));
    let rest = w_chunks.remainder().iter().zip(x_chunks.remainder());
    let tail: f32 = rest.map(|(w, x)| w.to_f32() * x).sum();
    for (w, x) in w_chunks.zip(x_chunks) {
        w.convert_to_f32_slice(&mut wide);
        for i in 0..LANES {
            lanes[i] = multiply_add::<FUSED>(wide[i], x[i], lanes[i]);
        }
    }
    fold(&mut lanes) + tail
}

/// `a b + c`; fused only where the processor does it: in software it takes a hundred times longer.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
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
