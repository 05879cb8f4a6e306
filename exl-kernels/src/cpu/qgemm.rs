//! Products with quantized matrices.
//!
//! Activations are gathered into packed order and quantized per row and group of the matrix;
//! codes meet them in integer dot products, and each group's sum is converted and scaled once and
//! added to a 32-bit float. A group's sum is exact whatever the kernel, and the steps after it are
//! the same everywhere: neither the number of rows, panels and threads nor the instruction set
//! changes a result.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod input;
mod scalar;

pub(super) use input::{Blank, Input, Rows, scratch_words, tile_rows};

use super::{Activations, Isa};
use crate::quant::{PANEL, QuantMatrix};

/// Rows of a register tile.
pub(super) const TILE_ROWS: usize = 6;
/// Columns one task computes: enough panels that a tile of activations is reused from L1.
pub(super) const CHUNK: usize = 4 * PANEL;
/// Rows up to which AVX-512 feeds codes straight from memory into byte dot products, tile by tile:
/// a panel that one tile has read is in L1 or L2 for the next.
const STREAM_ROWS: usize = 18;

/// How four packed rows ("quad") of quantized activations lie in 32-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// 8-bit activations: one word of four bytes.
    Bytes,
    /// 16-bit activations as `256 hi + lo`: a word of four high bytes, a word of four low bytes.
    SplitBytes,
    /// 16 bits each: a word of rows 0 and 2, a word of rows 1 and 3.
    Pairs,
}

impl Layout {
    /// The layout that the kernel for these settings reads.
    fn new(isa: Isa, activations: Activations, rows: usize) -> Self {
        match (isa, activations) {
            (Isa::Avx512, Activations::Fast8) => Layout::Bytes,
            (Isa::Avx512, Activations::Exact16) if rows <= STREAM_ROWS => Layout::SplitBytes,
            _ => Layout::Pairs,
        }
    }

    /// Words of a quad of one row.
    fn words(self) -> usize {
        match self {
            Layout::Bytes => 1,
            Layout::SplitBytes | Layout::Pairs => 2,
        }
    }
}

/// Adds `x W` for the columns of some panels to a scratch accumulator.
pub(super) struct Product<'a> {
    pub(super) matrix: &'a QuantMatrix,
    pub(super) input: &'a Input<'a>,
    pub(super) isa: Isa,
}

impl Product<'_> {
    /// Rows of a tile of the input, the last one excepted.
    pub(super) fn tile_size(&self) -> usize {
        self.input.tile_size()
    }

    /// Computes the rows of some tiles of the columns of panels `first..first + count`
    /// into `acc` (`[rows of the tiles, CHUNK]`, overwritten).
    pub(super) fn run(
        &self,
        (first, count): (usize, usize),
        tiles: std::ops::Range<usize>,
        acc: &mut [f32],
    ) {
        let rows = self.input.rows_of(&tiles);
        acc[..rows * CHUNK].fill(0.0);
        match self.isa {
            Isa::Scalar => scalar::run(self, (first, count), tiles, acc),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa` values other than `Scalar` are only made after detection.
            Isa::Avx2 => unsafe { avx2::run(self, (first, count), tiles, acc) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { avx512::run(self, (first, count), tiles, acc) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => scalar::run(self, (first, count), tiles, acc),
        }
    }

    /// Position of a tile's first row among the rows of the tiles from `first` on.
    #[inline]
    fn row_in(&self, tile: usize, first: usize) -> usize {
        self.input.first_row(tile) - self.input.first_row(first)
    }
}
