//! Neighbouring ops of one row that a GPU computes by one launch, or that hand on more than they say: they leave
//! what the ops one by one leave.

use exl_kernels::cuda::CudaOps;
use exl_kernels::ops::{Linear, LinearPart, Matrix, MoeRoute, Op, RmsNorm, RouteNorm};
use exl_kernels::{DType, Mem, reference};
use half::{bf16, f16};

use super::overlap::{Buffer, DIM, Experts, TOP_K, WIDE, floats};
use super::{Rng, device, modes};

/// Weights of 16 bits.
enum Half {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Half {
    fn new(values: &[f32], brain: bool) -> Self {
        match brain {
            true => Self::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            false => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
        }
    }

    fn mem(&self) -> Mem<'_> {
        match self {
            Self::F16(values) => Mem::host(values),
            Self::Bf16(values) => Mem::host(values),
        }
    }
}

/// A row and the norm of it.
struct Normed {
    weight: Half,
    x: Buffer<f32>,
    out: Buffer<f32>,
    dim: usize,
    offset: f32,
}

impl Normed {
    fn new(dim: usize, brain: bool, rng: &mut Rng) -> Self {
        // A chunk far above the others, and one of zeros.
        let mut x = rng.floats(dim, 3.0);
        x[..64].iter_mut().for_each(|v| *v *= 100.0);
        x[dim - 128..].fill(0.0);
        Self {
            weight: Half::new(&rng.floats(dim, 1.0), brain),
            x: floats(x),
            out: floats(vec![f32::NAN; dim]),
            dim,
            offset: if brain { 1.0 } else { 0.0 },
        }
    }

    fn op(&self) -> Op<'_> {
        Op::RmsNorm(RmsNorm {
            x: self.x.read(),
            weight: self.weight.mem(),
            residual: None,
            out: self.out.write(),
            rows: 1,
            dim: self.dim,
            eps: 1e-5,
            offset: self.offset,
        })
    }
}

/// Each of some buffers is within a share of its largest value of what it should be.
fn assert_close(what: &str, tested: &[Vec<f32>], exact: &[Vec<f32>], tolerance: f32) {
    for (a, b) in tested.iter().zip(exact) {
        let scale = b.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(a.iter().all(|v| v.is_finite()), "{what}");
        assert!(worst <= tolerance * scale, "{what}: {worst:e} of {scale:e}");
    }
}

/// Runs ops on a GPU in every mode, and one by one in 64-bit floats; compares what `values` says.
fn check<'a>(
    ops: &mut CudaOps,
    (what, tolerance): (&str, f32),
    list: impl Fn() -> Vec<Op<'a>>,
    values: impl Fn() -> Vec<Vec<f32>>,
) {
    for op in &mut list() {
        reference::run(op).unwrap();
    }
    let exact = values();
    let mut first: Option<Vec<Vec<f32>>> = None;
    for (mode, options) in modes(false) {
        ops.set_options(options);
        ops.run_all(&mut list()).unwrap();
        let tested = values();
        assert_close(what, &tested, &exact, tolerance);
        let first = first.get_or_insert_with(|| tested.clone());
        assert!(*first == tested, "{what}: other bits with {mode}");
    }
}

fn assert_ran(ops: &CudaOps, kernels: &[&str]) {
    for kernel in kernels {
        assert!(ops.kernels().iter().any(|k| k.entry == *kernel), "{kernel}");
    }
}

fn part<'a>(matrix: Matrix<'a>, out: &'a Buffer<f32>, outputs: usize) -> LinearPart<'a> {
    LinearPart {
        matrix,
        bias: None,
        residual: None,
        out: out.write(),
        outputs,
    }
}

#[test]
fn gpu_routers_take_norms_and_choices_along() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(22);
    let norms = [RouteNorm::None, RouteNorm::Sum, RouteNorm::Norm(2.5)];
    let sizes = [
        (544, 3, 2),
        (1024, 8, 8),
        (4096, 8, 2),
        (6144, 8, 3),
        (8192, 5, 1),
    ];
    for (i, (dim, experts, top_k)) in sizes.into_iter().enumerate() {
        for brain in [false, true] {
            let norm = Normed::new(dim, brain, &mut rng);
            let router = Half::new(&rng.floats(experts * dim, 2.0 / (dim as f32).sqrt()), brain);
            let (logits, weights) = (vec![f32::NAN; experts], vec![f32::NAN; top_k]);
            let (logits, weights) = (floats(logits), floats(weights));
            let ids = Buffer::new(vec![-1; top_k], DType::I32);
            let list = || {
                vec![
                    norm.op(),
                    Op::Linear(Linear {
                        x: norm.out.read(),
                        rows: 1,
                        inputs: dim,
                        parts: vec![part(Matrix::Dense(router.mem()), &logits, experts)],
                    }),
                    Op::MoeRoute(MoeRoute {
                        logits: logits.read(),
                        ids: ids.write(),
                        weights: weights.write(),
                        rows: 1,
                        experts,
                        top_k,
                        norm: norms[i % 3],
                    }),
                ]
            };
            let values = || {
                let ids: Vec<f32> = ids.values().iter().map(|&id| id as f32).collect();
                vec![norm.out.values(), logits.values(), weights.values(), ids]
            };
            check(
                &mut ops,
                (&format!("{experts} experts, {dim} inputs"), 1e-4),
                list,
                values,
            );
        }
    }
    assert_ran(
        &ops,
        &[
            "exl_moe_router_f16",
            "exl_moe_router_bf16",
            "exl_moe_router_long_f16",
            "exl_moe_router_long_bf16",
        ],
    );
}

/// Gate and up leave their outputs a second time, in the order of down, whose input is long enough on large GPUs.
#[test]
fn gpu_experts_hand_their_outputs_on_in_order() {
    let Some(device) = device() else { return };
    let large = device.props().sms >= 128 && device.props().capability.0 == 9;
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(23);
    let experts = Experts::new(&mut rng);
    let x = floats(rng.floats(DIM, 1.0));
    let (wide, out) = (vec![f32::NAN; TOP_K * WIDE], vec![f32::NAN; DIM]);
    let (wide, out) = (floats(wide), floats(out));
    for chosen in [[3, 6], [7, 0]] {
        let ids = Buffer::new(chosen.to_vec(), DType::I32);
        let weights = floats(vec![0.75, 0.25]);
        let list = || {
            let choice = (&ids, &weights);
            Vec::from(experts.ops(x.read(), choice, &wide, (None, out.write())))
        };
        let values = || vec![wide.values(), out.values()];
        check(
            &mut ops,
            (&format!("experts {chosen:?}"), 2e-3),
            list,
            values,
        );
    }
    if large {
        assert_ran(&ops, &["exl_moe_row1_exl2", "exl_moe_row1_add_split_exl2"]);
    }
}
