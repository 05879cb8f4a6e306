//! Ops that work row by row.

use super::data::{Exl2, Rng, STORAGE, Stored};
use super::{Case, Run};
use crate::ops::{
    Activation, Clamp, Dequant, Embed, Gated, GatherRows, HessianSyrk, LayerNorm, Matrix, Op,
    RmsNorm, ScaleLogits, ScaleRows,
};
use crate::{DType, GptqParts, Mem, MemMut, QuantMatrix, Result};

pub(super) fn cases() -> Vec<Case> {
    let mut list = Vec::new();
    for dtype in STORAGE {
        for (rows, dim) in [(1, 1), (3, 64), (7, 257), (40, 512)] {
            list.extend([false, true].map(|add| embed(dtype, (rows, dim), add)));
            list.push(rms_norm(dtype, (rows, dim), false));
            list.push(rms_norm(dtype, (rows, dim), true));
            list.push(rms_norm_add(dtype, (rows, dim)));
        }
        // Head norms, and rows that take whole blocks of a GPU.
        for (rows, dim) in [
            (333, 128),
            (5, 1000),
            (2, 4096),
            (3, 5120),
            (1, 16384),
            (2, 17000),
        ] {
            list.extend([false, true].map(|add| embed(dtype, (rows, dim), add)));
            list.push(rms_norm(dtype, (rows, dim), rows == 2));
            list.push(rms_norm_add(dtype, (rows, dim)));
        }
    }
    list.extend(layer_norms());
    for (rows, dim) in [(1, 5), (9, 130)] {
        list.push(gather_rows(rows, dim));
        list.push(scale_logits(rows, dim, 0.0));
        list.push(scale_logits(rows, dim, 30.0));
        list.push(clamp(rows, dim));
    }
    for (rows, dim) in [(1, 5), (9, 130), (3, 1536), (2, 5000)] {
        for columns in [0, 1, 3] {
            list.extend([false, true].map(|add| scale_rows((rows, dim), columns, add)));
        }
        for act in [
            Activation::Silu,
            Activation::GeluTanh,
            Activation::Gelu,
            Activation::Sigmoid,
            Activation::Relu2,
        ] {
            list.extend([false, true].map(|up| gated((rows, dim), act, up)));
        }
    }
    for (rows, dim) in [(1, 3), (50, 64), (33, 200), (300, 450)] {
        list.push(hessian(rows, dim));
    }
    list.push(dequant());
    list.push(dequant_gptq());
    list
}

/// One vector as the output of an op and as one of its inputs, for ops that allow that.
fn shared(values: &mut [f32]) -> (MemMut<'_>, Mem<'_>) {
    let (place, bytes) = (crate::Place::Host, size_of_val(values));
    let start = values.as_mut_ptr();
    // SAFETY: the slice is borrowed as long as both regions; the op allows them to coincide.
    let target = unsafe { MemMut::from_raw(start.cast(), bytes, DType::F32, place) };
    // SAFETY: as above.
    let source = unsafe { Mem::from_raw(start.cast_const().cast(), bytes, DType::F32, place) };
    (target, source)
}

fn embed(dtype: DType, (rows, dim): (usize, usize), add: bool) -> Case {
    let name = format!("embed::{dtype:?}/rows={rows}/dim={dim}/add={add}");
    // Measured up to 6.6e-8: a copy, one product, one sum.
    Case::new(name, 2e-7, move |run| {
        let mut rng = Rng::new(1);
        let vocab = 37;
        let table = Stored::new(&rng.floats(vocab * dim), dtype);
        let ids: Vec<i32> = (0..rows).map(|_| rng.below(vocab) as i32).collect();
        let mut out = match add {
            true => rng.floats(rows * dim),
            false => vec![f32::NAN; rows * dim],
        };
        let (target, source) = shared(&mut out);
        run(&mut Op::Embed(Embed {
            ids: Mem::host(&ids),
            table: table.mem(),
            add: add.then_some(source),
            out: target,
            rows,
            vocab,
            dim,
            scale: 1.5,
        }))?;
        Ok(vec![out])
    })
}

fn rms_norm(dtype: DType, (rows, dim): (usize, usize), in_place: bool) -> Case {
    let place = if in_place { "/in_place" } else { "" };
    let name = format!("rms_norm::{dtype:?}/rows={rows}/dim={dim}{place}");
    // Measured up to 3.0e-7.
    Case::new(name, 1e-6, move |run| {
        let mut rng = Rng::new(2);
        let weight = Stored::new(&rng.floats(dim), dtype);
        let mut x = rng.floats(rows * dim);
        let mut out = vec![f32::NAN; rows * dim];
        let (mut target, source) = shared(&mut x);
        if !in_place {
            target = MemMut::host(&mut out);
        }
        run(&mut Op::RmsNorm(RmsNorm {
            x: source,
            weight: weight.mem(),
            residual: None,
            out: target,
            rows,
            dim,
            eps: 1e-5,
            offset: 1.0,
        }))?;
        Ok(vec![if in_place { x } else { out }])
    })
}

