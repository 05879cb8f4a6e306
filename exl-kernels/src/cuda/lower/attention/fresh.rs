//! Rotation, append and attention of sequences with one row each by one launch (cuda/attn/fresh.cuh).

use super::rope::ROPE;
use super::tiles::TILES;
use crate::cuda::lower::linear::{Ordered, is_row_product};
use crate::cuda::lower::{Target, apart};
use crate::cuda::{Kernel, Launch};

/// By [`TILES`].
pub(in crate::cuda::lower) const ROTATING: [Kernel; 4] = [
    Kernel::new("attn/decode", "exl_attn_decode_rope_64"),
    Kernel::new("attn/decode", "exl_attn_decode_rope_96"),
    Kernel::new("attn/decode", "exl_attn_decode_rope_128"),
    Kernel::new("attn/decode", "exl_attn_decode_rope_256"),
];

/// The word that holds the factor of the angles, and whether there is a rehearsal (`Rotation` of fresh.cuh).
const FACTOR_WORD: usize = 30;
/// The last words: where the next product has the outputs, nowhere at first (`Leaving` of fresh.cuh).
pub(super) const LEAVING: [u64; 2] = [0; 2];
/// Of attention: its outputs, rows, heads and their length.
const OUT_WORD: usize = 6;
const ROWS_WORD: usize = 9;
const HEADS_WORD: usize = 12;
const DIM_WORD: usize = 14;

/// Lets attention go through its work once before its input is there, where it waits for that on multiprocessors that
/// the product in front leaves free: otherwise there would be nothing to wait for.
pub(in crate::cuda::lower) fn rehearse(launches: &mut [Launch], target: &Target<'_>) {
    for i in 1..launches.len() {
        let [product, attention] = &mut launches[i - 1..=i] else {
            continue;
        };
        let blocks = |launch: &Launch| launch.grid.iter().product::<u32>();
        if ROTATING.contains(&attention.kernel)
            && is_row_product(product.kernel)
            && blocks(product) + blocks(attention) <= target.props.sms
        {
            let factor = attention.args.words()[FACTOR_WORD];
            attention.args.patch(FACTOR_WORD, &[factor | 1 << 32]);
        }
    }
}

/// Lets attention of one row leave its outputs in order as well, if a launch is that and these are its outputs.
pub(in crate::cuda::lower) fn leave(attention: &mut Launch, ordered: &Ordered) -> bool {
    if !ROTATING.contains(&attention.kernel) {
        return false;
    }
    let words = attention.args.words();
    let last = words.len() - LEAVING.len();
    let outputs = words[HEADS_WORD] * words[DIM_WORD];
    let fits = words[ROWS_WORD] == 1 && ordered.of == (words[OUT_WORD], outputs);
    if fits {
        attention.args.patch(last, &[ordered.order, ordered.to]);
    }
    fits
}

