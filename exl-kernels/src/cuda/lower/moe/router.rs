//! The norm of one row, a router of few experts and their choice by one launch (cuda/moe/router.cu).

use super::few::RowTask;
use super::{ROUTE, pair, unpair};
use crate::cuda::launch::Args;
use crate::cuda::lower::gemm::DenseRow;
use crate::cuda::lower::linear::{ROUTER_EXPERTS as EXPERTS, RouterSums};
use crate::cuda::lower::rows::RowNorm;
use crate::cuda::lower::{Target, apart};
use crate::cuda::{Kernel, Launch};

/// For routers of F16 and BF16, and the same for more inputs.
pub(in crate::cuda::lower) const ROUTERS: [Kernel; 4] = [
    Kernel::new("moe/router", "exl_moe_router_f16"),
    Kernel::new("moe/router", "exl_moe_router_bf16"),
    Kernel::new("moe/router", "exl_moe_router_long_f16"),
    Kernel::new("moe/router", "exl_moe_router_long_bf16"),
];
/// What is left of that by every thread block of gate and up of one row (cuda/moe/row.cu), where the product in front
/// has left sums of its outputs.
pub(in crate::cuda::lower) const ROUTED: Kernel = Kernel::new("moe/row", "exl_moe_row1_routed");
/// Most inputs there: threads keep all of x in registers (row.cu: ROUTED_GROUPS).
const ROUTED_INPUTS: u64 = 4096;
/// Most inputs of both.
const INPUTS: [usize; 2] = [4096, 8192];
/// Threads of the one block.
const THREADS: u32 = 512;
/// Inputs of a thread at a time.
const COLUMNS: usize = 8;

/// Whether a launch chooses experts beside other things.
pub(super) fn is_router(kernel: Kernel) -> bool {
    ROUTERS.contains(&kernel)
}

/// Puts one launch in place of a norm, a product and a choice that one row goes through. All that they leave is
/// there, but not to the bit: not where sums have a fixed order.
pub(in crate::cuda::lower) fn fuse(launches: &mut Vec<Launch>, target: &Target<'_>) {
    if target.deterministic || !launches.iter().any(|launch| super::is_route(launch.kernel)) {
        return;
    }
    let all = std::mem::take(launches);
    let mut rest = &all[..];
    while let [first, others @ ..] = rest {
        let router = router(rest);
        rest = if router.is_some() { &rest[3..] } else { others };
        launches.push(router.unwrap_or_else(|| first.clone()));
    }
}

