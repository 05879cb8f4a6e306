//! Up to 64 rows: passes over the packed weights, each for up to 32 rows (cuda/qgemm/decode.cu).

use super::{LinearPart, MAX_PARTS, activation_code, address, bias_code};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, SHARES, ScaleKind};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops;

const MODULE: &str = "qgemm/decode";
const CLUSTER_MODULE: &str = "qgemm/cluster";

/// By variant and kind of scales.
pub(super) const KERNELS: [Kernel; 2 * VARIANTS.len()] = [
    Kernel::new(MODULE, "exl_qgemm_row1_exl2"),
    Kernel::new(MODULE, "exl_qgemm_row1_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows4_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows4_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows8_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows8_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows16_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows16_gptq"),
    Kernel::new(MODULE, "exl_qgemm_rows32_exl2"),
    Kernel::new(MODULE, "exl_qgemm_rows32_gptq"),
];
/// With 16-bit floats by clusters of thread blocks: by most rows and kind of scales.
pub(super) const CLUSTER_KERNELS: [Kernel; 4] = [
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows16_exl2"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows16_gptq"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows32_exl2"),
    Kernel::new(CLUSTER_MODULE, "exl_qgemm_f16_rows32_gptq"),
];
/// Gathers several rows of x as 16-bit floats in the order of a matrix.
pub(super) const BLOCK_X_F16: Kernel = Kernel::new(CLUSTER_MODULE, "exl_block_x_f16");
/// Gathers and rounds several rows of x in the order of a matrix.
pub(super) const BLOCK_X: Kernel = Kernel::new(MODULE, "exl_block_x");

/// Most rows of each variant.
const VARIANTS: [usize; 5] = [1, 4, 8, 16, 32];
/// Beyond it, expanding the weights once is cheaper than passes over them.
const MOST_ROWS: usize = 64;
/// Major compute capabilities that cluster.cu is compiled for.
pub(in crate::cuda) const CLUSTER_ARCHITECTURES: [u32; 2] = [9, 10];
/// Columns of x with one scale, and of a block.
const X_CHUNK: usize = 128;
const X_BLOCK: usize = 32;
/// Bytes of a row of x in a block.
const X_ROW: usize = 2 * X_BLOCK;
/// Bytes of a chunk of x that is rounded in place (input.cuh: ROW_CHUNK).
const ROW_CHUNK: usize = 4 * X_CHUNK;
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
struct Orders {
    /// By part.
    of: [usize; MAX_PARTS],
    count: usize,
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
    fn firsts(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.count).filter_map(|o| self.of.iter().position(|&p| p == o))
    }
}

/// How x comes to shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// One row, gathered and rounded by every thread block.
    Row,
    /// Gathered and rounded by a launch before; all of it is copied.
    Blocks,
    /// The same, through a ring for each warp because it does not fit as a whole.
    Rings,
    /// Gathered as 16-bit floats by a launch before; each block of a cluster copies its part.
    Clusters,
}

/// How launches divide their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    /// Rows of each launch but the last.
    rows: usize,
    /// Thread blocks of the grid.
    grid: usize,
    /// Bytes of shared memory.
    shared: usize,
    /// Column tiles; for gate and up pairs of them.
    tiles: usize,
    /// Tiles of a thread block whose sums are held at a time.
    slots: usize,
    from: From,
    /// Blocks of x that a thread block of a cluster has; 0 without clusters.
    x_blocks: usize,
    gated: bool,
    orders: Orders,
}

impl Config {
    /// For up to three matrices with one input; `gated`: for gate and up. `None` when there are more
    /// rows, or shared memory is too small.
    pub(super) fn new(
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
        let exact = |rows| Self::pass(matrices, rows, work, target.props);
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
        props: &DeviceProps,
    ) -> Option<Self> {
        let inputs = matrices.first()?.inputs();
        let orders = Orders::new(matrices);
        let x = XBytes::new(rows, inputs);
        let side = match matrices[0].kind() {
            ScaleKind::Codes => x.sums - x.scales,
            ScaleKind::Columns => x.all - x.scales,
        };
        let warps = warps(rows);
        let ring = Ring::new(rows, props);
        let x_rings = warps * ring.slots * X_UNIT * rows * X_ROW;
        let slot = warps * rows * 128 * if gated { 2 } else { 1 };
        let grid = tiles.min(props.sms as usize);
        let mine = tiles.div_ceil(grid);
        let row = inputs.div_ceil(X_CHUNK) * ROW_CHUNK;
        let ways = [
            (From::Row, orders.count * (row + side)),
            (From::Blocks, orders.count * (x.scales + side)),
            (From::Rings, orders.count * side + x_rings),
        ];
        let free = |used: usize| (props.shared_per_block as usize).saturating_sub(used);
        let (from, used, most) = ways
            .into_iter()
            .filter(|(from, _)| rows == 1 || *from != From::Row)
            .map(|(from, used)| (from, used + warps * ring.bytes))
            .map(|(from, used)| (from, used, free(used) / slot))
            .find(|&(_, _, slots)| slots > 0)?;
        // Turns of equal length.
        let slots = mine.div_ceil(mine.div_ceil(most));
        Some(Self {
            rows,
            grid,
            shared: used + slots * slot,
            tiles,
            slots: if gated { 2 * slots } else { slots },
            from,
            x_blocks: 0,
            gated,
            orders,
        })
    }

