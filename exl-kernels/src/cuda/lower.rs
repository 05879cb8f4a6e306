//! From ops to launches: pure functions of shapes, addresses and the GPU's properties.

mod attention;
mod gemm;
mod linear;
mod moe;
pub(super) mod quant;
mod rows;
mod sample;

use super::{DeviceProps, Kernel, Launch};
use crate::Result;
use crate::ops::{self, Op};
pub(super) use linear::{CLUSTER, CLUSTER_ARCHITECTURES, CLUSTER_KERNEL};

/// Device memory that the launches of one op may use. Ops run one after the other, so all of
/// them share it. Gate and up of experts may leave something there for down, the very next launch (moe/few.rs), down
/// for the norm behind it (moe/sum.rs), a product for the router behind it (moe/router.rs), and at the end whatever is
/// in front of a product of one row its input (linear/few/ordered.rs).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// Address of the first byte, aligned to 256.
    pub address: u64,
    /// Bytes there.
    pub bytes: u64,
    /// Address of [`COUNTERS`] 32-bit counters that are zero between launches: kernels that count
    /// arrivals put them back to zero.
    pub counters: u64,
}

/// Number of counters in [`Scratch`].
pub const COUNTERS: usize = 4096;

/// What lowering depends on besides the op.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The GPU.
    pub props: &'a DeviceProps,
    /// Scratch memory of at least [`scratch_bytes`].
    pub scratch: Scratch,
    /// Fixed order of all sums and the same kernels for every number of rows.
    pub deterministic: bool,
}

/// Kernels that stand for several ops, which [`link`] brings in.
#[cfg(test)]
pub(super) const JOINT: [&[Kernel]; 6] = [
    &attention::ROTATING,
    &moe::ROUTERS,
    &[moe::ROUTED],
    &moe::SUM_NORM,
    &rows::ROW_NORM,
    &[linear::ORDERED_KERNEL],
];

/// Every kernel that lowering may choose.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    let families = [
        rows::KERNELS,
        rows::NORMS,
        attention::KERNELS,
        gemm::KERNELS,
        linear::KERNELS,
        moe::KERNELS,
        sample::KERNELS,
        quant::KERNELS,
        super::matrix::KERNELS,
    ];
    families.into_iter().flatten().copied()
}

/// Appends the launches of an op.
///
/// # Errors
/// [`Error::Argument`] when a region has the wrong size, type or place, [`Error::Unsupported`]
/// when no kernel takes the shape.
pub fn lower(op: &Op<'_>, target: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
    ops::check(op)?;
    match op {
        Op::Embed(o) => rows::embed(o, target, list),
        Op::RmsNorm(o) => rows::rms_norm(o, target, list),
        Op::LayerNorm(o) => rows::layer_norm(o, target, list),
        Op::GatherRows(o) => rows::gather_rows(o, target, list),
        Op::ScaleLogits(o) => rows::scale_logits(o, target, list),
        Op::Clamp(o) => rows::clamp(o, target, list),
        Op::ScaleRows(o) => rows::scale_rows(o, target, list),
        Op::Gated(o) => rows::gated(o, target, list),
        Op::HessianSyrk(o) => gemm::hessian_syrk(o, target, list),
        Op::TransposedProduct(o) => gemm::transposed_product(o, target, list),
        Op::Sample(o) => sample::sample(o, target, list),
        Op::HessianFactor(o) => quant::hessian_factor(o, target, list),
        Op::HessianLoss(o) => quant::hessian_loss(o, target, list),
        Op::Gptq(o) => quant::gptq(o, target, list),
        Op::Refine(o) => quant::refine(o, target, list),
        Op::Linear(o) => linear::linear(o, target, list),
        Op::GateUp(o) => linear::gate_up(o, target, list),
        Op::Dequant(o) => linear::dequant(o, target, list),
        Op::RopeAppend(o) => attention::rope_append(o, target, list),
        Op::PagedAttn(o) => attention::paged_attn(o, target, list),
        Op::MoeRoute(o) => moe::route(o, target, list),
        Op::MoeGateUp(o) => moe::gate_up(o, target, list),
        Op::MoeDown(o) => moe::down(o, target, list),
    }
}

