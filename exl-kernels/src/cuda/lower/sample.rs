//! The choice of tokens: one launch, whatever the parameters of the rows, which only the GPU sees.

use super::{COUNTERS, Target};
use crate::cuda::launch::Args;
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{SAMPLE_WORDS, Sample};
use crate::{Error, Result};

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[Kernel::new("sample/sample", "exl_sample")];

const THREADS: u32 = 512;
/// Logits of a block.
const CHUNK: usize = 4096;
/// Logits whose largest one is kept.
const GROUP: usize = 32;
/// What a block leaves for the last one of its row.
const CHUNK_BYTES: usize = 24;
/// Bits of the fixed-point weights behind the point; fewer when the sum of a row would not fit.
const MOST_BITS: u32 = 44;

/// Blocks of a row, and bytes of scratch.
fn row_of(o: &Sample<'_>) -> (usize, usize) {
    let chunks = o.tokens.div_ceil(CHUNK);
    let bytes = chunks * CHUNK_BYTES + o.tokens.div_ceil(GROUP) * 4;
    (chunks, bytes.next_multiple_of(256))
}

/// Rows that a launch takes: each has a counter.
fn rows_at_once(o: &Sample<'_>) -> usize {
    o.rows.min(COUNTERS)
}

pub(super) fn sample(o: &Sample<'_>, target: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
    let sizes = [o.rows, o.vocab, o.window, o.blocked_width];
    if let Some(n) = sizes.iter().find(|&&n| n > 1 << 30) {
        return Err(Error::Unsupported {
            op: "sample",
            what: format!("a size of {n}"),
        });
    }
    let (chunks, row_bytes) = row_of(o);
    let logits = o.logits.as_mem().as_ptr() as u64;
    let vectors = o.vocab.is_multiple_of(4) && logits.is_multiple_of(16);
    let one_bits = MOST_BITS.min(62 - o.vocab.next_power_of_two().ilog2());
    for first in (0..o.rows).step_by(COUNTERS) {
        let rows = (o.rows - first).min(COUNTERS);
        let at = |start: u64, words: usize| start + (first * words * 4) as u64;
        list.push(Launch {
            kernel: KERNELS[0],
            grid: [chunks as u32, rows as u32, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            args: Args::new()
                .ptr(at(logits, o.vocab))
                .ptr(at(o.params.as_ptr() as u64, SAMPLE_WORDS))
                .ptr(at(o.recent.as_ptr() as u64, o.window))
                .ptr(at(o.blocked.as_ptr() as u64, o.blocked_width))
                .ptr(at(o.out.as_mem().as_ptr() as u64, 1))
                .ptr(target.scratch.address)
                .ptr(target.scratch.counters)
                .int(o.vocab)
                .int(o.tokens)
                .int(o.window)
                .int(o.blocked_width)
                .int(row_bytes)
                .int(one_bits as usize)
                .int(usize::from(vectors)),
        });
    }
    Ok(())
}

/// Bytes of scratch.
pub(super) fn sample_scratch(o: &Sample<'_>, _props: &DeviceProps) -> u64 {
    (rows_at_once(o) * row_of(o).1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::lower::{Scratch, lower, scratch_bytes};
    use crate::ops::Op;
    use crate::{DType, Mem, MemMut, Place};

    fn read(at: usize, elements: usize) -> Mem<'static> {
        let pointer = std::ptr::without_provenance(at);
        // SAFETY: lowering reads no memory.
        unsafe { Mem::from_raw(pointer, elements * 4, DType::I32, Place::Device(0)) }
    }

    fn write(at: usize, elements: usize, dtype: DType) -> MemMut<'static> {
        let pointer = std::ptr::without_provenance_mut(at);
        // SAFETY: lowering touches no memory.
        unsafe { MemMut::from_raw(pointer, elements * 4, dtype, Place::Device(0)) }
    }

    fn op(rows: usize, vocab: usize, tokens: usize) -> Op<'static> {
        Op::Sample(Sample {
            logits: write(1 << 30, rows * vocab, DType::F32),
            params: read(2 << 30, rows * SAMPLE_WORDS),
            recent: read(3 << 30, rows * 8),
            blocked: read(4 << 30, rows * 2),
            out: write(5 << 30, rows, DType::I32),
            rows,
            vocab,
            tokens,
            window: 8,
            blocked_width: 2,
        })
    }

    fn launches(op: &Op<'_>) -> Vec<Launch> {
        let mut found = Vec::new();
        for props in DeviceProps::samples() {
            let target = Target {
                props: &props,
                scratch: Scratch {
                    address: 6 << 30,
                    bytes: scratch_bytes(op, &props),
                    counters: 7 << 30,
                },
                deterministic: false,
            };
            let mut list = Vec::new();
            lower(op, &target, &mut list).unwrap();
            for launch in &list {
                assert!(launch.grid[0] > 0 && launch.grid[1] as usize <= COUNTERS);
                // The row's scratch lies in what was asked for.
                let row_bytes = launch.args.words()[11];
                assert!(u64::from(launch.grid[1]) * row_bytes <= target.scratch.bytes);
            }
            found.push(list);
        }
        assert!(found.iter().all(|list| *list == found[0]));
        found.remove(0)
    }

    #[test]
    fn a_block_for_every_chunk_of_a_row() {
        let list = launches(&op(3, 128_256, 128_256));
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].grid, [32, 3, 1]);
        let words = list[0].args.words();
        assert_eq!(words[7..], [128_256, 128_256, 8, 2, 16_896, 44, 1]);
        // Padding of the head costs nothing; odd rows have no vectors.
        let list = launches(&op(1, 5001, 4096));
        assert_eq!((list[0].grid, list[0].args.words()[13]), ([1, 1, 1], 0));
        assert_eq!(launches(&op(0, 100, 100)), []);
    }

    #[test]
    fn weights_of_a_row_fit_in_64_bits() {
        for (vocab, bits) in [(1, 44), (1 << 18, 44), ((1 << 18) + 1, 43), (1 << 22, 40)] {
            let list = launches(&op(1, vocab, vocab));
            assert_eq!(list[0].args.words()[12], bits);
        }
    }

    #[test]
    fn many_rows_share_the_counters() {
        let list = launches(&op(COUNTERS + 5, 64, 64));
        assert_eq!(list.len(), 2);
        assert_eq!(list[1].grid[1], 5);
        let (a, b) = (list[0].args.words(), list[1].args.words());
        let rows = COUNTERS as u64;
        let steps = [rows * 256, rows * 64, rows * 32, rows * 8, rows * 4, 0, 0];
        for (i, step) in steps.iter().enumerate() {
            assert_eq!(b[i] - a[i], *step, "argument {i}");
        }
        assert_eq!(a[7..], b[7..]);
    }
}