/// Adds to what the output holds.
fn rms_norm_add(dtype: DType, (rows, dim): (usize, usize)) -> Case {
    let name = format!("rms_norm::{dtype:?} and residual/rows={rows}/dim={dim}");
    // Measured up to 1.2e-7.
    Case::new(name, 1e-6, move |run| {
        let mut rng = Rng::new(9);
        let weight = Stored::new(&rng.floats(dim), dtype);
        let (x, mut out) = (rng.floats(rows * dim), rng.floats(rows * dim));
        let (target, residual) = shared(&mut out);
        run(&mut Op::RmsNorm(RmsNorm {
            x: Mem::host(&x),
            weight: weight.mem(),
            residual: Some(residual),
            out: target,
            rows,
            dim,
            eps: 1e-5,
            offset: 1.0,
        }))?;
        Ok(vec![out])
    })
}

fn layer_norms() -> impl Iterator<Item = Case> {
    use DType::{Bf16, F16, F32};
    let shapes = [
        (1, 1),
        (3, 64),
        (7, 257),
        (40, 512),
        (5, 1000),
        (2, 4096),
        (3, 5120),
        (1, 16384),
        (2, 17000),
    ];
    let kinds = [
        (None, None),
        (Some(F32), Some(F32)),
        (Some(F16), None),
        (Some(Bf16), Some(Bf16)),
        (None, Some(F16)),
    ];
    let whole = shapes.into_iter().enumerate().flat_map(move |(i, shape)| {
        let kinds = kinds.into_iter().enumerate();
        kinds.map(move |(j, kind)| layer_norm(kind, shape, 1, (i + j) % 2 == 0))
    });
    // Norms over heads, each with a weight of its own.
    let heads = [(12, 128, 4), (35, 32, 5), (6, 20, 3), (4, 1024, 2)];
    let heads = heads.into_iter().flat_map(move |(rows, dim, groups)| {
        let kinds = [(Some(Bf16), None), (Some(F16), Some(F32))];
        kinds.map(|kind| layer_norm(kind, (rows, dim), groups, true))
    });
    whole.chain(heads)
}

fn layer_norm(
    (weight, bias): (Option<DType>, Option<DType>),
    (rows, dim): (usize, usize),
    groups: usize,
    in_place: bool,
) -> Case {
    let name = |dtype: Option<DType>| dtype.map_or("none".to_owned(), |d| format!("{d:?}"));
    let name = format!(
        "layer_norm::{}/{}/rows={rows}/dim={dim}/groups={groups}/in_place={in_place}",
        name(weight),
        name(bias)
    );
    // Measured up to 2.1e-7.
    Case::new(name, 1e-6, move |run| {
        let mut rng = Rng::new(8);
        let mut stored = |dtype: Option<DType>| {
            let values = rng.floats(groups * dim);
            dtype.map(|dtype| Stored::new(&values, dtype))
        };
        let (weight, bias) = (stored(weight), stored(bias));
        // Rows whose mean is large beside what they differ by.
        let mut x = rng.floats(rows * dim);
        x.iter_mut().for_each(|v| *v += 3.0);
        let mut out = vec![f32::NAN; rows * dim];
        let (mut target, source) = shared(&mut x);
        if !in_place {
            target = MemMut::host(&mut out);
        }
        run(&mut Op::LayerNorm(LayerNorm {
            x: source,
            weight: weight.as_ref().map(Stored::mem),
            bias: bias.as_ref().map(Stored::mem),
            out: target,
            rows,
            dim,
            groups,
            eps: 1e-5,
        }))?;
        Ok(vec![if in_place { x } else { out }])
    })
}

fn gather_rows(rows: usize, dim: usize) -> Case {
    Case::new(
        format!("gather_rows::rows={rows}/dim={dim}"),
        0.0,
        move |run| {
            let mut rng = Rng::new(3);
            let x = rng.floats(11 * dim);
            let index: Vec<i32> = (0..rows).map(|_| rng.below(11) as i32).collect();
            let mut out = vec![f32::NAN; rows * dim];
            run(&mut Op::GatherRows(GatherRows {
                x: Mem::host(&x),
                index: Mem::host(&index),
                out: MemMut::host(&mut out),
                x_rows: 11,
                rows,
                dim,
            }))?;
            Ok(vec![out])
        },
    )
}

fn scale_logits(rows: usize, dim: usize, softcap: f32) -> Case {
    let name = format!("scale_logits::rows={rows}/dim={dim}/softcap={softcap}");
    // Measured up to 1.1e-7.
    Case::new(name, 5e-7, move |run| {
        let mut x = Rng::new(4).floats(rows * dim);
        let op = ScaleLogits {
            x: MemMut::host(&mut x),
            rows,
            dim,
            scale: 7.0,
            softcap,
        };
        run(&mut Op::ScaleLogits(op))?;
        Ok(vec![x])
    })
}