/// The launch for the first three of a list.
fn router(launches: &[Launch]) -> Option<Launch> {
    let [norm, product, route, ..] = launches else {
        return None;
    };
    let (norm, product) = (RowNorm::of(norm)?, DenseRow::of(product)?);
    if !ROUTE.iter().any(|(_, kernel)| *kernel == route.kernel) {
        return None;
    }
    // logits, ids, weights, rows, experts, top_k, exponent: route() of moe.rs.
    let &[logits, ids, weights, rows, experts, top_k, exponent] = route.args.words() else {
        return None;
    };
    let one_row = rows == 1 && product.x == norm.out && logits == product.out;
    let same = product.inputs == norm.dim && product.outputs as u64 == experts;
    let fits = product.outputs <= EXPERTS && product.inputs.is_multiple_of(COLUMNS);
    let length = INPUTS.iter().position(|&most| product.inputs <= most)?;
    if !one_row || !same || !fits || product.weight % 16 != 0 {
        return None;
    }
    let task = [
        norm.x,
        norm.weight,
        norm.out,
        product.weight,
        logits,
        ids,
        weights,
        pair(product.inputs, experts as usize),
        pair(top_k as usize, norm.dtype),
        norm.floats(),
        exponent | u64::from((1.0 / product.inputs as f32).to_bits()) << 32,
    ];
    Some(Launch {
        kernel: ROUTERS[2 * length + usize::from(product.bf16)],
        grid: [1, 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
        args: Args::new().block(&task),
    })
}

/// Puts two launches in place of a product, the router behind it and gate and up of its row, where the product can
/// leave what the router wants of its outputs: so much of the choice is left to do that every thread block of gate and
/// up does it.
pub(in crate::cuda::lower) fn routed(launches: &mut Vec<Launch>) {
    let mut from = 0;
    while let Some([product, router, gate_up]) = launches.get(from..from + 3) {
        if let Some(both) = chosen(product, router, gate_up) {
            launches.splice(from..from + 3, both);
        }
        from += 1;
    }
}

fn chosen(product: &Launch, router: &Launch, gate_up: &Launch) -> Option<[Launch; 2]> {
    let at = ROUTERS.iter().position(|&kernel| kernel == router.kernel)?;
    let row = RowTask::of(gate_up)?;
    let words = router.args.words();
    let [x, scale, normed, weight, logits, ids, weights] = [0, 1, 2, 3, 4, 5, 6].map(|i| words[i]);
    let ([inputs, experts], [top_k, scale_type]) = (unpair(words[7]), unpair(words[8]));
    let scale_offset = match f32::from_bits((words[9] >> 32) as u32) {
        0.0 => 0,
        1.0 => 1,
        _ => return None,
    };
    let fits = inputs <= ROUTED_INPUTS;
    let same = row.x == normed && row.ids == ids && row.inputs == inputs;
    let same = same && row.experts == experts && row.segments == top_k;
    // The block that leaves logits and choice may come behind others' outputs, and before others have x.
    let left = [
        (normed, row.inputs),
        (logits, row.experts),
        (ids, row.segments),
        (weights, row.segments),
    ];
    let (own, out) = ((x, row.inputs), (row.out, row.segments * row.outputs));
    let apart = apart(out, own) && left.iter().all(|&l| apart(l, out) && apart(l, own));
    if !fits || !same || !apart {
        return None;
    }
    let sums = RouterSums {
        router: weight,
        scale,
        sums: row.behind()?,
        experts,
        bf16: at % 2 == 1,
        scale_type,
        scale_offset,
    };
    let product = sums.leave(product, own)?;
    let words: Vec<u64> = words.iter().copied().chain([sums.sums]).collect();
    let gate_up = Launch {
        kernel: ROUTED,
        args: gate_up.args.clone().block(&words),
        ..*gate_up
    };
    Some([product, gate_up])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::DeviceProps;
    use crate::cuda::lower::{Scratch, link, lower};
    use crate::ops::{Linear, LinearPart, Matrix, MoeRoute, Op, RmsNorm, RouteNorm};
    use crate::{DType, Mem, MemMut, Place};

    /// A norm, a router and a choice.
    #[derive(Clone, Copy)]
    struct Chain {
        rows: usize,
        experts: usize,
        inputs: usize,
        dtype: DType,
        deterministic: bool,
    }

    const MIXTRAL: Chain = Chain {
        rows: 1,
        experts: 8,
        inputs: 4096,
        dtype: DType::F16,
        deterministic: false,
    };

    impl Chain {
        /// The kernels, and the words of the first one's arguments. The regions are never read.
        fn launches(self) -> (Vec<&'static str>, Vec<u64>) {
            let at = |place: u64, values: usize, dtype: DType| {
                let bytes = values * dtype.bytes();
                // SAFETY: lowering looks at addresses only.
                unsafe { Mem::from_raw((place << 20) as *const u8, bytes, dtype, Place::Host) }
            };
            let to = |place: u64, values: usize, dtype: DType| {
                let bytes = values * dtype.bytes();
                // SAFETY: as above.
                unsafe { MemMut::from_raw((place << 20) as *mut u8, bytes, dtype, Place::Host) }
            };
            let (rows, experts, inputs) = (self.rows, self.experts, self.inputs);
            let ops = [
                Op::RmsNorm(RmsNorm {
                    x: at(1, rows * inputs, DType::F32),
                    weight: at(2, inputs, self.dtype),
                    residual: None,
                    out: to(3, rows * inputs, DType::F32),
                    rows,
                    dim: inputs,
                    eps: 1e-5,
                    offset: 0.0,
                }),
                Op::Linear(Linear {
                    x: at(3, rows * inputs, DType::F32),
                    rows,
                    inputs,
                    parts: vec![LinearPart {
                        matrix: Matrix::Dense(at(4, experts * inputs, self.dtype)),
                        bias: None,
                        residual: None,
                        out: to(5, rows * experts, DType::F32),
                        outputs: experts,
                    }],
                }),
                Op::MoeRoute(MoeRoute {
                    logits: at(5, rows * experts, DType::F32),
                    ids: to(6, rows * 2, DType::I32),
                    weights: to(7, rows * 2, DType::F32),
                    rows,
                    experts,
                    top_k: 2,
                    norm: RouteNorm::Sum,
                }),
            ];
            let target = Target {
                props: &DeviceProps::samples()[5],
                scratch: Scratch::default(),
                deterministic: self.deterministic,
            };
            let mut list = Vec::new();
            for op in &ops {
                lower(op, &target, &mut list).unwrap();
            }
            link(&mut list, &target);
            let names = list.iter().map(|launch| launch.kernel.entry).collect();
            (names, list[0].args.words().to_vec())
        }
    }

    #[test]
    fn the_router_of_one_row_is_one_launch() {
        let (names, words) = MIXTRAL.launches();
        assert_eq!(names, ["exl_moe_router_f16"]);
        let places: Vec<u64> = words[..7].iter().map(|w| w >> 20).collect();
        assert_eq!(places, [1, 2, 3, 4, 5, 6, 7]);
        let sizes = [pair(4096, 8), pair(2, 1), u64::from(1e-5f32.to_bits())];
        assert_eq!(words[7..10], sizes);
        let share = (1f32 / 4096.0).to_bits();
        assert_eq!(
            words[10],
            u64::from(1f32.to_bits()) | u64::from(share) << 32
        );
        let (inputs, dtype) = (6144, DType::Bf16);
        let long = Chain {
            inputs,
            dtype,
            ..MIXTRAL
        };
        assert_eq!(long.launches().0, ["exl_moe_router_long_bf16"]);
    }

    #[test]
    fn others_stay_three() {
        let (rows, experts, inputs) = (2, 9, 8200);
        let others = [
            Chain { rows, ..MIXTRAL },
            Chain { experts, ..MIXTRAL },
            Chain { inputs, ..MIXTRAL },
            Chain {
                dtype: DType::F32,
                ..MIXTRAL
            },
            Chain {
                deterministic: true,
                ..MIXTRAL
            },
        ];
        for chain in others {
            assert_eq!(chain.launches().0.len(), 3);
        }
    }
}
