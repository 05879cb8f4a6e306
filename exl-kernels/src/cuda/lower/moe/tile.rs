//! Many rows of an expert: its packed weights meet up to 128 rows at a time on tensor cores
//! (cuda/moe/tile.cu).

use super::sort::Space;
use super::{Format, Layer, pair};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{ScaleKind, TILE_COLUMNS};
use crate::cuda::{DeviceProps, Kernel, Launch};

/// Rows of a segment, and the kernels by kind of scales.
pub(super) const TILES: [(usize, [Kernel; 2]); 3] = [
    (
        32,
        [
            Kernel::new("moe/tile", "exl_moe_tile32_exl2"),
            Kernel::new("moe/tile", "exl_moe_tile32_gptq"),
        ],
    ),
    (
        64,
        [
            Kernel::new("moe/tile", "exl_moe_tile64_exl2"),
            Kernel::new("moe/tile", "exl_moe_tile64_gptq"),
        ],
    ),
    (
        128,
        [
            Kernel::new("moe/tile", "exl_moe_tile128_exl2"),
            Kernel::new("moe/tile", "exl_moe_tile128_gptq"),
        ],
    ),
];
/// Gathers rows of x as 16-bit floats in the orders of their experts.
pub(super) const BLOCK_X: Kernel = Kernel::new("moe/input", "exl_moe_block_x_f16");

/// As tile.cu: threads of a block, stages, bytes of 32 columns of a row of x, of two matrices, and pairs
/// of column tiles that warps with the same rows have.
const THREADS: usize = 256;
const STAGES: usize = 3;
const STEP: usize = 2;
const X_ROW: usize = 64;
const MATRICES: usize = 2 * 208;
/// Blocks that gather rows: several for each multiprocessor of any GPU.
const GATHER_BLOCKS: usize = 1024;
/// Shared memory that a block has on every GPU from compute capability 8.0.
const SHARED_EVERYWHERE: usize = 99 << 10;

/// How launches divide their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Rows of a segment.
    pub(super) rows: usize,
    kernel: Kernel,
    /// Pairs of column tiles of a thread block.
    pairs: usize,
    shared: usize,
}

impl Tile {
    /// `None` when a row of x does not fit shared memory.
    pub(super) fn new(
        layer: &Layer<'_>,
        format: &Format,
        kind: ScaleKind,
        props: &DeviceProps,
    ) -> Option<Self> {
        // The smallest in which most experts fit, as the rest of a tile is computed in vain.
        let average = layer.average();
        let fits = |(rows, _): &&(usize, _)| 4 * average <= 3 * rows;
        let (rows, kernels) = TILES.iter().find(fits).unwrap_or(&TILES[TILES.len() - 1]);
        let (kernel, most) = match kind {
            ScaleKind::Codes => (kernels[0], 64),
            ScaleKind::Columns => (kernels[1], 32),
        };
        let tile = Self {
            rows: *rows,
            kernel,
            // Of the eight warps those that have the same rows, `most` at a time.
            pairs: 8 / rows.div_ceil(most),
            shared: MATRICES + 4 * rows + STAGES * format.orders * STEP * rows * X_ROW,
        };
        let fits =
            tile.shared <= props.shared_per_block as usize && 2 * layer.inputs <= SHARED_EVERYWHERE;
        fits.then_some(tile)
    }

    pub(super) fn lower(
        &self,
        layer: &Layer<'_>,
        format: &Format,
        space: &Space,
        (target, list): (&Target<'_>, &mut Vec<Launch>),
    ) {
        let part_bytes = 2 * layer.slots() * layer.inputs;
        list.push(Launch {
            kernel: BLOCK_X,
            grid: [layer.slots().min(GATHER_BLOCKS) as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            shared_bytes: 2 * layer.inputs as u32,
            args: Args::new()
                .ptr(0)
                .block(&space.words())
                .ptr(layer.x)
                .ptr(space.inputs)
                .int(layer.parts())
                .int(layer.by)
                .int(layer.inputs)
                .long(part_bytes as u64)
                .with_table(format.table.clone()),
        });
        let columns = layer.outputs.div_ceil(TILE_COLUMNS);
        let pairs = columns.div_ceil(if layer.act.is_some() { 1 } else { 2 });
        let items = layer.segments(self.rows) * pairs.div_ceil(self.pairs);
        let mut task = vec![0];
        task.extend(space.words());
        task.extend([space.inputs, part_bytes as u64, layer.out]);
        task.push(pair(layer.inputs, layer.outputs));
        task.push(pair(columns, format.orders));
        task.push((usize::from(layer.act.is_some()) | layer.act.unwrap_or(0) << 16) as u64);
        let grid = items.min(target.props.sms as usize);
        list.push(Launch {
            shared_bytes: self.shared as u32,
            ..format.launch(self.kernel, grid, THREADS, &task)
        });
    }
}

/// Bytes of the rows of all slots.
pub(super) fn input_bytes(layer: &Layer<'_>, format: &Format) -> usize {
    2 * format.orders * layer.slots() * layer.inputs
}
