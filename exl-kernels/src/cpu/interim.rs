//! Products through f32 GEMM tiles.

use gemm::{Parallelism, gemm};
use half::{bf16, f16};

use super::Cpu;
use crate::ops::{Activation, GateUp, HessianSyrk, Linear, Matrix};
use crate::{DType, Error, Mem, Result};

fn floats(mem: &Mem<'_>) -> Result<Vec<f32>> {
    Ok(match mem.dtype() {
        DType::F32 => mem.slice::<f32>()?.to_vec(),
        DType::F16 => mem.slice::<f16>()?.iter().map(|v| v.to_f32()).collect(),
        DType::Bf16 => mem.slice::<bf16>()?.iter().map(|v| v.to_f32()).collect(),
        other => {
            return Err(Error::argument(
                "region",
                "a float type",
                format!("{other:?}"),
            ));
        }
    })
}

/// `[rows, outputs]`.
fn product(
    x: &[f32],
    w: &Matrix<'_>,
    bias: &Option<Mem<'_>>,
    rows: usize,
    inputs: usize,
    outputs: usize,
) -> Result<Vec<f32>> {
    let mut y = vec![0f32; rows * outputs];
    let (values, row, col) = match w {
        Matrix::Dense(mem) => (floats(mem)?, 1isize, inputs as isize),
        Matrix::Quant(q) => {
            let mut v = vec![0f32; q.inputs() * q.outputs()];
            q.dequantize(&mut v)?;
            let n = q.outputs() as isize;
            (v, n, 1)
        }
    };
    // SAFETY: the three matrices are vectors of the given shapes, and do not overlap.
    unsafe {
        gemm(
            rows,
            outputs,
            inputs,
            y.as_mut_ptr(),
            1,
            outputs as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            values.as_ptr(),
            col,
            row,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    if let Some(b) = bias {
        let b = floats(b)?;
        for r in y.chunks_exact_mut(outputs) {
            r.iter_mut().zip(&b).for_each(|(a, b)| *a += b);
        }
    }
    Ok(y)
}

pub(super) fn linear(op: &mut Linear<'_>, _: &Cpu) -> Result<()> {
    let x = op.x.slice::<f32>()?;
    for p in &mut op.parts {
        let mut y = product(x, &p.matrix, &p.bias, op.rows, op.inputs, p.outputs)?;
        if let Some(r) = &p.residual {
            y.iter_mut()
                .zip(r.slice::<f32>()?)
                .for_each(|(a, b)| *a += b);
        }
        p.out.slice_mut::<f32>()?.copy_from_slice(&y);
    }
    Ok(())
}

pub(super) fn gate_up(op: &mut GateUp<'_>, _: &Cpu) -> Result<()> {
    let x = op.x.slice::<f32>()?;
    let g = product(x, &op.gate, &op.gate_bias, op.rows, op.inputs, op.outputs)?;
    let u = product(x, &op.up, &op.up_bias, op.rows, op.inputs, op.outputs)?;
    let act = op.act;
    for ((o, g), u) in op.out.slice_mut::<f32>()?.iter_mut().zip(&g).zip(&u) {
        *o = u * match act {
            Activation::Silu => g / (1.0 + (-g).exp()),
            _ => {
                return Err(Error::Unsupported {
                    op: "gate_up",
                    what: format!("{act:?}"),
                });
            }
        };
    }
    Ok(())
}

pub(super) fn syrk(op: &mut HessianSyrk<'_>, _: &Cpu) -> Result<()> {
    let (n, rows) = (op.dim, op.rows);
    let x = op.x.slice::<f32>()?;
    let h = op.h.slice_mut::<f32>()?;
    // SAFETY: shapes were checked; h does not overlap x.
    unsafe {
        gemm(
            n,
            n,
            rows,
            h.as_mut_ptr(),
            1,
            n as isize,
            true,
            x.as_ptr(),
            n as isize,
            1,
            x.as_ptr(),
            1,
            n as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    Ok(())
}
