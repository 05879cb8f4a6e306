//! Norms: the sums of a row first, then its values stretch by stretch, since the output may be an input.

use super::{Rows, STRETCH, add, for_rows, readable, stretches};
use crate::Result;
use crate::cpu::dense::Dense;
use crate::cpu::{Cpu, Isa};
use crate::ops::{LayerNorm, RmsNorm};

/// A function compiled for every instruction set, of which one is chosen when it is called.
macro_rules! dispatch {
    ($name:ident = $any:ident($($arg:ident: $kind:ty),*) $(-> $out:ty)?) => {
        fn $name($($arg: $kind,)* isa: Isa) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            unsafe fn avx512($($arg: $kind),*) $(-> $out)? {
                $any($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $kind),*) $(-> $out)? {
                $any($($arg),*)
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::Avx512` is only made after detection.
                Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => $any($($arg),*),
            }
        }
    };
}

dispatch!(rms = rms_any(row: &[f32], eps: f32) -> Sums);
dispatch!(moments = moments_any(row: &[f32], eps: f32) -> Sums);
dispatch!(scale = scale_any(row: &mut [f32], sums: Sums, weight: &[f32]));

/// What is subtracted from the values of a row, and what they are then multiplied by.
#[derive(Clone, Copy)]
struct Sums {
    shift: f32,
    factor: f32,
}

/// The sum of `term` over a row, in lanes.
#[inline(always)]
fn sum(row: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(0.0, |sum, &v| term(v, sum));
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = term(*v, *lane);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[inline(always)]
fn rms_any(row: &[f32], eps: f32) -> Sums {
    let squares = sum(row, |v, sum| v.mul_add(v, sum));
    Sums {
        shift: 0.0,
        factor: 1.0 / (squares / row.len() as f32 + eps).sqrt(),
    }
}

#[inline(always)]
fn moments_any(row: &[f32], eps: f32) -> Sums {
    let shift = sum(row, |v, sum| v + sum) / row.len() as f32;
    let squares = sum(row, |v, sum| (v - shift).mul_add(v - shift, sum));
    Sums {
        shift,
        factor: 1.0 / (squares / row.len() as f32 + eps).sqrt(),
    }
}

#[inline(always)]
fn scale_any(row: &mut [f32], sums: Sums, weight: &[f32]) {
    for (v, w) in row.iter_mut().zip(weight) {
        *v = (*v - sums.shift) * sums.factor * w;
    }
}

/// Weights in 32-bit floats and where rows are.
struct Norm<'a> {
    x: Rows<f32>,
    residual: Option<Rows<f32>>,
    out: Rows<f32>,
    dim: usize,
    /// `[groups, dim]`.
    weight: &'a [f32],
    /// `[groups, dim]`.
    bias: Option<&'a [f32]>,
    isa: Isa,
}

impl Norm<'_> {
    /// Writes row `r`.
    ///
    /// # Safety
    /// In bounds, and no other task writes the row of any operand.
    unsafe fn row(&self, r: usize, sums: impl Fn(&[f32], Isa) -> Sums) {
        let start = r * self.dim;
        // SAFETY: the caller's promise; the row is not written while it is borrowed.
        let sums = sums(unsafe { self.x.shared(start, self.dim) }, self.isa);
        // No weight has no elements: then the row has none either.
        let group = start % self.weight.len().max(1);
        let (mut values, mut more) = ([0f32; STRETCH], [0f32; STRETCH]);
        for (first, count) in stretches(self.dim) {
            let (values, at) = (&mut values[..count], group + first);
            // SAFETY: the caller's promise.
            unsafe { self.x.copy(start + first, values) };
            scale(values, sums, &self.weight[at..at + count], self.isa);
            if let Some(bias) = self.bias {
                add(values, &bias[at..at + count]);
            }
            if let Some(residual) = &self.residual {
                // SAFETY: the caller's promise.
                unsafe { residual.copy(start + first, &mut more[..count]) };
                add(values, &more[..count]);
            }
            // SAFETY: the caller's promise.
            unsafe { self.out.range(start + first, count) }.copy_from_slice(values);
        }
    }
}

/// Scratch words of an RMS norm: its weight, widened.
pub(in crate::cpu) fn rms_norm_words(op: &RmsNorm<'_>) -> usize {
    op.dim
}

pub(in crate::cpu) fn rms_norm(op: &mut RmsNorm<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, eps, offset, isa) = (op.dim, op.eps, op.offset, cpu.isa());
    let x = readable(&op.x)?;
    let residual = op.residual.as_ref().map(readable).transpose()?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    let source = Dense::new(&op.weight)?;
    cpu.scratch(rms_norm_words(op), |scratch| {
        let weight: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        source.copy_to(0, weight, isa);
        weight.iter_mut().for_each(|w| *w += offset);
        let norm = Norm {
            x,
            residual,
            out,
            dim,
            weight,
            bias: None,
            isa,
        };
        for_rows(cpu, op.rows, dim, |r| {
            // SAFETY: `check` bounded the rows; each task has its own, and operands are the same
            // row or do not overlap.
            unsafe { norm.row(r, |row, isa| rms(row, eps, isa)) };
        });
    });
    Ok(())
}

/// Scratch words of a layer norm: its weight and its bias, widened.
pub(in crate::cpu) fn layer_norm_words(op: &LayerNorm<'_>) -> usize {
    op.groups * op.dim * (1 + usize::from(op.bias.is_some()))
}

pub(in crate::cpu) fn layer_norm(op: &mut LayerNorm<'_>, cpu: &Cpu) -> Result<()> {
    let (dim, eps, isa) = (op.dim, op.eps, cpu.isa());
    let x = readable(&op.x)?;
    let out = Rows(op.out.slice_mut::<f32>()?.as_mut_ptr());
    let source = op.weight.as_ref().map(Dense::new).transpose()?;
    let shift = op.bias.as_ref().map(Dense::new).transpose()?;
    cpu.scratch(layer_norm_words(op), |scratch| {
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        let (weight, bias) = scratch.split_at_mut(op.groups * dim);
        match source {
            Some(source) => source.copy_to(0, weight, isa),
            None => weight.fill(1.0),
        }
        if let Some(source) = &shift {
            source.copy_to(0, bias, isa);
        }
        let norm = Norm {
            x,
            residual: None,
            out,
            dim,
            weight,
            bias: shift.is_some().then_some(bias),
            isa,
        };
        for_rows(cpu, op.rows, dim, |r| {
            // SAFETY: `check` bounded the rows; each task has its own, and source and target are
            // the same row or do not overlap.
            unsafe { norm.row(r, |row, isa| moments(row, eps, isa)) };
        });
    });
    Ok(())
}
