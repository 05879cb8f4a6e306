//! Products with quantized matrices.
//!
//! Activations are gathered into packed order and quantized per row and group of the matrix;
//! codes meet them in integer dot products, and each group's sum is scaled once and added to a
//! 32-bit float. The steps of one output are the same whatever the number of rows, panels and
//! threads, so a row's result does not depend on its batch.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod input;
mod scalar;

pub(super) use input::{Input, scratch_words, tile_rows};

use super::Isa;
use crate::quant::{PANEL, QuantMatrix};

/// Rows of a register tile.
pub(super) const TILE_ROWS: usize = 6;
/// Columns one task computes: enough panels that a tile of activations is reused from L1.
pub(super) const CHUNK: usize = 4 * PANEL;

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
}
