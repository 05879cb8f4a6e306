//! The ops that GPUs run against the quantizer of the CPU: first the ops' own host implementation,
//! which the GPU's kernels are compared with, then a GPU itself when there is one.

use exl_kernels::cuda::DeviceRegion;
use exl_kernels::ops::{Gptq, HessianFactor, Op, Refine};
use exl_kernels::{Mem, MemMut, reference};

use super::gpu::{GpuMoments, groups};
use super::host::HostSolver;
use super::*;
use crate::refine::{ROUNDS, refine};
use crate::testing::{noise, normal};
use crate::{Factor, Hessian, Quantizer, activity_order};

const TOKENS: usize = 96;

/// Calibration rows of correlated features of falling strength.
fn rows(dim: usize) -> Vec<Vec<f32>> {
    let row = |seed: u64| {
        let (own, shared) = (noise(seed, TOKENS * dim), noise(seed + 1000, TOKENS));
        let value = |(i, x): (usize, &f32)| {
            let strength = 1.0 / (1.0 + (i % dim) as f32 / 24.0);
            strength * (x + shared[i / dim])
        };
        own.iter().enumerate().map(value).collect()
    };
    (1..=16).map(row).collect()
}

fn accumulator(dim: usize) -> HessianAccumulator {
    let mut acc = HessianAccumulator::new(dim);
    for (r, x) in rows(dim).iter().enumerate() {
        acc.add(x, Part::of_row(r)).unwrap();
    }
    acc
}

/// What the original has where the others have `y`: apart in a way that `y` tells half of.
fn original(y: &[f32], dim: usize) -> Vec<f32> {
    let chance = noise(77, y.len());
    let value = |(i, y): (usize, &f32)| {
        let feature = i % dim;
        y * 1.08 + 0.05 * chance[i] / (1.0 + feature as f32 / 24.0)
    };
    y.iter().enumerate().map(value).collect()
}

/// Every second training row of [`rows`] beside the original.
fn pairs(dim: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
    let all = rows(dim).into_iter().enumerate();
    let some = all.filter(|(r, _)| r % 2 == 0 && Part::of_row(*r) == Part::Train);
    some.map(|(_, y)| (original(&y, dim), y)).collect()
}

/// Factor and rounding by the ops' implementation on the host.
fn by_ops(h: &Hessian, weight: &Matrix, layout: &Layout, lambda: f64) -> (Vec<f32>, Quantized) {
    let (k, n) = (weight.rows, weight.cols);
    let order = activity_order(h);
    let packed: Vec<i32> = order.iter().map(|&o| o as i32).collect();
    let (mut upper, mut status) = (vec![0.0; k * k], [0]);
    let factor = HessianFactor {
        h: Mem::host(h.data()),
        order: Mem::host(&packed),
        upper: MemMut::host(&mut upper),
        status: MemMut::host(&mut status),
        dim: k,
        scale: 1.0,
        lambda,
    };
    reference::run(&mut Op::HessianFactor(factor)).unwrap();
    assert_eq!(status, [1]);
    let groups = groups(layout);
    let (mut codes, mut scale_codes) = (vec![0; k * n], vec![0; groups.len() * n]);
    let (mut scale_max, mut decoded) = (vec![0; groups.len()], vec![0.0; k * n]);
    let op = Gptq {
        weight: Mem::host(&weight.data),
        upper: Mem::host(&upper),
        order: Mem::host(&packed),
        groups: &groups,
        codes: MemMut::host(&mut codes),
        scale_codes: MemMut::host(&mut scale_codes),
        scale_max: MemMut::host(&mut scale_max),
        decoded: MemMut::host(&mut decoded),
        inputs: k,
        outputs: n,
    };
    reference::run(&mut Op::Gptq(op)).unwrap();
    let quantized = Quantized {
        inputs: k,
        outputs: n,
        layout: layout.clone(),
        order,
        codes,
        scale_codes,
        scale_max: scale_max.iter().map(|&m| m as u16).collect(),
        stats: crate::Stats::default(),
    };
    // What the op decodes is what every decoder makes of the codes.
    assert_eq!(quantized.dequantize().data, decoded);
    (upper, quantized)
}

/// Layouts with every width, with groups that share a panel and with one larger than a panel.
const LAYOUTS: [&str; 4] = [
    "1x8b_32g/1x6b_32g/1x5b_64g/1x4b_64g/1x3b_64g",
    "2x4b_128g",
    "8x2b_32g",
    "1x3b_256g",
];