/// What is known only when all launches of a plan are: call it once, with those of all ops in their
/// order, for the target that they are made for. Neighbours become one launch: rotation with append and attention,
/// whose rotated queries nothing else may read; a norm of one row, its router and the experts' gate and up; the sum
/// of the experts and the next norm. Experts learn what they need not wait for and in which order down wants what
/// gate and up compute, and launches in front of a product of one row in which order that wants what they compute.
pub fn link(launches: &mut Vec<Launch>, target: &Target<'_>) {
    join(launches, attention::rotating);
    attention::rehearse(launches, target);
    moe::fuse(launches, target);
    moe::link(launches);
    moe::routed(launches);
    moe::take_sums(launches, target);
    // Elsewhere the sum of experts is one thread block's, and what one scatters takes longer than gathering takes;
    // norms are compiled for no others.
    let clusters = CLUSTER_ARCHITECTURES.contains(&target.props.capability.0);
    linear::hand_over(launches, &target.scratch, |front, ordered| match front {
        [others @ .., last] if clusters => {
            attention::leave(last, ordered)
                || linear::leave(last, ordered)
                || moe::leave(last, ordered)
                || rows::leave((others, last), ordered, target)
        }
        _ => false,
    });
}

/// Puts one launch in place of two neighbours wherever there is one for both.
fn join(launches: &mut Vec<Launch>, both: impl Fn(&Launch, &Launch) -> Option<Launch>) {
    let mut from = 0;
    while from + 1 < launches.len() {
        if let Some(both) = both(&launches[from], &launches[from + 1]) {
            launches.splice(from..from + 2, [both]);
        }
        from += 1;
    }
}

/// Whether two regions of 32-bit values, each an address and a length, have nothing in common.
fn apart((a, n): (u64, u64), (b, m): (u64, u64)) -> bool {
    a + 4 * n <= b || b + 4 * m <= a
}

/// Bytes of device memory that tables of the launches of an op take (`Args::with_table`). Equal tables of
/// launches that are kept share memory.
pub fn table_bytes(op: &Op<'_>) -> u64 {
    match op {
        Op::MoeGateUp(o) => moe::gate_up_tables(o),
        Op::MoeDown(o) => moe::down_tables(o),
        _ => 0,
    }
}

/// Bytes of scratch memory that the launches of an op need.
pub fn scratch_bytes(op: &Op<'_>, props: &DeviceProps) -> u64 {
    match op {
        Op::Linear(o) => linear::linear_scratch(o, props),
        Op::GateUp(o) => linear::gate_up_scratch(o, props),
        Op::MoeGateUp(o) => moe::gate_up_scratch(o, props),
        Op::MoeDown(o) => moe::down_scratch(o, props),
        Op::PagedAttn(o) => attention::paged_attn_scratch(o, props),
        Op::Sample(o) => sample::sample_scratch(o, props),
        Op::HessianFactor(o) => quant::hessian_factor_scratch(o),
        Op::HessianLoss(o) => quant::hessian_loss_scratch(o),
        Op::Gptq(o) => quant::gptq_scratch(o),
        Op::Refine(o) => quant::refine_scratch(o),
        Op::Embed(_)
        | Op::RmsNorm(_)
        | Op::LayerNorm(_)
        | Op::GatherRows(_)
        | Op::ScaleLogits(_)
        | Op::Clamp(_)
        | Op::ScaleRows(_)
        | Op::Gated(_)
        | Op::MoeRoute(_)
        | Op::HessianSyrk(_)
        | Op::TransposedProduct(_)
        | Op::Dequant(_)
        | Op::RopeAppend(_) => 0,
    }
}
