//! Mixture of experts.

use half::{bf16, f16};

use super::data::{Exl2, Rng, STORAGE, Stored};
use super::{Case, Run};
use crate::ops::{Activation, Matrix, MoeDown, MoeGateUp, MoeRoute, Op, RouteNorm};
use crate::{DType, GptqParts, Mem, MemMut, QuantMatrix, Result};

pub(super) fn cases(quick: bool) -> Vec<Case> {
    let mut list = Vec::new();
    for (rows, experts, top_k) in [
        (1, 8, 2),
        (5, 4, 1),
        (9, 7, 7),
        (70, 16, 4),
        (3, 128, 8),
        (2, 60, 4),
        (40, 512, 10),
    ] {
        for norm in [RouteNorm::None, RouteNorm::Sum, RouteNorm::Norm(2.5)] {
            list.push(route((rows, experts, top_k), norm));
        }
    }
    let rows: &[usize] = if quick {
        &[1, 7]
    } else {
        &[1, 2, 3, 5, 8, 16, 40, 70, 200]
    };
    for &rows in rows {
        for weights in WEIGHTS {
            list.push(gate_up(weights, rows, &SMALL));
            list.push(down(weights, rows, &SMALL));
        }
    }
    if !quick {
        for rows in [1, 4, 30, 300] {
            list.push(gate_up(Weights::Exl2, rows, &MANY));
            list.push(down(Weights::Exl2, rows, &MANY));
        }
        for rows in [1, 4, 30, 150] {
            list.push(gate_up(Weights::Exl2, rows, &WIDE));
            list.push(down(Weights::Exl2, rows, &WIDE));
        }
        list.push(down(Weights::Exl2, 1, &LARGE));
        for rows in [1, 5, 16, 60] {
            list.push(gate_up(Weights::Exl2, rows, &DEEP));
            list.push(down(Weights::Gptq, rows, &DEEP));
        }
    }
    list
}

/// Logits of which many are equal, some minus infinity and some NaN.
fn route((rows, experts, top_k): (usize, usize, usize), norm: RouteNorm) -> Case {
    let name = format!("moe_route::{norm:?}/rows={rows}/experts={experts}/top_k={top_k}");
    // Measured up to 6.6e-7.
    Case::new(name, 2e-6, move |run| {
        let mut rng = Rng::new(30);
        let mut logits = rng.floats(rows * experts);
        logits
            .iter_mut()
            .for_each(|v| *v = (*v * 8.0).round() / 8.0);
        if rows > 4 {
            logits[experts..][..experts / 2].fill(f32::NEG_INFINITY);
            logits[3 * experts + 1] = f32::NAN;
            logits[4 * experts..][..experts].fill(1.5);
        }
        let mut ids = vec![-1; rows * top_k];
        let mut weights = vec![f32::NAN; rows * top_k];
        run(&mut Op::MoeRoute(MoeRoute {
            logits: Mem::host(&logits),
            ids: MemMut::host(&mut ids),
            weights: MemMut::host(&mut weights),
            rows,
            experts,
            top_k,
            norm,
        }))?;
        Ok(vec![ids.iter().map(|&id| id as f32).collect(), weights])
    })
}

/// Formats of the experts of a layer.
#[derive(Clone, Copy, Debug)]
enum Weights {
    /// Mixes of widths, an order of the input for each matrix.
    Exl2,
    /// The same, but gate and up of an expert in one order.
    Exl2InOneOrder,
    Gptq,
    Dense(DType),
    /// Some of each.
    All,
}

const WEIGHTS: [Weights; 7] = [
    Weights::Exl2,
    Weights::Exl2InOneOrder,
    Weights::Gptq,
    Weights::Dense(DType::F32),
    Weights::Dense(DType::F16),
    Weights::Dense(DType::Bf16),
    Weights::All,
];

/// Sizes of a layer.
struct Sizes {
    name: &'static str,
    experts: usize,
    top_k: usize,
    inputs: usize,
    outputs: usize,
}

const SMALL: Sizes = Sizes {
    name: "small",
    experts: 5,
    top_k: 2,
    inputs: 288,
    outputs: 75,
};
/// More than rows choose.
const MANY: Sizes = Sizes {
    name: "many",
    experts: 80,
    top_k: 6,
    inputs: 128,
    outputs: 96,
};
/// Enough columns for every way in which GPUs divide the work.
const WIDE: Sizes = Sizes {
    name: "wide",
    experts: 4,
    top_k: 2,
    inputs: 544,
    outputs: 2560,
};