    /// The same for all passes: its warps are counted in the shared memory.
    fn kernel(&self, kind: ScaleKind) -> Kernel {
        let columns = usize::from(kind == ScaleKind::Columns);
        if self.from == From::Clusters {
            return CLUSTER_KERNELS[2 * usize::from(self.rows > 16) + columns];
        }
        let fits = |&most: &usize| self.rows <= most && (most > 1 || self.from == From::Row);
        let variant = VARIANTS.iter().position(fits);
        KERNELS[2 * variant.expect("a pass has at most 32 rows") + columns]
    }

    /// Threads of a block.
    fn threads(&self) -> usize {
        32 * match self.from {
            From::Clusters => CLUSTER_WARPS,
            _ => warps(self.rows),
        }
    }

    /// What prepares several rows of x.
    fn block_x(&self) -> Kernel {
        match self.from {
            From::Clusters => BLOCK_X_F16,
            _ => BLOCK_X,
        }
    }
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

/// Warps of a thread block (decode.cu: WARPS).
fn warps(rows: usize) -> usize {
    if rows > 8 { SHARES / 2 } else { SHARES }
}

/// A warp's ring of weights (walk.cuh: RING, SLOTS).
struct Ring {
    bytes: usize,
    slots: usize,
}

impl Ring {
    fn new(rows: usize, props: &DeviceProps) -> Self {
        // As the images for these GPUs are compiled; others get one for a smaller GPU.
        let large = matches!(props.capability.0, 9 | 10);
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

/// Bytes of several rows of rounded x.
fn blocks_bytes(rows: usize, inputs: usize) -> usize {
    XBytes::new(rows, inputs).all.next_multiple_of(ALIGN)
}

/// Bytes of scratch: x of several rows in the orders of the parts.
pub(super) fn scratch(matrices: &[&CudaMatrix], rows: usize, inputs: usize) -> u64 {
    match rows {
        1..=MOST_ROWS => (Orders::new(matrices).count * blocks_bytes(rows, inputs)) as u64,
        _ => 0,
    }
}

/// What happens to the sums of a part: `Epilogue` of epilogue.cuh.
#[derive(Clone, Copy, Default)]
struct Epilogue {
    out: u64,
    bias: u64,
    add: u64,
    outputs: usize,
    bias_type: usize,
}

impl Epilogue {
    /// For rows from `row` on.
    fn words(&self, row: usize) -> [u64; 4] {
        let at = |address: u64| match address {
            0 => 0,
            _ => address + (4 * row * self.outputs) as u64,
        };
        let shape = pair(self.outputs, self.bias_type);
        [at(self.out), self.bias, at(self.add), shape]
    }
}

/// Words of a matrix in the task.
const MATRIX_WORDS: usize = 20;

fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

fn shorts(values: [usize; 4]) -> u64 {
    values
        .iter()
        .rev()
        .fold(0, |word, &v| word << 16 | v as u64)
}

/// Word of the task where the next product is described.
const NEXT_WORD: usize = MAX_PARTS * (MATRIX_WORDS + 4) + 8;
/// Bytes of its weights that each thread block asks for: what the memory delivers while sums are added,
/// launches follow each other and the next input is prepared, about 3 us of the fastest cards'.
const NEXT_BYTES: usize = 96 << 10;

/// Tells every product which one follows, the first after the last, so that its last act is to ask for
/// weights of that.
pub(in crate::cuda) fn link(launches: &mut [Launch]) {
    let is_product = |launch: &&Launch| {
        KERNELS.contains(&launch.kernel) || CLUSTER_KERNELS.contains(&launch.kernel)
    };
    let mut next = launches.iter().find(is_product).cloned();
    for launch in launches.iter_mut().rev() {
        if let Some(next) = next.as_mut().filter(|_| is_product(&&*launch)) {
            describe(next, &mut launch.args);
            *next = launch.clone();
        }
    }
}

/// Puts the weights of `next` into a task.
fn describe(next: &Launch, to: &mut Args) {
    let words = next.args.words();
    let low = |word: u64| word & u64::from(u32::MAX);
    let gated = low(words[NEXT_WORD - 2]) & 0xffff;
    let mut described = Vec::with_capacity(2 * MAX_PARTS + 1);
    for matrix in words.chunks(MATRIX_WORDS).take(MAX_PARTS) {
        // Tiles, bytes of a column tile and columns: `QMatrix` of tile.cuh.
        described.extend([matrix[0], low(matrix[5]) | low(matrix[7]) << 32]);
    }
    let bytes = NEXT_BYTES / if gated != 0 { 2 } else { 1 };
    described.push(pair(next.grid[0] as usize, bytes));
    let order = low(to.words()[NEXT_WORD - 1]);
    to.patch(NEXT_WORD - 1, &[order | gated << 32]);
    to.patch(NEXT_WORD, &described);
}

/// A product: what all its launches share.
struct Product<'a> {
    config: &'a Config,
    matrices: &'a [&'a CudaMatrix],
    epilogues: &'a [Epilogue],
    x: u64,
    rows: usize,
    act: usize,
}

impl Product<'_> {
    fn inputs(&self) -> usize {
        self.matrices[0].inputs()
    }

