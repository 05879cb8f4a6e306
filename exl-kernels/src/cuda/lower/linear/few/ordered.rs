//! One row in the order of the matrices that it is multiplied with, so that no thread block gathers it
//! (cuda/common/places.cuh).

use super::{
    COLUMNS_WORD, EACH_WORD, KERNELS, MATRIX_WORDS, OUT_WORD, ROUTER_WORDS, ROW_MODULE,
    router_sum_bytes,
};
use crate::cuda::lower::{Scratch, apart};
use crate::cuda::{Kernel, Launch};

/// The product of such a row.
pub(in crate::cuda::lower) const ORDERED_KERNEL: Kernel =
    Kernel::new(ROW_MODULE, "exl_qgemm_row1_ordered_exl2");
/// Alignment of the row.
const ALIGN: u64 = 256;
/// Products in order for each one that is not, at least.
const FEW: usize = 8;
/// Words of the task: the permutation of the first part, x, and behind it inputs and the number of orders.
const PERM_WORD: usize = 4;
const X_WORD: usize = ROUTER_WORDS - 1;
const INPUTS_WORD: usize = ROUTER_WORDS + 3;
const ORDERS_WORD: usize = ROUTER_WORDS + 5;

/// What a launch leaves once more for the product behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda::lower) struct Ordered {
    /// Address and number of the values that it computes.
    pub(in crate::cuda::lower) of: (u64, u64),
    /// Addresses: where each of them goes, 32-bit numbers, 0 where all stay in place; and from where on.
    pub(in crate::cuda::lower) order: u64,
    pub(in crate::cuda::lower) to: u64,
}

/// Bytes of scratch memory for that, beside what the launch in front uses there: for rows of so many values, of which
/// one alone is left so.
pub(in crate::cuda::lower) fn ordered_bytes(rows: usize, values: usize) -> usize {
    match rows {
        1 => 4 * values + ALIGN as usize,
        _ => 0,
    }
}

impl Ordered {
    /// What a product of one row would like to have, if it has one order: at the end of the scratch memory, or before
    /// what the launch in front reads there, as some of its blocks write while others still read.
    fn wanted(product: &Launch, front: Option<&Launch>, scratch: &Scratch) -> Option<Self> {
        if product.kernel != KERNELS[0] {
            return None;
        }
        let words = product.args.words();
        let (values, perm) = (words[INPUTS_WORD] >> 32, words[PERM_WORD]);
        if words[ORDERS_WORD] >> 48 != 1 {
            return None;
        }
        let of = (words[X_WORD], values);
        if perm == 0 {
            let (order, to) = (0, of.0);
            return Some(Self { of, order, to });
        }
        let order = perm + 4 * values;
        let all = scratch.address..scratch.address + scratch.bytes;
        let read = front.filter(|front| front.kernel == ORDERED_KERNEL);
        let read = read.map(|front| front.args.words()[X_WORD]);
        let end = read.filter(|x| all.contains(x)).unwrap_or(all.end);
        let to = end.checked_sub(4 * values)? / ALIGN * ALIGN;
        // What it leaves for a router lies there as well.
        let columns = words[COLUMNS_WORD] & 0xffff_ffff;
        let sums = match words[EACH_WORD] >> 32 & 0xff {
            0 => 0,
            _ => router_sum_bytes(columns as usize) as u64 / 4,
        };
        let free = to >= scratch.address && apart((to, values), (words[ROUTER_WORDS + 2], sums));
        free.then_some(Self { of, order, to })
    }

    /// Lets a product read it.
    fn read(&self, product: &mut Launch) {
        product.kernel = ORDERED_KERNEL;
        product.args.patch(X_WORD, &[self.to]);
        for perm in (PERM_WORD..OUT_WORD).step_by(MATRIX_WORDS) {
            product.args.patch(perm, &[0]);
        }
    }
}

/// Lets gate and up leave their outputs in order as well, if a launch is that, whose own row is in order, and these are
/// its outputs.
pub(in crate::cuda::lower) fn leave(gate_up: &mut Launch, ordered: &Ordered) -> bool {
    if gate_up.kernel != ORDERED_KERNEL {
        return false;
    }
    let words = gate_up.args.words();
    let columns = words[COLUMNS_WORD] & 0xffff_ffff;
    let fits = words[ORDERS_WORD] & 0xffff == 1 && ordered.of == (words[OUT_WORD], columns);
    if fits {
        gate_up
            .args
            .patch(ROUTER_WORDS, &[ordered.order, ordered.to]);
    }
    fits
}

/// Lets products of one row find it in their order: as it is, if that is their order, or if `leave` lets the last of
/// the launches in front leave it so. All of them or none, but for a few: by turns, two kernels lose more than that
/// gains, as they have more code than the caches of multiprocessors keep.
pub(in crate::cuda::lower) fn hand_over(
    launches: &mut [Launch],
    scratch: &Scratch,
    leave: impl Fn(&mut [Launch], &Ordered) -> bool,
) {
    let before = launches.to_vec();
    for i in 0..launches.len() {
        let (front, rest) = launches.split_at_mut(i);
        let Some(wanted) = Ordered::wanted(&rest[0], front.last(), scratch) else {
            continue;
        };
        let in_order = wanted.order == 0;
        if in_order || leave(front, &wanted) {
            wanted.read(&mut rest[0]);
        }
    }
    let count = |kernel| launches.iter().filter(|l| l.kernel == kernel).count();
    if FEW * count(KERNELS[0]) > count(ORDERED_KERNEL) {
        launches.clone_from_slice(&before);
    }
}
