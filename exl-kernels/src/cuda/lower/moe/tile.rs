//! Many rows of an expert: its packed weights meet up to 128 rows at a time on tensor cores
//! (cuda/moe/tile.cu, warpgroup.cu).

use super::sort::Space;
use super::{Format, Layer, pair};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{ScaleKind, TILE_COLUMNS};
use crate::cuda::{DeviceProps, Kernel, Launch};

const fn kernels(exl2: &'static str, gptq: &'static str) -> [Kernel; 2] {
    [Kernel::new("moe/tile", exl2), Kernel::new("moe/tile", gptq)]
}

/// Rows of a segment, and the kernels by kind of scales.
pub(super) const TILES: [(usize, [Kernel; 2]); 3] = [
    (32, kernels("exl_moe_tile32_exl2", "exl_moe_tile32_gptq")),
    (64, kernels("exl_moe_tile64_exl2", "exl_moe_tile64_gptq")),
    (128, kernels("exl_moe_tile128_exl2", "exl_moe_tile128_gptq")),
];
/// The same by warpgroups.
pub(super) const GROUPS: [(usize, [Kernel; 2]); 2] = [
    (
        64,
        [
            Kernel::new("moe/warpgroup", "exl_moe_wgmma64_exl2"),
            Kernel::new("moe/warpgroup", "exl_moe_wgmma64_gptq"),
        ],
    ),
    (
        128,
        [
            Kernel::new("moe/warpgroup", "exl_moe_wgmma128_exl2"),
            Kernel::new("moe/warpgroup", "exl_moe_wgmma128_gptq"),
        ],
    ),
];
/// Gathers rows of x as 16-bit floats in the orders of their experts, for either.
pub(super) const BLOCK_X: [Kernel; 2] = [
    Kernel::new("moe/input", "exl_moe_block_x_f16"),
    Kernel::new("moe/input", "exl_moe_block_x_wgmma"),
];

/// Threads of a block.
const THREADS: usize = 256;
/// As tile.cu: stages, and bytes of one for a row of x.
const STAGES: usize = 3;
const STAGE_ROW: usize = 2 * 64;
/// As warpgroup.cu: stages, of as many bytes for a row, and what their alignment takes.
const GROUP_STAGES: usize = 4;
const GROUP_ALIGN: usize = 1024;
/// Columns of a line of x for warpgroups.
const LINE: usize = 64;
/// Bytes of shared memory for two matrices and what else is said of a segment, its slots excepted.
const OPERANDS: usize = 2 * 208 + 16;
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
    groups: bool,
    /// Column tiles of a thread block, of both matrices.
    columns: usize,
    shared: usize,
    /// Thread blocks of a multiprocessor.
    blocks: usize,
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
        let group = GROUPS.iter().find(|(own, _)| own == rows);
        let group = group.filter(|_| props.has_warpgroup_products());
        let kernels = group.map_or(kernels, |(_, kernels)| kernels);
        let (kernel, most) = match kind {
            ScaleKind::Codes => (kernels[0], 64),
            ScaleKind::Columns => (kernels[1], 32),
        };
        let stages = format.orders * STAGE_ROW * rows;
        let side = OPERANDS + 4 * rows;
        let tile = match group {
            // One of each warp.
            Some(_) => Self {
                rows: *rows,
                kernel,
                groups: true,
                columns: 8,
                shared: GROUP_ALIGN + GROUP_STAGES * stages + side,
                blocks: 128 / rows,
            },
            // Two of each of the eight warps that have the same rows, `most` at a time.
            None => Self {
                rows: *rows,
                kernel,
                groups: false,
                columns: 16 / rows.div_ceil(most),
                shared: STAGES * stages + side,
                blocks: 1,
            },
        };
        let fits =
            tile.shared <= props.shared_per_block as usize && 2 * layer.inputs <= SHARED_EVERYWHERE;
        fits.then_some(tile)
    }

    /// Bytes of a prepared row.
    fn row_bytes(&self, inputs: usize) -> usize {
        match self.groups {
            true => 2 * inputs.next_multiple_of(LINE),
            false => 2 * inputs,
        }
    }

    /// Bytes of the rows of all slots.
    pub(super) fn input_bytes(&self, layer: &Layer<'_>, format: &Format) -> usize {
        format.orders * layer.slots() * self.row_bytes(layer.inputs)
    }

    pub(super) fn lower(
        &self,
        layer: &Layer<'_>,
        format: &Format,
        space: &Space,
        (target, list): (&Target<'_>, &mut Vec<Launch>),
    ) {
        let row_bytes = self.row_bytes(layer.inputs);
        let part_bytes = (layer.slots() * row_bytes) as u64;
        list.push(Launch {
            kernel: BLOCK_X[usize::from(self.groups)],
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
                .long(part_bytes)
                .with_table(format.table.clone()),
        });
        let columns = layer.outputs.div_ceil(TILE_COLUMNS);
        let act = usize::from(layer.act.is_some()) | layer.act.unwrap_or(0) << 16;
        let mut task = vec![0];
        task.extend(space.words());
        task.extend([space.inputs, part_bytes, layer.out]);
        task.push(pair(layer.inputs, layer.outputs));
        task.push(pair(columns, format.orders));
        task.push(pair(row_bytes, act));
        let items = (columns * layer.parts()).div_ceil(self.columns);
        let items = layer.segments(self.rows) * items;
        let grid = items.min(self.blocks * target.props.sms as usize);
        list.push(Launch {
            shared_bytes: self.shared as u32,
            ..format.launch(self.kernel, grid, THREADS, &task)
        });
    }
}
