//! How a product of few rows is divided among launches, thread blocks and shared memory.

use super::super::MAX_PARTS;
use super::{BLOCK_X, BLOCK_X_F16, CLUSTER_KERNELS, KERNELS, LONG_ROW_KERNELS, ordered_bytes};
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, SHARES, ScaleKind};
use crate::cuda::{DeviceProps, Kernel};

/// Most rows of each variant.
pub(super) const VARIANTS: [usize; 5] = [1, 4, 8, 16, 32];
/// Beyond it, expanding the weights once is cheaper than passes over them.
const MOST_ROWS: usize = 64;
/// Major compute capabilities that cluster.cu is compiled for.
pub(in crate::cuda) const CLUSTER_ARCHITECTURES: [u32; 2] = [9, 10];
/// Columns of x with one scale, and of a block.
pub(in crate::cuda::lower) const X_CHUNK: usize = 128;
const X_BLOCK: usize = 32;
/// Bytes of a row of x in a block.
const X_ROW: usize = 2 * X_BLOCK;
/// Bytes of a chunk of x that is rounded in place (input.cuh: ROW_CHUNK).
const ROW_CHUNK: usize = 4 * X_CHUNK;
/// Bytes of zeros beside one row of x (row.cuh: ZEROS).
const ZEROS: usize = 16 * X_ROW;
/// Bytes of the task beside one row of x (row.cuh: ROW_TASK_BYTES).
const TASK_BYTES: usize = 1024;
/// Bytes of the rings of weights of a thread block with one row of x on large GPUs (common/ring.cuh).
const LARGE_RINGS: usize = SHARES * 2 * 4096;
/// About as many: what is left is asked for as soon as the input is there.
const ABOUT_RINGS: usize = LARGE_RINGS + LARGE_RINGS / 16;
/// Blocks of x in a slot of a warp's ring (walk.cuh).
const X_UNIT: usize = 2;
const ALIGN: usize = 256;
/// Thread blocks of a cluster; warps, and bytes of a warp's ring in each of them (cluster.cu,
/// half_walk.cuh).
pub(in crate::cuda) const CLUSTER: usize = 8;
const CLUSTER_WARPS: usize = 16;
const CLUSTER_RING: usize = 4352;
/// Rows for which 16-bit floats are faster than exact sums.
const CLUSTER_ROWS: std::ops::RangeInclusive<usize> = 9..=32;

/// The orders in which parts want their input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Orders {
    /// By part.
    pub(super) of: [usize; MAX_PARTS],
    pub(super) count: usize,
}

impl Orders {
    fn new(matrices: &[&CudaMatrix]) -> Self {
        let mut orders = Self::default();
        for (i, m) in matrices.iter().enumerate() {
            let same = matrices[..i].iter().position(|n| n.perm() == m.perm());
            orders.of[i] = same.map_or(orders.count, |j| orders.of[j]);
            orders.count += usize::from(same.is_none());
        }
        orders
    }

    /// The first part of each.
    pub(super) fn firsts(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.count).filter_map(|o| self.of.iter().position(|&p| p == o))
    }
}

/// How x comes to shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda::lower) enum From {
    /// One row, gathered and rounded by every thread block.
    Row,
    /// The same for a row so long that rings of weights have to be small.
    LongRow,
    /// Gathered and rounded by a launch before; all of it is copied.
    Blocks,
    /// The same, through a ring for each warp because it does not fit as a whole.
    Rings,
    /// Gathered as 16-bit floats by a launch before; each block of a cluster copies its part.
    Clusters,
}

impl From {
    /// Whether thread blocks gather one row themselves.
    pub(in crate::cuda::lower) fn is_row(self) -> bool {
        matches!(self, Self::Row | Self::LongRow)
    }
}

/// How launches divide their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Config {
    /// Rows of each launch but the last.
    pub(super) rows: usize,
    /// Thread blocks of the grid.
    pub(super) grid: usize,
    /// Bytes of shared memory.
    pub(super) shared: usize,
    /// Column tiles; for gate and up pairs of them.
    pub(super) tiles: usize,
    /// Tiles of a thread block whose sums are held at a time.
    pub(super) slots: usize,
    pub(super) from: From,
    /// Blocks of x that a thread block of a cluster has; 0 without clusters.
    pub(super) x_blocks: usize,
    pub(super) gated: bool,
    pub(super) orders: Orders,
}

