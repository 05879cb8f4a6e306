//! The norm of one row that is left in the order of the product behind it as well (cuda/norm/row_norm.cu).

use super::norm::RowNorm;
use crate::cuda::launch::Args;
use crate::cuda::lower::linear::{Ordered, product_bytes};
use crate::cuda::lower::{Target, apart};
use crate::cuda::{Kernel, Launch};

/// Blocks of a launch.
const BLOCKS: u32 = 8;
/// Up to so many columns other norms add up in another order: a row's norm is to have the same bits in every step.
const LEAST_COLUMNS: usize = 1024;
/// By the longest row, and threads.
pub(in crate::cuda::lower) const ROW_NORM: [Kernel; 2] = [
    Kernel::new("norm/row_norm", "exl_row_norm"),
    Kernel::new("norm/row_norm", "exl_row_norm_long"),
];
const COLUMNS: [usize; 2] = [4096, 8192];
const THREADS: [u32; 2] = [256, 512];
/// Weights of each multiprocessor that take longer than a rehearsal.
const REHEARSAL_BYTES: u64 = 40 << 10;
/// Words of the task: what is normed, where the next product has it, and the number of columns (`RowNorm` of row.cuh).
const NORMED_WORD: usize = 1;
const ORDER_WORD: usize = 2;
const COLUMNS_WORD: usize = 4;

impl RowNorm {
    /// As the kernels that leave it in order have it.
    pub(in crate::cuda::lower) fn words(&self) -> [u64; 6] {
        let shape = self.dim as u64 | (self.dtype as u64) << 32;
        [self.weight, self.out, 0, 0, shape, self.floats()]
    }
}

/// Lets a launch whose task begins with a norm leave what is normed in order, if that is what is wanted.
pub(in crate::cuda::lower) fn order(launch: &mut Launch, ordered: &Ordered) -> bool {
    let words = launch.args.words();
    let fits = ordered.of == (words[NORMED_WORD], words[COLUMNS_WORD] & 0xffff_ffff);
    if fits {
        launch.args.patch(ORDER_WORD, &[ordered.order, ordered.to]);
    }
    fits
}

/// Puts a launch that leaves it in order in place of a norm that computes what is wanted; with a rehearsal, if the
/// product in front takes longer than that.
pub(in crate::cuda::lower) fn leave(
    (front, norm): (&[Launch], &mut Launch),
    ordered: &Ordered,
    target: &Target<'_>,
) -> bool {
    let Some(row) = RowNorm::of(norm).filter(|row| row.dim > LEAST_COLUMNS) else {
        return false;
    };
    let Some(length) = COLUMNS.iter().position(|&most| row.dim <= most) else {
        return false;
    };
    let bytes = front.last().map_or(0, product_bytes);
    let rehearses = u64::from(bytes >= REHEARSAL_BYTES * u64::from(target.props.sms));
    // Some blocks write while others still read.
    let count = row.dim as u64;
    let mut own = Launch {
        kernel: ROW_NORM[length],
        grid: [BLOCKS, 1, 1],
        block: [THREADS[length], 1, 1],
        shared_bytes: 0,
        args: Args::new().block(&[&row.words()[..], &[row.x, rehearses]].concat()),
    };
    let fits = apart((row.x, count), (row.out, count)) && order(&mut own, ordered);
    if fits {
        *norm = own;
    }
    fits
}