    fn launch(&self, target: &Target<'_>, list: &mut Vec<Launch>) {
        for first in (0..self.rows).step_by(self.config.rows) {
            let rows = self.config.rows.min(self.rows - first);
            let x = self.x + (4 * first * self.inputs()) as u64;
            let blocks = |order: usize| {
                target.scratch.address + (order * blocks_bytes(rows, self.inputs())) as u64
            };
            if self.config.from != From::Row {
                for (order, part) in self.config.orders.firsts().enumerate() {
                    let kernel = self.config.block_x();
                    list.push(block_x(
                        kernel,
                        x,
                        self.matrices[part],
                        (blocks(order), rows),
                    ));
                }
            }
            let blocks: [u64; MAX_PARTS] = std::array::from_fn(blocks);
            list.push(Launch {
                kernel: self.config.kernel(self.matrices[0].kind()),
                grid: [self.config.grid as u32, 1, 1],
                block: [self.config.threads() as u32, 1, 1],
                shared_bytes: self.config.shared as u32,
                args: Args::new().block(&self.task((first, rows), x, blocks)),
            });
        }
    }

    /// The kernel's argument, word by word: `Task` of decode.cu.
    fn task(&self, (first, rows): (usize, usize), x: u64, blocks: [u64; MAX_PARTS]) -> Vec<u64> {
        let c = self.config;
        let mut words = Vec::with_capacity(crate::cuda::launch::MAX_WORDS);
        for i in 0..MAX_PARTS {
            match self.matrices.get(i) {
                Some(m) => words.extend_from_slice(m.words()),
                None => words.extend([0; MATRIX_WORDS]),
            }
        }
        for i in 0..MAX_PARTS {
            let e = self.epilogues.get(i).copied().unwrap_or_default();
            words.extend(e.words(first));
        }
        words.push(x);
        words.extend(blocks);
        words.push(pair(rows, self.inputs()));
        words.push(pair(c.tiles, c.slots));
        let flag = usize::from;
        words.push(shorts([
            flag(c.gated),
            self.act,
            flag(c.from == From::Rings),
            c.orders.count,
        ]));
        let [a, b, d] = c.orders.of.map(|o| o as u64);
        words.push(a | b << 8 | d << 16);
        debug_assert_eq!(words.len(), NEXT_WORD);
        words.extend([0; 2 * MAX_PARTS + 1]);
        words.push(c.x_blocks as u64);
        words
    }
}

/// Gathers several rows of x for a matrix.
fn block_x(kernel: Kernel, x: u64, m: &CudaMatrix, (out, rows): (u64, usize)) -> Launch {
    Launch {
        kernel,
        // Eight warps, each for one chunk of one row.
        grid: [m.inputs().div_ceil(8 * X_CHUNK) as u32, rows as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(x)
            .ptr(m.perm())
            .ptr(out)
            .int(rows)
            .int(m.inputs()),
    }
}

pub(super) fn linear(
    config: &Config,
    o: &ops::Linear<'_>,
    parts: &[(&CudaMatrix, &LinearPart<'_>)],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let matrices: Vec<&CudaMatrix> = parts.iter().map(|p| p.0).collect();
    let epilogue = |part: &LinearPart<'_>| Epilogue {
        out: part.out.as_mem().as_ptr() as u64,
        bias: address(&part.bias),
        add: address(&part.residual),
        outputs: part.outputs,
        bias_type: bias_code(&part.bias),
    };
    let epilogues: Vec<Epilogue> = parts.iter().map(|p| epilogue(p.1)).collect();
    let product = Product {
        config,
        matrices: &matrices,
        epilogues: &epilogues,
        x: o.x.as_ptr() as u64,
        rows: o.rows,
        act: 0,
    };
    product.launch(target, list);
}

pub(super) fn gate_up(
    config: &Config,
    o: &ops::GateUp<'_>,
    matrices: [&CudaMatrix; 2],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let epilogues = [
        Epilogue {
            out: o.out.as_mem().as_ptr() as u64,
            bias: address(&o.gate_bias),
            add: 0,
            outputs: o.outputs,
            bias_type: bias_code(&o.gate_bias),
        },
        Epilogue {
            bias: address(&o.up_bias),
            bias_type: bias_code(&o.up_bias),
            ..Epilogue::default()
        },
    ];
    let product = Product {
        config,
        matrices: &matrices,
        epilogues: &epilogues,
        x: o.x.as_ptr() as u64,
        rows: o.rows,
        act: activation_code(o.act),
    };
    product.launch(target, list);
}