impl Config {
    /// For up to three matrices with one input; `gated`: for gate and up. `None` when there are more
    /// rows, or shared memory is too small.
    pub(in super::super) fn new(
        matrices: &[&CudaMatrix],
        rows: usize,
        gated: bool,
        target: &Target<'_>,
    ) -> Option<Self> {
        if rows > MOST_ROWS && !target.deterministic {
            return None;
        }
        let columns = matrices.iter().map(|m| m.columns());
        let tiles = if gated { columns.max()? } else { columns.sum() };
        // As few passes as shared memory allows.
        let least = rows.div_ceil(VARIANTS[VARIANTS.len() - 1]);
        let passes = |n: usize| rows.div_ceil(n);
        let work = (tiles, gated);
        // The results of other numbers of rows are exact: these are not the same to the bit.
        let clusters = |rows| Self::clusters(matrices, rows, work, target.props);
        let found = (least..=rows)
            .map(passes)
            .take_while(|rows| CLUSTER_ROWS.contains(rows) && !target.deterministic)
            .find_map(clusters);
        let exact = |rows| Self::pass(matrices, rows, work, target);
        found.or_else(|| (least..=rows).map(passes).find_map(exact))
    }

    /// By clusters, where there are any and shared memory is large enough.
    fn clusters(
        matrices: &[&CudaMatrix],
        rows: usize,
        (tiles, gated): (usize, bool),
        props: &DeviceProps,
    ) -> Option<Self> {
        let each = if gated { 2 } else { 1 };
        let clusters = (props.clusters as usize).min(tiles);
        let orders = Orders::new(matrices);
        let x_blocks = slice_blocks(matrices);
        let x = orders.count * x_blocks * rows * X_ROW;
        let used = CLUSTER_WARPS * CLUSTER_RING + x;
        let slot = rows * 128 * each;
        let most = (props.shared_per_block as usize).checked_sub(used)? / slot;
        if clusters == 0 || most < CLUSTER {
            return None;
        }
        // All at once, or turns in which every warp has as many column tiles.
        let (mine, busy) = (tiles.div_ceil(clusters), CLUSTER_WARPS / each);
        let turns = if most > busy {
            most / busy * busy
        } else {
            most
        };
        let slots = if mine > most { turns } else { mine };
        Some(Self {
            rows,
            grid: clusters * CLUSTER,
            shared: used + slots * slot,
            tiles,
            slots: each * slots,
            from: From::Clusters,
            x_blocks,
            gated,
            orders,
        })
    }

    fn pass(
        matrices: &[&CudaMatrix],
        rows: usize,
        (tiles, gated): (usize, bool),
        target: &Target<'_>,
    ) -> Option<Self> {
        let props = target.props;
        let inputs = matrices.first()?.inputs();
        let orders = Orders::new(matrices);
        // The sums of one row have another order.
        let alone = rows == 1 && !target.deterministic;
        let grid = tiles.min(props.sms as usize);
        // Where about all weights of a thread block are under way before its input is there, more blocks than the
        // longest ones need would only keep the next launch from multiprocessors.
        let most = tiles.div_ceil(grid);
        let tile = matrices.iter().map(|m| m.column_bytes()).max()?;
        let grid = match alone && is_large(props) && !gated && most * tile <= ABOUT_RINGS {
            true => tiles.div_ceil(most),
            false => grid,
        };
        let mine = tiles.div_ceil(grid);
        let free = |used: usize| (props.shared_per_block as usize).saturating_sub(used);
        let slot = |from: From| slot_bytes(rows, gated && !from.is_row());
        let (from, used, most) = ways((rows, inputs), orders.count, matrices[0].kind(), props)
            .into_iter()
            .filter(|(from, _)| alone || !from.is_row())
            .map(|(from, used)| {
                let used = used + if from.is_row() { TASK_BYTES } else { 0 };
                (from, used, free(used) / slot(from))
            })
            .find(|&(_, _, slots)| slots > 0)?;
        // Turns of equal length.
        let slots = mine.div_ceil(mine.div_ceil(most));
        Some(Self {
            rows,
            grid,
            shared: used + slots * slot(from),
            tiles,
            slots: if gated && !from.is_row() {
                2 * slots
            } else {
                slots
            },
            from,
            x_blocks: 0,
            gated,
            orders,
        })
    }

    /// The same for all passes: its warps are counted in the shared memory.
    pub(super) fn kernel(&self, kind: ScaleKind) -> Kernel {
        let columns = usize::from(kind == ScaleKind::Columns);
        if self.from == From::Clusters {
            return CLUSTER_KERNELS[2 * usize::from(self.rows > 16) + columns];
        }
        if self.from == From::LongRow {
            return LONG_ROW_KERNELS[columns];
        }
        let fits = |&most: &usize| self.rows <= most && (most > 1 || self.from == From::Row);
        let variant = VARIANTS.iter().position(fits);
        KERNELS[2 * variant.expect("a pass has at most 32 rows") + columns]
    }

    /// Threads of a block.
    pub(super) fn threads(&self) -> usize {
        32 * match self.from {
            From::Clusters => CLUSTER_WARPS,
            _ => warps(self.rows),
        }
    }