/// The launch for rotation with append and the attention behind it, if each sequence has one row. The same bits, but
/// for the rotated queries, which are not left in memory.
pub(in crate::cuda::lower) fn rotating(rope: &Launch, attention: &Launch) -> Option<Launch> {
    let tiles = TILES.iter().position(|t| t.decode == attention.kernel)?;
    if rope.kernel != ROPE[0] {
        return None;
    }
    // The arguments of rope_append() and attention_launch().
    let &[
        q,
        k,
        v,
        positions,
        slots,
        inv_freq,
        k_cache,
        v_cache,
        heads,
        kv_heads,
        dim,
        pairs,
        interleaved,
        factor,
        second,
        third,
    ] = rope.args.words()
    else {
        return None;
    };
    let words = attention.args.words();
    let rows = u64::from(rope.grid[0]);
    let shape = [rows, rows, words[11], heads, kv_heads, dim];
    let same = words[..3] == [q, k_cache, v_cache] && words[ROWS_WORD..=DIM_WORD] == shape;
    // The keys in front of the rows are there before the launch before this one.
    let stored = words[20] == 1;
    // Four values at a time.
    let whole = pairs.is_multiple_of(if interleaved == 1 { 2 } else { 4 });
    let aligned = [k, v].iter().all(|at| at.is_multiple_of(16));
    // Some blocks write what attention computes while others still read k and v.
    let (out, inner) = ((words[OUT_WORD], rows * heads * dim), rows * kv_heads * dim);
    let apart = [k, v].iter().all(|&at| apart(out, (at, inner)));
    if !(same && stored && whole && aligned && apart) {
        return None;
    }
    let rotation = [
        k,
        v,
        positions,
        slots,
        inv_freq,
        k_cache,
        v_cache,
        pairs | interleaved << 32,
        second | third << 32,
        factor,
        LEAVING[0],
        LEAVING[1],
    ];
    Some(Launch {
        kernel: ROTATING[tiles],
        args: attention.args.clone().block(&rotation),
        ..*attention
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{BASE, LLAMA3, read, sample, write};
    use super::*;
    use crate::cuda::lower::{Scratch, Target, link, lower};
    use crate::ops::{Op, PAGE_TOKENS, PagedAttn, RopeAppend, RopeStyle};
    use crate::{DType, KvFormat, KvType};

    /// A step of a layer with grouped heads of 128 values: rotation with append, then attention.
    #[derive(Clone, Copy)]
    struct Step {
        rows: usize,
        seqs: usize,
        pairs: usize,
        style: RopeStyle,
        /// Where keys lie in the arena, and where attention's output.
        k: usize,
        out: usize,
        cache: KvFormat,
        /// Of attention.
        other_cache: bool,
    }

    const ONE_ROW: Step = Step {
        rows: 1,
        seqs: 1,
        pairs: 64,
        style: RopeStyle::Neox,
        k: BASE + 0x10_0000,
        out: BASE + 0x30_0000,
        cache: KvFormat::F16,
        other_cache: false,
    };

    impl Step {
        /// What becomes of it.
        fn launches(self) -> Vec<Launch> {
            let (heads, kv_heads, dim) = LLAMA3;
            let (width, inner, pages) = (heads * dim, kv_heads * dim, 4);
            let kv = KvType {
                k: self.cache,
                v: self.cache,
            };
            let dtype = match self.cache {
                KvFormat::F32 => DType::F32,
                _ => DType::F16,
            };
            let cells = pages * PAGE_TOKENS * inner;
            let caches = [BASE + 0x100_0000, BASE + 0x200_0000];
            let rows = self.rows;
            let rope = Op::RopeAppend(RopeAppend {
                q: write(BASE, rows * width, DType::F32),
                k: read(self.k, rows * inner, DType::F32),
                v: read(BASE + 0x20_0000, rows * inner, DType::F32),
                positions: read(0x100, rows, DType::I32),
                slots: read(0x200, rows, DType::I32),
                inv_freq: read(0x300, self.pairs, DType::F32),
                k_centers: read(0x400, 0, DType::F16),
                k_cache: write(caches[0], cells, dtype),
                v_cache: write(caches[1], cells, dtype),
                kv,
                rows,
                heads,
                kv_heads,
                head_dim: dim,
                style: self.style,
                attention_factor: 1.0,
                sections: None,
            });
            let attention = Op::PagedAttn(PagedAttn {
                q: read(BASE, rows * width, DType::F32),
                k_cache: read(caches[usize::from(self.other_cache)], cells, dtype),
                v_cache: read(caches[1], cells, dtype),
                kv,
                block_table: read(0x500, self.seqs * pages, DType::I32),
                q_start: read(0x600, self.seqs + 1, DType::I32),
                kv_len: read(0x700, self.seqs, DType::I32),
                out: write(self.out, rows * width, DType::F32),
                rows,
                seqs: self.seqs,
                pages_per_seq: pages,
                heads,
                kv_heads,
                head_dim: dim,
                scale: 0.1,
                softcap: 0.0,
                window: 0,
            });
            let props = sample("H200");
            let target = Target {
                props: &props,
                scratch: Scratch::default(),
                deterministic: false,
            };
            let mut list = Vec::new();
            for op in [&rope, &attention] {
                lower(op, &target, &mut list).unwrap();
            }
            link(&mut list, &target);
            list
        }
    }

    #[test]
    fn attention_of_single_rows_rotates_and_appends() {
        for (rows, seqs) in [(1, 1), (8, 8)] {
            let list = Step {
                rows,
                seqs,
                ..ONE_ROW
            };
            let list = list.launches();
            assert_eq!(list.len(), 1);
            assert_eq!(list[0].kernel.entry, "exl_attn_decode_rope_128");
            let words = &list[0].args.words()[21..];
            let caches = [BASE as u64 + 0x100_0000, BASE as u64 + 0x200_0000];
            assert_eq!(words[..2], [ONE_ROW.k as u64, BASE as u64 + 0x20_0000]);
            assert_eq!(words[2..5], [0x100, 0x200, 0x300]);
            assert_eq!((words[5..7].to_vec(), words[7]), (caches.to_vec(), 64));
            assert_eq!(words[9], u64::from(1f32.to_bits()));
        }
        let gptj = RopeStyle::GptJ;
        let pairs = [(gptj, 30), (RopeStyle::Neox, 0)];
        for (style, pairs) in pairs {
            let step = Step {
                style,
                pairs,
                ..ONE_ROW
            };
            assert_eq!(step.launches().len(), 1, "{style:?} {pairs}");
        }
    }

    /// Attention of one sequence behind the product of its queries, keys and values, which has so many column tiles.
    #[test]
    fn attention_that_has_to_wait_rehearses() {
        let props = sample("H200");
        let target = Target {
            props: &props,
            scratch: Scratch::default(),
            deterministic: false,
        };
        let attention = ONE_ROW.launches().remove(0);
        let rehearses = |blocks: u32, entry: &'static str| {
            let product = Launch {
                kernel: Kernel::new("qgemm/row", entry),
                grid: [blocks, 1, 1],
                ..attention.clone()
            };
            let mut list = [product, attention.clone()];
            rehearse(&mut list, &target);
            list[1].args.words()[FACTOR_WORD] >> 32 == 1
        };
        let own = attention.grid.iter().product::<u32>();
        assert!(rehearses(props.sms - own, "exl_qgemm_row1_exl2"));
        assert!(!rehearses(props.sms - own + 1, "exl_qgemm_row1_exl2"));
        assert!(!rehearses(1, "exl_qgemm_rows4_exl2"));
        assert_eq!(
            attention.args.words()[FACTOR_WORD],
            u64::from(1f32.to_bits())
        );
    }

    #[test]
    fn one_row_is_left_in_order_as_well() {
        let attention = ONE_ROW.launches().remove(0);
        let (heads, _, dim) = LLAMA3;
        let of = (ONE_ROW.out as u64, (heads * dim) as u64);
        let (order, to) = (0x800, 0x900);
        let ordered = Ordered { of, order, to };
        let left = |launch: &Launch, ordered: &Ordered| {
            let mut launch = launch.clone();
            let fits = leave(&mut launch, ordered);
            assert_eq!(fits, launch.args.words()[FACTOR_WORD + 1..] == [order, to]);
            fits
        };
        assert!(left(&attention, &ordered));
        let others = [(of.0 + 4, of.1), (of.0, of.1 - 32)];
        for of in others {
            assert!(!left(&attention, &Ordered { of, ..ordered }));
        }
        let (rows, seqs) = (2, 2);
        let two = Step {
            rows,
            seqs,
            ..ONE_ROW
        };
        assert!(!left(&two.launches()[0], &ordered));
    }

    #[test]
    fn others_have_a_launch_for_each() {
        let end = ONE_ROW.k + 4 * 8 * 128;
        let others = [
            // A row sees keys of others of the step.
            Step { rows: 2, ..ONE_ROW },
            // Not four pairs at a time.
            Step {
                pairs: 30,
                ..ONE_ROW
            },
            // Blocks would overwrite what others have not read.
            Step {
                out: end - 16,
                ..ONE_ROW
            },
            Step {
                out: ONE_ROW.k - 16,
                ..ONE_ROW
            },
            Step {
                k: ONE_ROW.k + 4,
                ..ONE_ROW
            },
            Step {
                cache: KvFormat::F32,
                ..ONE_ROW
            },
            Step {
                other_cache: true,
                ..ONE_ROW
            },
        ];
        for step in others {
            assert_eq!(step.launches().len(), 2);
        }
        let behind = Step {
            out: end,
            ..ONE_ROW
        };
        assert_eq!(behind.launches().len(), 1);
    }
}
