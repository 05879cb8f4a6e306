//! How kernels are told of a quantized matrix: its runs of one width, and the shares of its rows.

use super::shape::column_bytes;
use super::{MAX_RUNS, SHARES, ScaleKind};

/// Blocks whose input has one scale.
const CHUNK: usize = 4;

/// `Run` of cuda/qgemm/tile.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Run {
    first: u16,
    end: u16,
    piece: u16,
    bits: u8,
    shift: u8,
    offset: u32,
    fold: u8,
    own_fold: u8,
    chunk: u16,
}

impl Run {
    /// Blocks whose integer sums are added up before they become floats: they share a scale and a chunk
    /// of x, and their sums fit 32 bits (cuda/qgemm/walk.cuh: fold_blocks).
    fn find_fold(&mut self) {
        let most = if self.bits > 4 { 2 } else { 4 };
        self.own_fold = match self.shift {
            IRREGULAR => 1,
            shift => most.min(1u8 << shift.min(2)),
        };
        self.fold = match self.first.is_multiple_of(u16::from(self.own_fold)) {
            true => self.own_fold,
            false => 1,
        };
    }
}

/// Instead of a shift: pieces of a run differ in length.
const IRREGULAR: u8 = 255;

/// The struct that kernels read: `QMatrix` of cuda/qgemm/tile.cuh, field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) tiles: u64,
    pub(super) codes: u64,
    pub(super) bases: u64,
    pub(super) piece_of: u64,
    pub(super) perm: u64,
    pub(super) column_bytes: u64,
    pub(super) blocks: u32,
    pub(super) pieces: u32,
    pub(super) columns: u32,
    pub(super) kind: u32,
    pub(super) runs: u32,
    pub(super) padding: u32,
    /// `SHARES` + 1 bounds; the rest fills the struct.
    pub(super) shares: [u16; 20],
    /// At a multiple of 16 bytes, as kernels load them whole.
    pub(super) run: [Run; MAX_RUNS],
}

impl Descriptor {
    /// Of a matrix with so many column tiles and pieces of these blocks and bits, not placed yet.
    pub(super) fn new(kind: ScaleKind, columns: usize, pieces: &[(usize, u8)]) -> Self {
        let mut new = Self {
            tiles: 0,
            codes: 0,
            bases: 0,
            piece_of: 0,
            perm: 0,
            column_bytes: column_bytes(pieces) as u64,
            blocks: pieces.iter().map(|p| p.0).sum::<usize>() as u32,
            pieces: pieces.len() as u32,
            columns: columns as u32,
            kind: kind as u32,
            runs: 0,
            padding: 0,
            run: [Run::default(); MAX_RUNS],
            shares: [0; 20],
        };
        new.find_runs(pieces);
        new.divide();
        new
    }

    /// Finds the runs of one width in pieces of these blocks and bits.
    fn find_runs(&mut self, pieces: &[(usize, u8)]) {
        let runs = pieces.chunk_by(|a, b| a.1 == b.1);
        let (mut first, mut piece, mut offset, mut chunk) = (0, 0, 0, 0);
        for (run, to) in runs.zip(&mut self.run) {
            let blocks = run.iter().map(|p| p.0).sum::<usize>();
            *to = Run {
                first: first as u16,
                end: (first + blocks) as u16,
                piece: piece as u16,
                bits: run[0].1,
                shift: shift_of(run),
                offset: offset as u32,
                fold: 0,
                own_fold: 0,
                chunk: chunk as u16,
            };
            to.find_fold();
            first += blocks;
            piece += run.len();
            chunk += blocks.div_ceil(CHUNK);
            offset += 128 * blocks * usize::from(run[0].1);
            self.runs += 1;
        }
    }

    /// The runs: blocks and bits.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let runs = self.run[..self.runs as usize].iter();
        runs.map(|r| (usize::from(r.end - r.first), usize::from(r.bits)))
    }

    /// The chunks of the runs, each with chunks of its own: blocks and bits.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.runs().flat_map(|(n, bits)| {
            let firsts = (0..n).step_by(CHUNK);
            firsts.map(move |at| (CHUNK.min(n - at), bits))
        })
    }

    /// Cuts the blocks into shares of whole chunks of the runs, so that the largest has the fewest bytes.
    fn divide(&mut self) {
        let costs: Vec<usize> = self.chunks().map(|(n, bits)| n * bits).collect();
        let (mut most, mut enough) = (0usize, costs.iter().sum());
        while most + 1 < enough {
            let middle = most.midpoint(enough);
            match shares_of(&costs, middle) {
                Some(_) => enough = middle,
                None => most = middle,
            }
        }
        let ends = shares_of(&costs, enough).unwrap_or_default();
        let firsts = self.chunks().scan(0, |at, (n, _)| {
            *at += n as u16;
            Some(*at)
        });
        let firsts: Vec<u16> = std::iter::once(0).chain(firsts).collect();
        for (to, end) in self.shares[1..].iter_mut().zip(ends) {
            *to = firsts[end];
        }
    }
}