    /// What prepares several rows of x.
    pub(super) fn block_x(&self) -> Kernel {
        match self.from {
            From::Clusters => BLOCK_X_F16,
            _ => BLOCK_X,
        }
    }
}

/// How x may come to shared memory, the best way first, with the bytes that all but sums take there.
pub(in crate::cuda::lower) fn ways(
    (rows, inputs): (usize, usize),
    orders: usize,
    kind: ScaleKind,
    props: &DeviceProps,
) -> Vec<(From, usize)> {
    let x = XBytes::new(rows, inputs);
    let side = match kind {
        ScaleKind::Codes => x.sums - x.scales,
        ScaleKind::Columns => x.all - x.scales,
    };
    let warps = warps(rows);
    let ring = Ring::new(rows, props);
    let x_rings = warps * ring.slots * X_UNIT * rows * X_ROW;
    let row = inputs.div_ceil(X_CHUNK) * ROW_CHUNK;
    let gathered = ZEROS + orders * (row + side);
    let rings = warps * ring.bytes;
    // The warps' rings: Ring::BYTES of common/ring.cuh.
    let mut ways = match is_large(props) {
        true => vec![
            (From::Row, LARGE_RINGS + warps * 32 + gathered),
            (From::LongRow, warps * (3 * 2048 + 32) + gathered),
        ],
        false => vec![(From::Row, warps * (2 * 1024 + 32) + gathered)],
    };
    ways.extend([
        (From::Blocks, rings + orders * (x.scales + side)),
        (From::Rings, rings + orders * side + x_rings),
    ]);
    ways
}

/// Bytes of the sums of a column tile; `gated`: of two, whose sums lie apart.
pub(in crate::cuda::lower) fn slot_bytes(rows: usize, gated: bool) -> usize {
    warps(rows) * rows * 128 * if gated { 2 } else { 1 }
}

/// Most blocks of x that a thread block of a cluster needs for any of the matrices, in whole chunks.
fn slice_blocks(matrices: &[&CudaMatrix]) -> usize {
    let share = |m: &CudaMatrix, i: usize| usize::from(m.shares()[i * SHARES / CLUSTER]);
    let blocks = (0..CLUSTER).map(|rank| {
        let first = matrices.iter().map(|m| share(m, rank)).min();
        let end = matrices.iter().map(|m| share(m, rank + 1)).max();
        end.unwrap_or(0) - first.unwrap_or(0)
    });
    blocks.max().unwrap_or(0)
}

/// Warps of a thread block (walk.cuh: WARPS).
pub(in crate::cuda::lower) fn warps(rows: usize) -> usize {
    if rows > 8 { SHARES / 2 } else { SHARES }
}

/// Whether kernels have more under way, as the images for these GPUs are compiled; others get one for a
/// smaller GPU.
fn is_large(props: &DeviceProps) -> bool {
    matches!(props.capability.0, 9 | 10)
}

/// A warp's ring of weights (walk.cuh: RING, SLOTS).
struct Ring {
    bytes: usize,
    slots: usize,
}

impl Ring {
    fn new(rows: usize, props: &DeviceProps) -> Self {
        let large = is_large(props);
        Self {
            bytes: if large && !(5..=8).contains(&rows) {
                4608
            } else {
                2304
            },
            slots: if large && rows <= 4 { 5 } else { 3 },
        }
    }
}

/// Where the parts of rounded x lie: `XBytes` of input.cuh.
struct XBytes {
    scales: usize,
    sums: usize,
    all: usize,
}

impl XBytes {
    fn new(rows: usize, inputs: usize) -> Self {
        let blocks = inputs / X_BLOCK;
        let padded = |values: usize| (4 * values).next_multiple_of(16);
        let scales = blocks * rows * X_ROW;
        let sums = scales + padded(inputs.div_ceil(X_CHUNK) * rows);
        Self {
            scales,
            sums,
            all: sums + padded(blocks * rows),
        }
    }
}

/// Bytes that are enough for each of several rows of rounded x, wherever they begin.
pub(in crate::cuda::lower) fn row_bytes(inputs: usize) -> usize {
    XBytes::new(1, inputs).all
}

/// Bytes of several rows of rounded x.
pub(super) fn blocks_bytes(rows: usize, inputs: usize) -> usize {
    XBytes::new(rows, inputs).all.next_multiple_of(ALIGN)
}

/// Bytes of scratch: x of several rows in the orders of the parts.
pub(in super::super) fn scratch(matrices: &[&CudaMatrix], rows: usize, inputs: usize) -> u64 {
    // A pass has fewer; of more rows only fixed sums (`Target::deterministic`) are computed here.
    let rows = rows.min(MOST_ROWS);
    let all = Orders::new(matrices).count * blocks_bytes(rows, inputs);
    // One row that the launch in front leaves in order.
    all.max(ordered_bytes(rows, inputs)) as u64
}