/// Rows that do not fit shared memory as a whole.
const DEEP: Sizes = Sizes {
    name: "deep",
    experts: 3,
    top_k: 1,
    inputs: 11_264,
    outputs: 40,
};

/// Of one row, so much that thread blocks divide the rows of a matrix, and have several column tiles each.
const LARGE: Sizes = Sizes {
    name: "large",
    experts: 3,
    top_k: 2,
    inputs: 4480,
    outputs: 720,
};

/// The matrix of one expert.
enum Weight {
    Quant(QuantMatrix),
    Dense(Stored),
}

impl Weight {
    fn matrix(&self) -> Matrix<'_> {
        match self {
            Weight::Quant(q) => Matrix::Quant(q),
            Weight::Dense(d) => Matrix::Dense(d.mem()),
        }
    }
}

/// Mixes of widths for so many inputs, which are 128 and more, in groups of different lengths.
fn layout(expert: usize, inputs: usize) -> Vec<(u8, u32)> {
    let rest = inputs as u32 - 96;
    let mut groups = match expert % 5 {
        0 => vec![(4, 32), (4, 64)],
        1 => vec![(6, 32), (5, 32), (3, 32)],
        2 => vec![(8, 32), (5, 64)],
        3 => vec![(5, 96)],
        _ => vec![(3, 96)],
    };
    let (bits, rows) = [(4, 128), (2, 64), (4, 32), (4, 96), (3, 128)][expert % 5];
    let whole = (rest / rows) as usize;
    groups.extend(vec![(bits, rows); whole]);
    groups.extend((!rest.is_multiple_of(rows)).then_some((bits, rest % rows)));
    groups
}

impl Weights {
    /// A matrix of expert `expert`, `[outputs, inputs]`. `order`: of another one's input.
    fn make(
        self,
        expert: usize,
        (inputs, outputs): (usize, usize),
        order: Option<&[u32]>,
        rng: &mut Rng,
    ) -> Result<Weight> {
        match self {
            Weights::All => {
                let kind = [Weights::Exl2, Weights::Gptq, Weights::Dense(DType::F16)];
                let kind = kind.get(expert).copied();
                let kind = kind.unwrap_or(Weights::Dense(STORAGE[expert % STORAGE.len()]));
                kind.make(expert, (inputs, outputs), order, rng)
            }
            Weights::Dense(dtype) => {
                // As large as those that codes stand for.
                let values = rng.floats(inputs * outputs);
                let values: Vec<f32> = values.iter().map(|v| v / 32.0).collect();
                Ok(Weight::Dense(Stored::new(&values, dtype)))
            }
            Weights::Gptq => Ok(Weight::Quant(gptq((inputs, outputs), rng)?)),
            Weights::Exl2 | Weights::Exl2InOneOrder => {
                let layout = layout(expert, inputs);
                let mut exl2 = Exl2::random(&layout, outputs.next_multiple_of(32), rng);
                if let Some(order) = order {
                    exl2.q_invperm = order.to_vec();
                }
                Ok(Weight::Quant(QuantMatrix::from_exl2(&exl2.parts())?))
            }
        }
    }

    fn order(self, inputs: usize, rng: &mut Rng) -> Option<Vec<u32>> {
        matches!(self, Weights::Exl2InOneOrder).then(|| rng.permutation(inputs))
    }

    /// Of the largest output: 16-bit weights are rounded once more by the reference.
    fn tolerance(self) -> f32 {
        match self {
            // Measured up to 4e-7.
            Weights::Dense(_) => 5e-6,
            // Measured up to 1.1e-3: the product of two branches, of few inputs.
            _ => 2e-3,
        }
    }
}

fn gptq((inputs, outputs): (usize, usize), rng: &mut Rng) -> Result<QuantMatrix> {
    let (padded, size) = (outputs.next_multiple_of(8), 32);
    let mut words = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.next()).collect() };
    let (qweight, qzeros) = (
        words(inputs / 8 * padded),
        words(inputs / size * padded / 8),
    );
    let scale = |_| 0x2000 + rng.below(0x800) as u16;
    QuantMatrix::from_gptq(&GptqParts {
        qweight: &qweight,
        qzeros: &qzeros,
        scales: &(0..inputs / size * padded).map(scale).collect::<Vec<u16>>(),
        g_idx: None,
        group_size: size,
        zero_offset: 1,
        inputs,
        outputs: padded,
    })
}

