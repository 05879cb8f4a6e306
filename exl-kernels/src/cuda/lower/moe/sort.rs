//! Row slots sorted by expert, and the sum of the experts' outputs (cuda/moe/sort.cu).

use super::{ALIGN, Layer, Sum};
use crate::cuda::launch::Args;
use crate::cuda::lower::gemm::vectors;
use crate::cuda::{Kernel, Launch};

pub(super) const SORT: Kernel = Kernel::new("moe/sort", "exl_moe_sort");
pub(super) const COMBINE: Kernel = Kernel::new("moe/sort", "exl_moe_combine");

const SORT_THREADS: u32 = 1024;
const COMBINE_THREADS: usize = 256;

/// Where sorted slots and prepared inputs lie in scratch memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    counts: u64,
    segments: u64,
    slots: u64,
    segment_of: u64,
    /// Behind them.
    pub(super) inputs: u64,
    /// Most rows of a segment.
    rows: usize,
}

impl Space {
    /// For segments of at most so many rows.
    pub(super) fn new(layer: &Layer<'_>, rows: usize, scratch: u64) -> Self {
        let sizes = [
            16,
            16 * layer.segments(rows),
            4 * layer.slots(),
            4 * layer.slots(),
        ];
        let mut at = scratch;
        let [counts, segments, slots, segment_of] = sizes.map(|bytes| {
            let own = at;
            at += bytes.next_multiple_of(ALIGN) as u64;
            own
        });
        Self {
            counts,
            segments,
            slots,
            segment_of,
            inputs: at,
            rows,
        }
    }

    /// Bytes without the inputs.
    pub(super) fn bytes(layer: &Layer<'_>, rows: usize) -> usize {
        Self::new(layer, rows, 0).inputs as usize
    }

    /// `Sorted` of experts.cuh.
    pub(super) fn words(&self) -> [u64; 4] {
        [self.counts, self.segments, self.slots, self.segment_of]
    }

    pub(super) fn sort(&self, layer: &Layer<'_>, list: &mut Vec<Launch>) {
        let args = Args::new().ptr(layer.ids);
        let args = self.words().into_iter().fold(args, Args::ptr);
        list.push(Launch {
            kernel: SORT,
            grid: [1, 1, 1],
            block: [SORT_THREADS, 1, 1],
            shared_bytes: 0,
            args: args.int(layer.slots()).int(layer.experts).int(self.rows),
        });
    }
}

/// Adds the outputs of each row's experts.
pub(super) fn combine(layer: &Layer<'_>, sum: &Sum, list: &mut Vec<Launch>) {
    if layer.rows == 0 || layer.outputs == 0 {
        return;
    }
    let across = layer.outputs.div_ceil(4 * COMBINE_THREADS);
    let aligned = vectors(&[layer.out, sum.residual, sum.out], &[layer.outputs], 4);
    list.push(Launch {
        kernel: COMBINE,
        grid: [layer.rows as u32, across as u32, 1],
        block: [COMBINE_THREADS as u32, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(layer.out)
            .ptr(sum.weights)
            .ptr(sum.residual)
            .ptr(sum.out)
            .int(layer.outputs)
            .int(layer.top_k)
            .int(usize::from(aligned)),
    });
}