/// Betters a matrix that [`by_ops`] rounded by the op's implementation on the host.
fn refined_by_ops(h: &Hessian, weight: &Matrix, q: &Quantized, lambda: f64) -> Quantized {
    let (k, n) = (q.inputs, q.outputs);
    let packed: Vec<i32> = q.order.iter().map(|&o| o as i32).collect();
    let scale_max: Vec<i32> = q.scale_max.iter().map(|&m| i32::from(m)).collect();
    let groups = groups(&q.layout);
    let decoded = q.dequantize();
    let (mut new_codes, mut new_decoded) = (vec![0; k * n], vec![0.0; k * n]);
    let op = Refine {
        weight: Mem::host(&weight.data),
        h: Mem::host(h.data()),
        order: Mem::host(&packed),
        groups: &groups,
        codes: Mem::host(&q.codes),
        scale_codes: Mem::host(&q.scale_codes),
        scale_max: Mem::host(&scale_max),
        decoded: Mem::host(&decoded.data),
        new_codes: MemMut::host(&mut new_codes),
        new_decoded: MemMut::host(&mut new_decoded),
        inputs: k,
        outputs: n,
        rounds: ROUNDS,
        scale: 1.0,
        lambda,
    };
    reference::run(&mut Op::Refine(op)).unwrap();
    let better = Quantized {
        codes: new_codes,
        ..q.clone()
    };
    assert_eq!(better.dequantize().data, new_decoded);
    better
}

/// Share of elements that are equal.
fn agreement<T: PartialEq>(a: &[T], b: &[T]) -> f64 {
    let same = a.iter().zip(b).filter(|(x, y)| x == y).count();
    same as f64 / a.len() as f64
}

#[test]
fn the_ops_round_as_the_quantizer_does() {
    let (k, n) = (256, 96);
    let set = accumulator(k).finish("t").unwrap();
    let weight = Matrix::new(k, n, normal(3, k * n, 0.04)).unwrap();
    let order = activity_order(&set.train);
    let factor = Factor::new("t", &set.train, &order, 0.02).unwrap();
    let mean = set
        .train
        .diagonal()
        .iter()
        .map(|&x| f64::from(x))
        .sum::<f64>()
        / k as f64;
    for text in LAYOUTS {
        let layout: Layout = text.parse().unwrap();
        let ours = crate::Gptq { factor: &factor }
            .quantize("t", &weight, &layout)
            .unwrap();
        let (upper, theirs) = by_ops(&set.train, &weight, &layout, 0.02 * mean);
        let off = upper.iter().zip(factor.upper()).map(|(a, b)| (a - b).abs());
        let largest = upper.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(off.fold(0.0, f32::max) <= 2e-6 * largest);
        assert_eq!(ours.order, theirs.order);
        assert!(
            agreement(&ours.scale_codes, &theirs.scale_codes) > 0.99,
            "{text}"
        );
        let codes = agreement(&ours.codes, &theirs.codes);
        assert!(codes > 0.99, "{text}: {codes}");
        let loss = |q: &Quantized| {
            let left = crate::measure::difference(&weight, &q.dequantize());
            set.hold_out.loss(&left).unwrap()
        };
        let (a, b) = (loss(&ours), loss(&theirs));
        assert!((a - b).abs() < 2e-3 * a, "{text}: {a} {b}");

        // And better the same codes alike.
        let mut better = theirs.clone();
        let decoded = theirs.dequantize();
        refine(&mut better, (&weight, &decoded), set.train.data(), 0.02);
        let by_ops = refined_by_ops(&set.train, &weight, &theirs, 0.02 * mean);
        let same = agreement(&better.codes, &by_ops.codes);
        assert!(same > 0.99, "{text}: {same}");
        assert!(agreement(&theirs.codes, &by_ops.codes) < same, "{text}");
    }
}

#[test]
fn rounding_makes_up_for_errors_before_it() {
    let (k, n) = (256, 96);
    let weight = Matrix::new(k, n, normal(3, k * n, 0.04)).unwrap();
    let plain = accumulator(k);
    let mut beside = plain.clone();
    for (x, y) in pairs(k) {
        beside.add_pair(&y, &x).unwrap();
    }
    let layout: Layout = "8x6b_32g".parse().unwrap();
    let off = [plain, beside].map(|acc| {
        let mut solver = HostSolver::new(acc.finish("t").unwrap());
        solver.set_damping("t", 0.01).unwrap();
        let rounded = solver.round("t", &weight, &layout, &[]).unwrap();
        // On rows that nothing was fitted to.
        let y = &rows(k)[7];
        let (x, mut sum) = (original(y, k), 0.0);
        for (x, y) in x.chunks_exact(k).zip(y.chunks_exact(k)) {
            for c in 0..n {
                let of = |x: &[f32], w: &Matrix| -> f64 {
                    let terms = x.iter().enumerate();
                    terms.map(|(i, &x)| f64::from(x * w.row(i)[c])).sum()
                };
                sum += (of(x, &weight) - of(y, &rounded.decoded)).powi(2);
            }
        }
        sum
    });
    // 0.62.
    assert!(off[1] < 0.7 * off[0], "{off:?}");
}