/// Different experts for each row; the last one is nobody's, the first one has very many.
fn choose(rows: usize, sizes: &Sizes, rng: &mut Rng) -> Vec<i32> {
    let mut ids = Vec::new();
    for row in 0..rows {
        let order = rng.permutation(sizes.experts - 1);
        let mut chosen: Vec<i32> = order[..sizes.top_k].iter().map(|&e| e as i32).collect();
        if row % 3 != 1 && !chosen.contains(&0) {
            chosen[row % sizes.top_k] = 0;
        }
        ids.extend(chosen);
    }
    ids
}

/// Values that are NaN, for weights that nobody may read.
fn poisoned(weight: Weight) -> Weight {
    match weight {
        Weight::Dense(Stored::F32(v)) => Weight::Dense(Stored::F32(vec![f32::NAN; v.len()])),
        Weight::Dense(Stored::F16(v)) => Weight::Dense(Stored::F16(vec![f16::NAN; v.len()])),
        Weight::Dense(Stored::Bf16(v)) => Weight::Dense(Stored::Bf16(vec![bf16::NAN; v.len()])),
        other => other,
    }
}

fn gate_up(weights: Weights, rows: usize, sizes: &'static Sizes) -> Case {
    let name = format!("moe_gate_up::{weights:?}/{}/rows={rows}", sizes.name);
    Case::new(name, weights.tolerance(), move |run: Run<'_>| {
        let mut rng = Rng::new(31);
        let shape = (sizes.inputs, sizes.outputs);
        let mut experts = Vec::new();
        for e in 0..sizes.experts {
            let order = weights.order(sizes.inputs, &mut rng);
            let mut make = || weights.make(e, shape, order.as_deref(), &mut rng);
            let (gate, up) = (make()?, make()?);
            experts.push(match e + 1 == sizes.experts {
                true => (poisoned(gate), poisoned(up)),
                false => (gate, up),
            });
        }
        let ids = choose(rows, sizes, &mut rng);
        let x = rng.floats(rows * sizes.inputs);
        let x: Vec<f32> = x.iter().map(|v| v / 16.0).collect();
        let mut out = vec![f32::NAN; rows * sizes.top_k * sizes.outputs];
        let pairs = experts.iter().map(|(g, u)| (g.matrix(), u.matrix()));
        let acts = [
            Activation::Silu,
            Activation::GeluTanh,
            Activation::Gelu,
            Activation::Relu2,
        ];
        run(&mut Op::MoeGateUp(MoeGateUp {
            x: Mem::host(&x),
            ids: Mem::host(&ids),
            experts: pairs.collect(),
            out: MemMut::host(&mut out),
            rows,
            top_k: sizes.top_k,
            inputs: sizes.inputs,
            outputs: sizes.outputs,
            act: acts[rows % acts.len()],
        }))?;
        Ok(vec![out])
    })
}

/// With a residual in place, one elsewhere, or none, by the number of rows.
fn down(weights: Weights, rows: usize, sizes: &'static Sizes) -> Case {
    let name = format!("moe_down::{weights:?}/{}/rows={rows}", sizes.name);
    Case::new(name, weights.tolerance(), move |run: Run<'_>| {
        let mut rng = Rng::new(32);
        let shape = (sizes.inputs, sizes.outputs);
        let mut experts = Vec::new();
        for e in 0..sizes.experts {
            let weight = weights.make(e, shape, None, &mut rng)?;
            experts.push(match e + 1 == sizes.experts {
                true => poisoned(weight),
                false => weight,
            });
        }
        let ids = choose(rows, sizes, &mut rng);
        let x = rng.floats(rows * sizes.top_k * sizes.inputs);
        let shares: Vec<f32> = rng.floats(rows * sizes.top_k);
        let elsewhere = rng.floats(rows * sizes.outputs);
        let mut out = match rows % 3 {
            0 => vec![f32::NAN; rows * sizes.outputs],
            _ => rng.floats(rows * sizes.outputs),
        };
        let bytes = 4 * out.len();
        // SAFETY: the vector outlives the op, which allows a residual to be the output.
        let in_place =
            unsafe { Mem::from_raw(out.as_ptr().cast(), bytes, DType::F32, crate::Place::Host) };
        let residual = match rows % 3 {
            0 => None,
            1 => Some(in_place),
            _ => Some(Mem::host(&elsewhere)),
        };
        run(&mut Op::MoeDown(MoeDown {
            x: Mem::host(&x),
            ids: Mem::host(&ids),
            weights: Mem::host(&shares),
            experts: experts.iter().map(Weight::matrix).collect(),
            residual,
            out: MemMut::host(&mut out),
            rows,
            top_k: sizes.top_k,
            inputs: sizes.inputs,
            outputs: sizes.outputs,
        }))?;
        Ok(vec![out])
    })
}