/// Values on both sides and far beyond, one that is no number.
fn clamp(rows: usize, dim: usize) -> Case {
    Case::new(format!("clamp::rows={rows}/dim={dim}"), 0.0, move |run| {
        let mut x = Rng::new(12).floats(rows * dim);
        x[..3].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
        let op = Clamp {
            x: MemMut::host(&mut x),
            rows,
            dim,
            limit: 0.5,
        };
        run(&mut Op::Clamp(op))?;
        Ok(vec![x])
    })
}

/// Some rows have the scale 0 and hold what is no number; without columns all have the same.
fn scale_rows((rows, dim): (usize, usize), columns: usize, add: bool) -> Case {
    let name = format!("scale_rows::rows={rows}/dim={dim}/columns={columns}/add={add}");
    // Measured up to 1.2e-7.
    Case::new(name, 5e-7, move |run| {
        let mut rng = Rng::new(6);
        let column = columns / 2;
        let mut x = rng.floats(rows * dim);
        let mut scales = rng.floats(rows * columns);
        for r in (0..rows).skip(1).step_by(2).filter(|_| columns > 0) {
            scales[r * columns + column] = 0.0;
            x[r * dim] = f32::NAN;
        }
        // In place of what is added, or apart.
        let mut out = match add {
            true => rng.floats(rows * dim),
            false => vec![f32::NAN; rows * dim],
        };
        let (target, source) = shared(&mut out);
        run(&mut Op::ScaleRows(ScaleRows {
            x: Mem::host(&x),
            scales: (columns > 0).then(|| Mem::host(&scales)),
            add: add.then_some(source),
            out: target,
            rows,
            dim,
            columns,
            column,
            factor: 0.22,
        }))?;
        Ok(vec![out])
    })
}

/// In place of the other branch, or of the gate where it is alone.
fn gated((rows, dim): (usize, usize), act: Activation, has_up: bool) -> Case {
    let name = format!("gated::{act:?}/rows={rows}/dim={dim}/up={has_up}");
    // Measured up to 1.0e-7.
    Case::new(name, 5e-7, move |run| {
        let mut rng = Rng::new(7);
        let (other, mut out) = (rng.floats(rows * dim), rng.floats(rows * dim));
        let (target, source) = shared(&mut out);
        let (gate, up) = match has_up {
            true => (Mem::host(&other), Some(source)),
            false => (source, None),
        };
        run(&mut Op::Gated(Gated {
            gate,
            up,
            out: target,
            rows,
            dim,
            act,
        }))?;
        Ok(vec![out])
    })
}

fn hessian(rows: usize, dim: usize) -> Case {
    // Measured up to 2.1e-7.
    Case::new(
        format!("hessian_syrk::rows={rows}/dim={dim}"),
        2e-6,
        move |run| {
            let mut rng = Rng::new(5);
            let x = rng.floats(rows * dim);
            // A sum that has begun, as symmetric as it always is.
            let mut h = vec![0.0; dim * dim];
            for i in 0..dim {
                for j in 0..=i {
                    let v = rng.floats(1)[0];
                    h[i * dim + j] = v;
                    h[j * dim + i] = v;
                }
            }
            let op = HessianSyrk {
                x: Mem::host(&x),
                h: MemMut::host(&mut h),
                rows,
                dim,
            };
            run(&mut Op::HessianSyrk(op))?;
            Ok(vec![h])
        },
    )
}

fn dequant() -> Case {
    Case::new("dequant::mixed".to_owned(), 0.0, move |run| {
        let mut rng = Rng::new(6);
        let exl2 = Exl2::random(&[(8, 32), (5, 96), (3, 64), (2, 32)], 64, &mut rng);
        dequantized(run, &QuantMatrix::from_exl2(&exl2.parts())?)
    })
}

fn dequant_gptq() -> Case {
    Case::new("dequant::gptq".to_owned(), 0.0, move |run| {
        let mut rng = Rng::new(7);
        let (inputs, outputs, size) = (128, 40, 64);
        let mut words = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.next()).collect() };
        let qweight = words(inputs / 8 * outputs);
        let qzeros = words(inputs / size * outputs / 8);
        let scale = |_| 0x2000 + rng.below(0x800) as u16;
        let matrix = QuantMatrix::from_gptq(&GptqParts {
            qweight: &qweight,
            qzeros: &qzeros,
            scales: &(0..inputs / size * outputs)
                .map(scale)
                .collect::<Vec<u16>>(),
            g_idx: None,
            group_size: size,
            zero_offset: 1,
            inputs,
            outputs,
        })?;
        dequantized(run, &matrix)
    })
}

fn dequantized(run: Run<'_>, matrix: &QuantMatrix) -> Result<Vec<Vec<f32>>> {
    let mut out = vec![f32::NAN; matrix.inputs() * matrix.outputs()];
    run(&mut Op::Dequant(Dequant {
        matrix: Matrix::Quant(matrix),
        out: MemMut::host(&mut out),
    }))?;
    Ok(vec![out])
}