fn gpu() -> Option<Gpu> {
    match exl_tensor::probe() {
        Ok(_) => Some(Gpu::open(0).expect("a GPU that was found can be opened")),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// A row of inputs on the GPU.
fn placed(gpu: &Gpu, x: &[f32]) -> DeviceRegion {
    let what = "a calibration row";
    let region = DeviceRegion::alone(gpu.device(), 4 * x.len(), what).unwrap();
    let data: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    gpu.device().copy_in(&region, 0, &data).unwrap();
    region
}

/// The same on a GPU, with the pairs or without.
fn on_gpu(gpu: &Gpu, dim: usize, beside: bool) -> Box<dyn Solver> {
    let mut moments = GpuMoments::new(gpu, dim).unwrap();
    for (r, x) in rows(dim).iter().enumerate() {
        moments.add(&placed(gpu, x), Part::of_row(r)).unwrap();
    }
    for (x, y) in pairs(dim).iter().filter(|_| beside) {
        let (y, x) = (placed(gpu, y), placed(gpu, x));
        moments.add_pair(&y, &x).unwrap();
    }
    Box::new(moments.finish("t").unwrap())
}

#[test]
fn gpu_solver_agrees_with_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (k, n, beside) in [
        (256, 96, false),
        (544, 640, false),
        (256, 96, true),
        (544, 640, true),
    ] {
        let weight = Matrix::new(k, n, normal(5, k * n, 0.04)).unwrap();
        let mut acc = accumulator(k);
        for (x, y) in pairs(k).iter().filter(|_| beside) {
            acc.add_pair(y, x).unwrap();
        }
        let mut host: Box<dyn Solver> = Box::new(HostSolver::new(acc.finish("t").unwrap()));
        let mut device = on_gpu(&gpu, k, beside);
        for solver in [&mut host, &mut device] {
            solver.choose_damping("t", &weight).unwrap();
        }
        assert_eq!(host.damping(), device.damping());
        let curves = [&mut host, &mut device].map(|s| s.curve("t", &weight).unwrap());
        assert_eq!(curves[0].points.len(), curves[1].points.len());
        for (a, b) in curves[0].points.iter().zip(&curves[1].points) {
            assert_eq!((&a.layout, a.bits), (&b.layout, b.bits));
            let apart = (a.loss - b.loss).abs() / a.loss;
            eprintln!("{k} {}: losses {apart:e} apart", a.layout);
            assert!(apart < 0.01, "{}: {} {}", a.layout, a.loss, b.loss);
        }
        let layout = Layout::uniform(4, 128, k).unwrap();
        let all = [Rows::Train, Rows::HoldOut, Rows::All];
        let rounded = [&mut host, &mut device].map(|s| {
            s.set_damping("t", 0.05).unwrap();
            s.round("t", &weight, &layout, &all).unwrap()
        });
        let [a, b] = &rounded;
        assert_eq!(b.quantized.dequantize(), b.decoded);
        assert_eq!(a.quantized.order, b.quantized.order);
        let codes = agreement(&a.quantized.codes, &b.quantized.codes);
        eprintln!("{k}: {codes} of the codes agree");
        assert!(codes > 0.97, "{codes}");
        for (x, y) in a.losses.iter().zip(&b.losses) {
            assert!((x.0 - y.0).abs() < 0.01 * x.0, "{x:?} {y:?}");
            assert!((x.1 - y.1).abs() < 1e-4 * x.1, "{x:?} {y:?}");
        }
    }
}

#[test]
fn gpu_solver_names_what_is_not_finite() {
    let Some(gpu) = gpu() else { return };
    let mut moments = GpuMoments::new(&gpu, 32).unwrap();
    let mut x = vec![1.0f32; 64];
    x[40] = f32::INFINITY;
    moments.add(&placed(&gpu, &x), Part::Train).unwrap();
    let error = moments.finish("layers.3.down").unwrap_err().to_string();
    assert!(
        error.contains("layers.3.down") && error.contains("feature 8"),
        "{error}"
    );
    // And in the original.
    let mut moments = GpuMoments::new(&gpu, 32).unwrap();
    let y = placed(&gpu, &[1.0f32; 64]);
    moments.add(&y, Part::Train).unwrap();
    moments.add_pair(&y, &placed(&gpu, &x)).unwrap();
    let error = moments.finish("layers.3.down").unwrap_err().to_string();
    assert!(error.contains("feature 8"), "{error}");
}
