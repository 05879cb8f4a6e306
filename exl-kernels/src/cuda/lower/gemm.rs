//! Products of dense matrices: which kernel, with which tile.
//!
//! Selection looks at shapes and the GPU's properties alone, so a result never depends on where
//! buffers happen to lie or on what ran before. With [`Target::deterministic`] it does not look at
//! the number of rows either, as far as the order of a sum depends on the choice.

mod dense;
mod f16;
mod hessian;
pub(super) mod wgmma;

#[cfg(test)]
mod tests;

pub(super) use dense::{DenseGateUp, DenseLinear, DenseRow, dense_gate_up, dense_linear};
pub(super) use f16::{GemmF16, PrepareX, gemm_f16, prepare_x};
pub(super) use hessian::{hessian_syrk, transposed_product};

use crate::DType;
use crate::cuda::{DeviceProps, Kernel};

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    f16::PREPARE,
    f16::PREPARE_STAGED,
    f16::TILES[0].kernel,
    f16::TILES[1].kernel,
    f16::TILES[2].kernel,
    wgmma::TILES[0].kernel,
    wgmma::TILES[1].kernel,
    dense::DENSE[0],
    dense::DENSE[1],
    dense::DENSE[2],
    dense::NARROW[0],
    dense::NARROW[1],
    dense::NARROW[2],
    dense::GATE_UP[0],
    dense::GATE_UP[1],
    dense::GATE_UP[2],
    hessian::SYRK,
    hessian::TRANSPOSED,
];

/// An output tile of a product.
#[derive(Clone, Copy, Debug)]
struct Tile {
    kernel: Kernel,
    /// Rows and columns of the output.
    size: (usize, usize),
    threads: u32,
    shared_bytes: u32,
    /// Elements a multiprocessor finishes in a given time when it is full, relative to the other
    /// tiles of the table.
    rate: f64,
}

impl Tile {
    fn count(&self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.size.0) * columns.div_ceil(self.size.1)
    }

    fn fits(&self, props: &DeviceProps) -> bool {
        self.shared_bytes <= props.shared_per_block
    }

    /// Time of a product of this shape: whole tiles of the busiest multiprocessor.
    fn time(&self, rows: usize, columns: usize, props: &DeviceProps) -> f64 {
        let waves = self.count(rows, columns).div_ceil(props.sms as usize);
        (waves * self.size.0 * self.size.1) as f64 / self.rate
    }
}

/// The fastest of the tiles, the first of equals.
fn fastest<'t>(
    tiles: impl Iterator<Item = &'t Tile>,
    (rows, columns): (usize, usize),
    props: &DeviceProps,
) -> Option<&'t Tile> {
    tiles.filter(|t| t.fits(props)).min_by(|a, b| {
        let time = |t: &Tile| t.time(rows, columns, props);
        time(a).total_cmp(&time(b))
    })
}

/// Whether 16-byte vectors of `elements` elements cover the rows of matrices at these addresses.
pub(super) fn vectors(addresses: &[u64], lengths: &[usize], elements: usize) -> bool {
    addresses.iter().all(|a| a.is_multiple_of(16))
        && lengths.iter().all(|n| n.is_multiple_of(elements))
}

/// A bias and its type as kernel arguments.
fn bias_words(bias: Option<(u64, DType)>) -> (u64, usize) {
    bias.map_or((0, 0), |(at, dtype)| (at, super::linear::dtype_code(dtype)))
}
