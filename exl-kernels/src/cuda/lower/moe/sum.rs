//! The weighted sum of the experts of one row and the norm behind it by one launch (cuda/moe/sum_norm.cu).

use super::few::{RowSum, SPLIT};
use crate::cuda::launch::Args;
use crate::cuda::lower::linear::Ordered;
use crate::cuda::lower::rows::{RowNorm, order};
use crate::cuda::lower::{CLUSTER_ARCHITECTURES, Target, apart};
use crate::cuda::{Kernel, Launch};

/// By the thread blocks that divide the rows of down, 1 or [`SPLIT`]; and the same for more columns.
pub(in crate::cuda::lower) const SUM_NORM: [Kernel; 4] = [
    Kernel::new("moe/sum_norm", "exl_moe_sum_norm_1"),
    Kernel::new("moe/sum_norm", "exl_moe_sum_norm_4"),
    Kernel::new("moe/sum_norm", "exl_moe_sum_norm_long_1"),
    Kernel::new("moe/sum_norm", "exl_moe_sum_norm_long_4"),
];
/// Most columns of both.
const COLUMNS: [usize; 2] = [4096, 8192];
/// Threads of all blocks, and blocks where there are clusters (cuda/norm/row.cuh).
const THREADS: u32 = 1024;
const CLUSTER: u32 = 8;
const _: () = assert!(SPLIT == 4, "the kernels say so");

/// Lets the norm behind experts of one row add up their outputs, which down then leaves as they are.
pub(in crate::cuda::lower) fn take_sums(launches: &mut [Launch], target: &Target<'_>) {
    for i in 1..launches.len() {
        if let [down, norm] = &mut launches[i - 1..=i]
            && let Some(both) = summing(down, norm, target)
        {
            RowSum::leave(down);
            *norm = both;
        }
    }
}

/// Lets the norm leave its outputs in order as well, if a launch is that and these are its outputs.
pub(in crate::cuda::lower) fn leave(norm: &mut Launch, ordered: &Ordered) -> bool {
    SUM_NORM.contains(&norm.kernel) && order(norm, ordered)
}

/// What takes the place of a norm, if it can.
fn summing(down: &Launch, norm: &Launch, target: &Target<'_>) -> Option<Launch> {
    let sum = RowSum::of(down)?;
    let norm = RowNorm::of(norm)?;
    let length = COLUMNS.iter().position(|&most| norm.dim <= most)?;
    // What is added up and what is normalised have places of their own.
    let apart = apart((norm.out, sum.columns), (sum.out, sum.columns));
    let aligned = sum.residual.is_multiple_of(16);
    if norm.x != sum.out || norm.dim as u64 != sum.columns || !apart || !aligned {
        return None;
    }
    let split = usize::from(sum.split);
    let sums = [sum.parts, sum.weights, sum.residual, sum.out, sum.segments];
    // As the kernel is compiled, whatever clusters other kernels get.
    let clusters = CLUSTER_ARCHITECTURES.contains(&target.props.capability.0);
    let blocks = if clusters { CLUSTER } else { 1 };
    Some(Launch {
        kernel: SUM_NORM[2 * length + split],
        grid: [blocks, 1, 1],
        block: [THREADS / blocks, 1, 1],
        shared_bytes: 0,
        args: Args::new().block(&[&norm.words()[..], &sums].concat()),
    })
}
