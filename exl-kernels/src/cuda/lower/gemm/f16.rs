//! 16-bit operands: prompts on dequantized weights.

use super::{Tile, bias_words, fastest, vectors};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::lower::linear::activation_code;
use crate::cuda::{Kernel, Launch};
use crate::ops::Activation;
use crate::{DType, Error, Result};

pub(super) const PREPARE: Kernel = Kernel::new("gemm/prepare", "exl_prepare_x");
pub(super) const PREPARE_STAGED: Kernel = Kernel::new("gemm/prepare", "exl_prepare_x_staged");

/// Shared memory that a block has on every GPU from compute capability 8.0.
const SHARED_EVERYWHERE: usize = 99 << 10;
const PREPARE_THREADS: usize = 256;
/// Blocks of a row-wise kernel: several for each multiprocessor of any GPU.
const PREPARE_BLOCKS: usize = 1024;

/// Tiles of mma.sync, as cuda/gemm/f16.cu instantiates them. Their sums have one order.
pub(super) const TILES: [Tile; 3] = [
    Tile {
        kernel: Kernel::new("gemm/f16", "exl_gemm_f16_128x256"),
        size: (128, 256),
        threads: 256,
        shared_bytes: 4 * (128 + 256) * 32 * 2,
        rate: 1.0,
    },
    Tile {
        kernel: Kernel::new("gemm/f16", "exl_gemm_f16_128x128"),
        size: (128, 128),
        threads: 128,
        shared_bytes: 3 * (128 + 128) * 32 * 2,
        rate: 0.9,
    },
    Tile {
        kernel: Kernel::new("gemm/f16", "exl_gemm_f16_64x64"),
        size: (64, 64),
        threads: 128,
        shared_bytes: 3 * (64 + 64) * 64 * 2,
        rate: 0.6,
    },
];

/// Activations as the first operand of [`gemm_f16`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrepareX {
    /// F32 `[rows, k]`.
    pub(crate) x: u64,
    /// U32 `[k]`: source column of each column; 0 for the same order.
    pub(crate) perm: u64,
    /// F16 `[rows, k]`, aligned to 16 bytes.
    pub(crate) out: u64,
    /// Rows.
    pub(crate) rows: usize,
    /// Columns, a multiple of 8.
    pub(crate) k: usize,
    /// In blocks of zero-padded rows and columns (cuda/gemm/blocked.cuh) instead of row by row.
    pub(crate) blocked: bool,
}

/// Gathers columns and rounds to 16 bits.
pub(crate) fn prepare_x(list: &mut Vec<Launch>, p: &PrepareX) {
    if p.rows == 0 || p.k == 0 {
        return;
    }
    let staged = p.perm != 0 && 2 * p.k <= SHARED_EVERYWHERE;
    let (kernel, grid, shared) = if staged {
        let grid = [p.rows.min(PREPARE_BLOCKS) as u32, 1, 1];
        (PREPARE_STAGED, grid, 2 * p.k)
    } else {
        let across = p.k.div_ceil(8 * PREPARE_THREADS);
        let down = p.rows.min(PREPARE_BLOCKS.div_ceil(across));
        (PREPARE, [across as u32, down as u32, 1], 0)
    };
    list.push(Launch {
        kernel,
        grid,
        block: [PREPARE_THREADS as u32, 1, 1],
        shared_bytes: shared as u32,
        args: Args::new()
            .ptr(p.x)
            .ptr(p.perm)
            .ptr(p.out)
            .int(p.rows)
            .int(p.k)
            .int(usize::from(vectors(&[p.x], &[p.k], 4)))
            .int(if p.blocked {
                super::wgmma::blocks(p.k)
            } else {
                0
            }),
    });
}

/// `out = a b^T + bias + residual`, or `act(gate) * (a b^T + bias)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GemmF16 {
    /// F16 `[rows, k]`, aligned to 16 bytes.
    pub(crate) a: u64,
    /// F16 `[n, k]`, aligned to 16 bytes.
    pub(crate) b: u64,
    /// F32 `[rows, ld_out]`.
    pub(crate) out: u64,
    /// `[n_out]`.
    pub(crate) bias: Option<(u64, DType)>,
    /// F32 `[rows, ld_out]`, may be `out`.
    pub(crate) residual: Option<u64>,
    /// F32 `[rows, ld_out]`, may be `out`, and what is applied to it. Excludes `residual`.
    pub(crate) gate: Option<(u64, Activation)>,
    /// Rows of a.
    pub(crate) rows: usize,
    /// Rows of b.
    pub(crate) n: usize,
    /// Columns of the output that are written; those beyond are padding of the weights.
    pub(crate) n_out: usize,
    /// Floats from one row of the output to the next.
    pub(crate) ld_out: usize,
    /// Columns of a and b, a multiple of 32.
    pub(crate) k: usize,
}

/// Appends the product.
///
/// # Errors
/// [`Error::Unsupported`] when k is not a multiple of 32, an operand is not aligned to 16 bytes,
/// or sizes exceed 31 bits.
pub(crate) fn gemm_f16(list: &mut Vec<Launch>, target: &Target<'_>, g: &GemmF16) -> Result<()> {
    let unsupported = |what: String| {
        Err(Error::Unsupported {
            op: "gemm_f16",
            what,
        })
    };
    if !g.k.is_multiple_of(32) || g.k == 0 || !vectors(&[g.a, g.b], &[], 1) {
        return unsupported(format!(
            "k = {} with operands at {:#x}, {:#x}",
            g.k, g.a, g.b
        ));
    }
    if g.n_out > g.n || g.n_out > g.ld_out || (g.gate.is_some() && g.residual.is_some()) {
        return unsupported(format!(
            "{} of {} columns, {} apart",
            g.n_out, g.n, g.ld_out
        ));
    }
    if g.rows == 0 || g.n_out == 0 {
        return Ok(());
    }
    let Some(tile) = select(g.rows, g.n_out, target) else {
        return unsupported(format!(
            "{} bytes of shared memory",
            target.props.shared_per_block
        ));
    };
    let (bias, bias_type) = bias_words(g.bias);
    let (gate, act) = g
        .gate
        .map_or((0, 0), |(at, act)| (at, activation_code(act)));
    let residual = g.residual.unwrap_or(0);
    let aligned = vectors(&[g.out, gate, residual], &[g.n_out, g.ld_out], 4);
    list.push(Launch {
        kernel: tile.kernel,
        grid: [tile.count(g.rows, g.n_out) as u32, 1, 1],
        block: [tile.threads, 1, 1],
        shared_bytes: tile.shared_bytes,
        args: Args::new()
            .ptr(g.a)
            .ptr(g.b)
            .ptr(g.out)
            .ptr(bias)
            .ptr(residual)
            .ptr(gate)
            .int(g.rows)
            .int(g.n_out)
            .int(g.ld_out)
            .int(g.k)
            .int(bias_type)
            .int(act)
            .int(usize::from(aligned)),
    });
    Ok(())
}

fn select(rows: usize, n: usize, target: &Target<'_>) -> Option<&'static Tile> {
    static ALL: [Tile; 3] = TILES;
    fastest(ALL.iter(), (rows, n), target.props)
}
