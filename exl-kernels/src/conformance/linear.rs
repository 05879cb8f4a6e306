//! Products with dense and quantized matrices.

use super::Case;
use super::data::{Exl2, Rng, STORAGE, Stored};
use crate::ops::{Activation, GateUp, Linear, LinearPart, Matrix, Op};
use crate::{DType, GptqParts, Mem, MemMut, QuantMatrix, Result};

/// Group layouts: every width alone, mixes, short last groups.
const LAYOUTS: [(&str, &[(u8, u32)]); 10] = [
    ("8b", &[(8, 64)]),
    ("6b", &[(6, 128), (6, 32)]),
    ("5b", &[(5, 96)]),
    ("4b", &[(4, 128), (4, 128)]),
    ("3b", &[(3, 64), (3, 64), (3, 32)]),
    ("2b", &[(2, 64), (2, 32)]),
    ("8b4b3b", &[(8, 32), (4, 128), (3, 128), (3, 96)]),
    ("6b3b2b", &[(6, 32), (3, 64), (3, 64), (2, 64), (2, 32)]),
    (
        "all",
        &[(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 96)],
    ),
    ("one long group", &[(4, 1024)]),
];

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = Vec::new();
    let rows: &[usize] = if quick {
        &[1, 7]
    } else {
        &[1, 2, 3, 5, 8, 13, 70, 200]
    };
    for &rows in rows {
        for dtype in STORAGE {
            for (inputs, outputs) in [(33, 7), (64, 48), (256, 130), (4360, 9)] {
                list.push(dense(dtype, rows, inputs, outputs));
            }
        }
        for (name, layout) in LAYOUTS {
            list.push(exl2(name, layout, rows, 96));
        }
        list.push(exl2("padded", LAYOUTS[8].1, rows, 75));
        list.push(gptq(rows, 256, true));
        list.push(gptq(rows, 256, false));
        for (act, dtype) in [
            (Activation::Silu, DType::Bf16),
            (Activation::GeluTanh, DType::F16),
            (Activation::Gelu, DType::F32),
            (Activation::Sigmoid, DType::Bf16),
            (Activation::Relu2, DType::F16),
        ] {
            list.push(gate_up_dense(act, dtype, rows));
        }
        list.push(gate_up_exl2(rows));
    }
    // Wide enough for every way in which GPUs divide the work.
    let rows: &[usize] = if quick { &[3] } else { &[1, 4, 30, 200] };
    for &rows in rows {
        list.push(qkv(rows, Qkv::Biased));
        list.push(qkv(rows, Qkv::Plain));
        list.push(gate_up_same_order(rows));
    }
    if !quick {
        for bits in [2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                list.push(deep(bits, group, false, 1));
                list.push(deep(bits, group, true, if bits < 8 { 1 } else { 3 }));
            }
        }
        // More rows than the smaller products of clusters take, and outputs for large tiles.
        list.push(gptq(30, 256, true));
        // Rows as long as those of the largest models.
        list.push(gptq(1, 28_672, true));
        list.push(exl2("long", &[(4, 128); 224], 1, 40));
        list.push(exl2("wide", &[(4, 64)], 200, 8576));
    }
    list
}

/// Two parts with bias and an in-place residual.
fn dense(dtype: DType, rows: usize, inputs: usize, outputs: usize) -> Case {
    let name = format!("linear::{dtype:?}/rows={rows}/k={inputs}/n={outputs}");
    // Measured up to 6e-7.
    Case::new(name, 3e-6, move |run| {
        let mut rng = Rng::new(10);
        let x = rng.floats(rows * inputs);
        let weight = Stored::new(&rng.floats(inputs * outputs), dtype);
        let bias = Stored::new(&rng.floats(outputs), dtype);
        let mut first = vec![f32::NAN; rows * outputs];
        let mut second = rng.floats(rows * outputs);
        // SAFETY: the vector outlives the op, which allows a residual to be the output.
        let residual = unsafe {
            let bytes = second.len() * 4;
            Mem::from_raw(
                second.as_ptr().cast(),
                bytes,
                DType::F32,
                crate::Place::Host,
            )
        };
        let matrix = Matrix::Dense(weight.mem());
        run(&mut Op::Linear(Linear {
            x: Mem::host(&x),
            rows,
            inputs,
            parts: vec![
                LinearPart {
                    matrix,
                    bias: Some(bias.mem()),
                    residual: None,
                    out: MemMut::host(&mut first),
                    outputs,
                },
                LinearPart {
                    matrix,
                    bias: None,
                    residual: Some(residual),
                    out: MemMut::host(&mut second),
                    outputs,
                },
            ],
        }))?;
        Ok(vec![first, second])
    })
}

