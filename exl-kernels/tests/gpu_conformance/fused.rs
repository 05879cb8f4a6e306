//! Neighbouring ops of one row that a GPU computes by one launch, or that hand on more than they say: they leave
//! what the ops one by one leave.

use exl_kernels::cuda::CudaOps;
use exl_kernels::ops::{
    Activation, GateUp, Linear, LinearPart, Matrix, MoeRoute, Op, RmsNorm, RouteNorm,
};
use exl_kernels::{DType, Mem, reference};
use half::{bf16, f16};

use super::overlap::{Buffer, DIM, EXPERTS, Experts, TOP_K, WIDE, exl2, exl2_of, floats, order};
use super::{Rng, device, modes, quick};

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
        self.op_on(self.x.read())
    }

    /// Of another row.
    fn op_on<'a>(&'a self, x: Mem<'a>) -> Op<'a> {
        Op::RmsNorm(RmsNorm {
            x,
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
pub(super) fn check<'a>(
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

pub(super) fn assert_ran(ops: &CudaOps, kernels: &[&str]) {
    for kernel in kernels {
        assert!(ops.kernels().iter().any(|k| k.entry == *kernel), "{kernel}");
    }
}

pub(super) fn part<'a>(matrix: Matrix<'a>, out: &'a Buffer<f32>, outputs: usize) -> LinearPart<'a> {
    LinearPart {
        matrix,
        bias: None,
        residual: None,
        out: out.write(),
        outputs,
    }
}

/// A router of one row and what it leaves.
struct Router {
    norm: Normed,
    weight: Half,
    logits: Buffer<f32>,
    ids: Buffer<i32>,
    weights: Buffer<f32>,
    route: RouteNorm,
}

impl Router {
    fn new(
        (dim, experts, top_k): (usize, usize, usize),
        (brain, route): (bool, RouteNorm),
        rng: &mut Rng,
    ) -> Self {
        let weight = rng.floats(experts * dim, 2.0 / (dim as f32).sqrt());
        Self {
            norm: Normed::new(dim, brain, rng),
            weight: Half::new(&weight, brain),
            logits: floats(vec![f32::NAN; experts]),
            ids: Buffer::new(vec![-1; top_k], DType::I32),
            weights: floats(vec![f32::NAN; top_k]),
            route,
        }
    }

    fn ops(&self) -> Vec<Op<'_>> {
        let [experts, top_k] = [&self.logits, &self.weights].map(|b| b.values().len());
        vec![
            self.norm.op(),
            Op::Linear(Linear {
                x: self.norm.out.read(),
                rows: 1,
                inputs: self.norm.dim,
                parts: vec![part(
                    Matrix::Dense(self.weight.mem()),
                    &self.logits,
                    experts,
                )],
            }),
            Op::MoeRoute(MoeRoute {
                logits: self.logits.read(),
                ids: self.ids.write(),
                weights: self.weights.write(),
                rows: 1,
                experts,
                top_k,
                norm: self.route,
            }),
        ]
    }

    fn left(&self) -> Vec<Vec<f32>> {
        let ids = self.ids.values().iter().map(|&id| id as f32).collect();
        let [normed, logits, weights] =
            [&self.norm.out, &self.logits, &self.weights].map(Buffer::values);
        vec![normed, logits, weights, ids]
    }
}

const NORMS: [RouteNorm; 3] = [RouteNorm::None, RouteNorm::Sum, RouteNorm::Norm(2.5)];

#[test]
fn gpu_routers_take_norms_and_choices_along() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(22);
    let sizes = [
        (544, 3, 2),
        (1024, 8, 8),
        (4096, 8, 2),
        (6144, 8, 3),
        (8192, 5, 1),
    ];
    for (i, size) in sizes.into_iter().enumerate() {
        for brain in [false, true] {
            let router = Router::new(size, (brain, NORMS[i % 3]), &mut rng);
            let what = format!("{} experts, {} inputs", size.1, size.0);
            check(&mut ops, (&what, 1e-4), || router.ops(), || router.left());
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

/// A product of one row.
pub(super) fn product<'a>(x: &'a Buffer<f32>, parts: Vec<LinearPart<'a>>) -> Op<'a> {
    Op::Linear(Linear {
        x: x.read(),
        rows: 1,
        inputs: x.values().len(),
        parts,
    })
}

const ORDERED: &str = "exl_qgemm_row1_ordered_exl2";

#[test]
fn gpu_products_in_order_gather_nothing() {
    let Some(device) = device() else { return };
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(25);
    for inputs in [32, DIM, 4096] {
        let order: Vec<u32> = (0..inputs as u32).collect();
        let matrices = [96, 544].map(|outputs| exl2_of(&order, outputs, &mut rng));
        let (x, [a, b]) = (
            rng.floats(inputs, 1.0),
            [96, 544].map(|n| vec![f32::NAN; n]),
        );
        let (x, a, b) = (floats(x), floats(a), floats(b));
        let list = || {
            let [first, second] = &matrices;
            let parts = vec![
                part(Matrix::Quant(first), &a, 96),
                part(Matrix::Quant(second), &b, 544),
            ];
            vec![product(&x, parts)]
        };
        let values = || vec![a.values(), b.values()];
        let what = format!("{inputs} inputs");
        check(&mut ops, (&what, 1e-3), list, values);
    }
    assert_ran(&ops, &[ORDERED]);
}

/// A norm leaves its row in the order of gate and up, and they leave theirs in that of down.
#[test]
fn gpu_rows_are_handed_on_in_order() {
    let Some(device) = device() else { return };
    let clusters = [9, 10].contains(&device.props().capability.0);
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(26);
    for (dim, wide) in [(1056, WIDE), (4096, 1504), (8192, DIM)] {
        let order = order(dim, &mut rng);
        let [gate, up] = [(); 2].map(|()| exl2_of(&order, wide, &mut rng));
        let down = exl2(wide, dim, &mut rng);
        let [inner, out] = [wide, dim].map(|n| floats(vec![f32::NAN; n]));
        for brain in [false, true] {
            let norm = Normed::new(dim, brain, &mut rng);
            let list = || {
                let gate_up = Op::GateUp(GateUp {
                    x: norm.out.read(),
                    rows: 1,
                    inputs: dim,
                    outputs: wide,
                    gate: Matrix::Quant(&gate),
                    up: Matrix::Quant(&up),
                    gate_bias: None,
                    up_bias: None,
                    act: Activation::Silu,
                    out: inner.write(),
                });
                let down = part(Matrix::Quant(&down), &out, dim);
                vec![norm.op(), gate_up, product(&inner, vec![down])]
            };
            let values = || [&norm.out, &inner, &out].map(Buffer::values).to_vec();
            check(&mut ops, (&format!("{dim} inputs"), 2e-3), list, values);
        }
    }
    if clusters {
        assert_ran(&ops, &["exl_row_norm", "exl_row_norm_long", ORDERED]);
    }
}

/// A product leaves what the router wants of its outputs, gate and up choose the experts, down relies on the choice,
/// and a norm adds up what down leaves, in the order of the product behind it.
#[test]
fn gpu_experts_choose_themselves() {
    let Some(device) = device() else { return };
    let large = device.props().capability.0 == 9;
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(24);
    let sizes = [
        (DIM, WIDE, EXPERTS),
        (4096, 544, EXPERTS),
        (6144, WIDE, 3),
        (6144, 256, 3),
    ];
    let some = if quick() { 1 } else { sizes.len() };
    for (i, (dim, wide, different)) in sizes.into_iter().enumerate().take(some) {
        let experts = Experts::new((dim, wide), different, &mut rng);
        let [inner, out] = [TOP_K * wide, dim].map(|n| floats(vec![f32::NAN; n]));
        // In order, like the product behind the norm then; and both gathered.
        let in_order: Vec<u32> = (0..DIM as u32).collect();
        let ordered = exl2_of(&in_order, dim, &mut rng);
        let (gathered, heads) = (exl2(DIM, dim, &mut rng), floats(rng.floats(DIM, 0.1)));
        let (next, queries) = (exl2(dim, 96, &mut rng), floats(vec![f32::NAN; 96]));
        for brain in [false, true] {
            let router = Router::new((dim, EXPERTS, TOP_K), (brain, NORMS[i % 3]), &mut rng);
            let behind = Normed::new(dim, brain, &mut rng);
            let before = floats(router.norm.x.values());
            let matrix = if brain { &gathered } else { &ordered };
            let list = || {
                let choice = (&router.ids, &router.weights);
                let sum = (Some(router.norm.x.read()), out.write());
                let mut output = part(Matrix::Quant(matrix), &router.norm.x, dim);
                output.residual = Some(before.read());
                let mut list = vec![product(&heads, vec![output])];
                list.extend(router.ops());
                list.extend(experts.ops(router.norm.out.read(), choice, &inner, sum));
                list.push(behind.op_on(out.read()));
                list.push(product(
                    &behind.out,
                    vec![part(Matrix::Quant(&next), &queries, 96)],
                ));
                list
            };
            let values = || {
                let mut left = router.left();
                left.push(router.norm.x.values());
                left.extend([&inner, &out, &behind.out, &queries].map(Buffer::values));
                left
            };
            check(&mut ops, (&format!("{dim} inputs"), 2e-3), list, values);
        }
    }
    if large && !quick() {
        assert_ran(
            &ops,
            &[
                "exl_moe_row1_routed",
                "exl_moe_sum_norm_1",
                "exl_moe_sum_norm_4",
                "exl_moe_sum_norm_long_1",
                "exl_moe_sum_norm_long_4",
                ORDERED,
            ],
        );
    }
}

/// Gate and up leave their outputs a second time, in the order of down, whose input is long enough on large GPUs.
#[test]
fn gpu_experts_hand_their_outputs_on_in_order() {
    let Some(device) = device() else { return };
    let large = device.props().sms >= 128 && device.props().capability.0 == 9;
    let mut ops = CudaOps::new(device).unwrap();
    let mut rng = Rng(23);
    let experts = Experts::new((DIM, WIDE), EXPERTS, &mut rng);
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