/// Log2 of the blocks of each piece of a run, the last perhaps shorter.
fn shift_of(run: &[(usize, u8)]) -> u8 {
    let most = run[0].0;
    let (last, others) = run.split_last().expect("runs are not empty");
    let even = others.iter().all(|p| p.0 == most) && last.0 <= most;
    match even && most.is_power_of_two() {
        true => most.trailing_zeros() as u8,
        // One piece of any length is regular.
        false if others.is_empty() => most.next_power_of_two().trailing_zeros() as u8,
        false => IRREGULAR,
    }
}

/// Ends of [`SHARES`] consecutive shares of at most `most` each, if there are such.
fn shares_of(costs: &[usize], most: usize) -> Option<[usize; SHARES]> {
    let mut ends = [costs.len(); SHARES];
    let mut at = 0;
    for end in &mut ends {
        let mut sum = 0;
        while at < costs.len() && sum + costs[at] <= most {
            sum += costs[at];
            at += 1;
        }
        *end = at;
    }
    (at == costs.len()).then_some(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDTHS: [u8; 6] = [8, 6, 5, 4, 3, 2];

    fn descriptor(pieces: &[(usize, u8)]) -> Descriptor {
        let mut d: Descriptor = bytemuck::Zeroable::zeroed();
        d.blocks = pieces.iter().map(|p| p.0 as u32).sum();
        d.find_runs(pieces);
        d
    }

    proptest! {
        #[test]
        fn shares_cover_every_block_and_none_is_much_larger(
            lengths in proptest::collection::vec(1usize..80, 1..=6),
        ) {
            let runs: Vec<_> = lengths.iter().copied().zip(WIDTHS).collect();
            let mut d = descriptor(&runs);
            d.divide();
            let bounds = d.shares[..=SHARES].iter().map(|&b| usize::from(b));
            let bounds: Vec<usize> = bounds.collect();
            let bits = runs.iter().flat_map(|&(n, width)| vec![usize::from(width); n]);
            let bits: Vec<usize> = bits.collect();
            prop_assert!(bounds.is_sorted() && bounds[0] == 0);
            prop_assert_eq!(bounds[SHARES], bits.len());
            let mut firsts = vec![0];
            for (n, _) in d.chunks() {
                firsts.push(firsts[firsts.len() - 1] + n);
            }
            prop_assert!(bounds.iter().all(|b| firsts.contains(b)));
            let chunks = d.run[..d.runs as usize].iter().map(|r| firsts[usize::from(r.chunk)]);
            prop_assert!(chunks.eq(d.run[..d.runs as usize].iter().map(|r| usize::from(r.first))));
            let all: usize = bits.iter().sum();
            for share in bounds.windows(2) {
                let cost: usize = bits[share[0]..share[1]].iter().sum();
                // A fair part, and at most one chunk of 8 bits more.
                prop_assert!(cost <= all.div_ceil(SHARES) + 8 * CHUNK);
            }
        }

        #[test]
        fn regular_runs_tell_the_piece_of_a_block(
            groups in proptest::collection::vec((1usize..9, 0usize..6), 1..40),
        ) {
            let mut pieces: Vec<_> = groups.iter().map(|&(n, w)| (n, WIDTHS[w])).collect();
            pieces.sort_by_key(|p| std::cmp::Reverse(p.1));
            let d = descriptor(&pieces);
            let piece_of = pieces.iter().enumerate().flat_map(|(i, p)| vec![i; p.0]);
            let mut run = 0;
            let mut first = 0;
            for (block, piece) in piece_of.enumerate() {
                if block == usize::from(d.run[run].end) {
                    first = block;
                    run += 1;
                }
                let r = d.run[run];
                if r.shift != IRREGULAR {
                    prop_assert_eq!(usize::from(r.piece) + ((block - first) >> r.shift), piece);
                }
            }
            prop_assert_eq!(d.runs as usize, run + 1);
        }
    }

    #[test]
    fn kernels_load_runs_whole() {
        assert_eq!(size_of::<Run>(), 16);
        assert!(std::mem::offset_of!(Descriptor, run).is_multiple_of(16));
        assert!(size_of::<Descriptor>().is_multiple_of(16));
    }

    #[test]
    fn only_odd_groups_are_irregular() {
        let shifts = |pieces: &[(usize, u8)]| -> Vec<u8> {
            let d = descriptor(pieces);
            d.run[..d.runs as usize].iter().map(|r| r.shift).collect()
        };
        let four = [(4, 8), (4, 8), (2, 5), (2, 5), (1, 5), (1, 4)];
        assert_eq!(shifts(&four), [2, 1, 0]);
        assert_eq!(shifts(&[(3, 8)]), [2]);
        assert_eq!(shifts(&[(3, 8), (3, 8), (4, 4), (5, 4)]), [IRREGULAR; 2]);
    }
}