fn quantized(
    run: super::Run<'_>,
    matrix: &QuantMatrix,
    rows: usize,
    outputs: usize,
) -> Result<Vec<Vec<f32>>> {
    let mut rng = Rng::new(11);
    let x = rng.floats(rows * matrix.inputs());
    let bias = rng.floats(outputs);
    let mut out = vec![f32::NAN; rows * outputs];
    let part = LinearPart {
        matrix: Matrix::Quant(matrix),
        bias: Some(Mem::host(&bias)),
        residual: None,
        out: MemMut::host(&mut out),
        outputs,
    };
    let (x, inputs) = (Mem::host(&x), matrix.inputs());
    run(&mut Op::Linear(Linear {
        x,
        rows,
        inputs,
        parts: vec![part],
    }))?;
    Ok(vec![out])
}

fn exl2(what: &str, layout: &[(u8, u32)], rows: usize, outputs: usize) -> Case {
    let name = format!("linear::exl2/{what}/rows={rows}/n={outputs}");
    let layout = layout.to_vec();
    // Measured up to 3.2e-4: the reference rounds each weight to 16 bits once more.
    Case::new(name, 1e-3, move |run| {
        let exl2 = Exl2::random(&layout, outputs.next_multiple_of(32), &mut Rng::new(12));
        quantized(run, &QuantMatrix::from_exl2(&exl2.parts())?, rows, outputs)
    })
}

/// As many rows of weights as a layer has: every way of a GPU through the blocks of a width, also behind
/// an odd number of blocks of another one, and with a short last group.
fn deep(bits: u8, group: u32, odd: bool, rows: usize) -> Case {
    let mut layout = if odd { vec![(8, 32); 5] } else { vec![] };
    layout.extend(vec![(bits, group); (11_264 / group) as usize]);
    layout.push((bits, 32));
    let place = if odd { "behind 5 blocks" } else { "alone" };
    exl2(&format!("{bits}b g{group} {place}"), &layout, rows, 40)
}

fn gptq(rows: usize, k: usize, act_order: bool) -> Case {
    let name = format!("linear::gptq/act_order={act_order}/rows={rows}/k={k}");
    // Measured up to 3e-4, as for EXL2.
    Case::new(name, 1e-3, move |run| {
        let mut rng = Rng::new(13);
        let (n, size) = (40, 64);
        let qweight: Vec<u32> = (0..k / 8 * n).map(|_| rng.next()).collect();
        let qzeros: Vec<u32> = (0..k / size * n / 8).map(|_| rng.next()).collect();
        let scales: Vec<u16> = (0..k / size * n)
            .map(|_| 0x2000 + rng.below(0x800) as u16)
            .collect();
        let g_idx: Vec<u32> = rng
            .permutation(k)
            .into_iter()
            .map(|i| i / size as u32)
            .collect();
        let matrix = QuantMatrix::from_gptq(&GptqParts {
            qweight: &qweight,
            qzeros: &qzeros,
            scales: &scales,
            g_idx: act_order.then_some(&g_idx),
            group_size: size,
            zero_offset: 1,
            inputs: k,
            outputs: n,
        })?;
        quantized(run, &matrix, rows, n)
    })
}

fn gate_up_dense(act: Activation, dtype: DType, rows: usize) -> Case {
    // Measured up to 9e-7.
    let name = format!("gate_up::{act:?}/{dtype:?}/rows={rows}");
    Case::new(name, 5e-6, move |run| {
        let mut rng = Rng::new(14);
        let (inputs, outputs) = (64, 72);
        let x: Vec<f32> = rng.floats(rows * inputs).iter().map(|v| v / 8.0).collect();
        let gate = Stored::new(&rng.floats(inputs * outputs), dtype);
        let up = Stored::new(&rng.floats(inputs * outputs), dtype);
        let bias = rng.floats(outputs);
        let mut out = vec![f32::NAN; rows * outputs];
        run(&mut Op::GateUp(GateUp {
            x: Mem::host(&x),
            gate: Matrix::Dense(gate.mem()),
            up: Matrix::Dense(up.mem()),
            gate_bias: Some(Mem::host(&bias)),
            up_bias: None,
            out: MemMut::host(&mut out),
            rows,
            inputs,
            outputs,
            act,
        }))?;
        Ok(vec![out])
    })
}

/// How the three matrices of [`qkv`] come.
#[derive(Clone, Copy)]
enum Qkv {
    /// One order of the input, biases, outputs of odd number.
    Biased,
    /// An order each, no biases.
    Plain,
}

/// Three matrices, one with an in-place residual.
fn qkv(rows: usize, how: Qkv) -> Case {
    let (what, widths): (_, [usize; 3]) = match how {
        Qkv::Biased => ("qkv", [1440, 75, 320]),
        Qkv::Plain => ("qkv in three orders", [1440, 76, 320]),
    };
    const MIXES: [&[(u8, u32)]; 3] = [
        &[(6, 32), (4, 128), (4, 128), (4, 128), (4, 128)],
        &[(5, 64), (3, 224), (2, 256)],
        &[(8, 32), (2, 512)],
    ];
    // Measured up to 3e-4, as for one matrix.
    Case::new(format!("linear::{what}/rows={rows}"), 1e-3, move |run| {
        let mut rng = Rng::new(16);
        let order = rng.permutation(544);
        let matrix = |i: usize, rng: &mut Rng| {
            let mut exl2 = Exl2::random(MIXES[i], widths[i].next_multiple_of(32), rng);
            if let Qkv::Biased = how {
                exl2.q_invperm.clone_from(&order);
            }
            QuantMatrix::from_exl2(&exl2.parts())
        };
        let matrices = [0, 1, 2].map(|i| matrix(i, &mut rng));
        let matrices: Vec<QuantMatrix> = matrices.into_iter().collect::<Result<_>>()?;
        let x = rng.floats(rows * 544);
        let bias = widths.map(|n| rng.floats(n));
        let mut out = widths.map(|n| vec![f32::NAN; rows * n]);
        out[1] = rng.floats(rows * widths[1]);
        let mut parts = Vec::new();
        for (i, (matrix, out)) in matrices.iter().zip(&mut out).enumerate() {
            // SAFETY: a residual may be the output itself (ops.rs).
            let residual = (i == 1).then(|| unsafe {
                Mem::from_raw(
                    out.as_ptr().cast(),
                    4 * out.len(),
                    DType::F32,
                    crate::Place::Host,
                )
            });
            parts.push(LinearPart {
                matrix: Matrix::Quant(matrix),
                bias: matches!(how, Qkv::Biased).then(|| Mem::host(&bias[i])),
                residual,
                out: MemMut::host(out),
                outputs: widths[i],
            });
        }
        run(&mut Op::Linear(Linear {
            x: Mem::host(&x),
            rows,
            inputs: 544,
            parts,
        }))?;
        Ok(out.to_vec())
    })
}

/// Gate and up in one order of the input.
fn gate_up_same_order(rows: usize) -> Case {
    const OUTPUTS: usize = 1100;
    // Measured up to 3e-4.
    Case::new(
        format!("gate_up::exl2 in one order/rows={rows}"),
        1e-3,
        move |run| {
            let mut rng = Rng::new(17);
            let gate = Exl2::random(&[(5, 32), (3, 128), (2, 128)], 1120, &mut rng);
            let mut up = Exl2::random(&[(4, 128), (4, 128), (2, 32)], 1120, &mut rng);
            up.q_invperm.clone_from(&gate.q_invperm);
            let gate = QuantMatrix::from_exl2(&gate.parts())?;
            let up = QuantMatrix::from_exl2(&up.parts())?;
            let x = rng.floats(rows * 288);
            let bias = rng.floats(2 * OUTPUTS);
            let mut out = vec![f32::NAN; rows * OUTPUTS];
            run(&mut Op::GateUp(GateUp {
                x: Mem::host(&x),
                gate: Matrix::Quant(&gate),
                up: Matrix::Quant(&up),
                gate_bias: Some(Mem::host(&bias[..OUTPUTS])),
                up_bias: Some(Mem::host(&bias[OUTPUTS..])),
                out: MemMut::host(&mut out),
                rows,
                inputs: 288,
                outputs: OUTPUTS,
                act: Activation::Silu,
            }))?;
            Ok(vec![out])
        },
    )
}

fn gate_up_exl2(rows: usize) -> Case {
    // Measured up to 3e-4.
    Case::new(format!("gate_up::exl2/rows={rows}"), 1e-3, move |run| {
        let mut rng = Rng::new(15);
        let gate = Exl2::random(LAYOUTS[6].1, 160, &mut rng);
        let up = Exl2::random(&[(5, 128), (4, 256)], 160, &mut rng);
        let gate = QuantMatrix::from_exl2(&gate.parts())?;
        let up = QuantMatrix::from_exl2(&up.parts())?;
        let x = rng.floats(rows * gate.inputs());
        let mut out = vec![f32::NAN; rows * 160];
        run(&mut Op::GateUp(GateUp {
            x: Mem::host(&x),
            gate: Matrix::Quant(&gate),
            up: Matrix::Quant(&up),
            gate_bias: None,
            up_bias: None,
            out: MemMut::host(&mut out),
            rows,
            inputs: gate.inputs(),
            outputs: 160,
            act: Activation::Silu,
        }))?;
        Ok(vec![out])
    })
}
