//! Few rows of an expert: its packed weights are read once for up to 16 rows (cuda/moe/row.cu, few.cu).

use super::sort::Space;
use super::{ALIGN, Format, Layer, Sum, pair, unpair};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::lower::linear::{From, MATRIX_WORDS, X_CHUNK, row_bytes, slot_bytes, warps, ways};
use crate::cuda::matrix::{BLOCK_ROWS, MAX_RUNS, ScaleKind, TILE_COLUMNS};
use crate::cuda::{DeviceProps, Kernel, Launch};

/// Rows that experts have on average up to which this is the way: with more, exact sums take more time
/// than the memory.
pub(super) const MOST_AVERAGE: usize = 8;

/// One row, by kind of scales.
pub(super) const ROW: [Kernel; 2] = [
    Kernel::new("moe/row", "exl_moe_row1_exl2"),
    Kernel::new("moe/row", "exl_moe_row1_gptq"),
];
/// One row, whose experts' outputs are added up.
pub(super) const ROW_ADD: Kernel = Kernel::new("moe/row", "exl_moe_row1_add_exl2");
/// The same by [`SPLIT`] thread blocks for the same columns.
pub(super) const ROW_ADD_SPLIT: Kernel = Kernel::new("moe/row", "exl_moe_row1_add_split_exl2");
/// Thread blocks that divide the rows of a matrix (cuda/moe/row.cu).
pub(super) const SPLIT: usize = 4;
/// Inputs from which on that is worth it: with fewer it does not matter how long each thread block takes to
/// gather all of them.
const SPLIT_INPUTS: usize = 4096;
/// Most rows of a segment, and the kernels by kind of scales.
pub(super) const ROWS: [(usize, [Kernel; 2]); 3] = [
    (
        4,
        [
            Kernel::new("moe/few", "exl_moe_rows4_exl2"),
            Kernel::new("moe/few", "exl_moe_rows4_gptq"),
        ],
    ),
    (
        8,
        [
            Kernel::new("moe/few", "exl_moe_rows8_exl2"),
            Kernel::new("moe/few", "exl_moe_rows8_gptq"),
        ],
    ),
    (
        16,
        [
            Kernel::new("moe/few", "exl_moe_rows16_exl2"),
            Kernel::new("moe/few", "exl_moe_rows16_gptq"),
        ],
    ),
];
/// Gathers and rounds rows of x in the orders of their experts.
pub(super) const BLOCK_X: Kernel = Kernel::new("moe/input", "exl_moe_block_x");

/// Bytes of shared memory that describe what a thread block computes (cuda/moe/task.cuh).
const TASK_BYTES: usize = 1024;
/// Bytes of a matrix's descriptor, and most descriptors that thread blocks copy to shared memory.
const DESCRIPTOR_BYTES: usize = 8 * MATRIX_WORDS;
pub(super) const MOST_STAGED: usize = 32;
/// Words of the task (`ExpertsTask` of task.cuh): the ids of one row, its x, the outputs, three for their sum, those
/// in down's order, experts and segments, inputs and outputs, whether each expert has an x of its own, whether ids
/// are there early and descriptors staged.
const IDS_WORD: usize = 5;
const X_WORD: usize = 6;
const OUT_WORD: usize = 9;
const SUM_WORDS: usize = 10;
const ORDERED_WORD: usize = 14;
const EXPERTS_WORD: usize = 15;
const SHAPE_WORD: usize = 16;
const MODES_WORD: usize = 18;
const EARLY_WORD: usize = 19;

const ROW_ADDS: [Kernel; 2] = [ROW_ADD, ROW_ADD_SPLIT];

/// Tells down products of one row that come behind gate and up of the same row that they need not wait for
/// the experts' numbers: those were there before gate and up let anything begin that comes behind them. And lets
/// gate and up write in down's order.
pub(in crate::cuda::lower) fn link(launches: &mut [Launch]) {
    for i in 1..launches.len() {
        if let [gate_up, down] = &mut launches[i - 1..=i] {
            order(gate_up, down);
        }
    }
    // The ids that gate and up of the layer at hand read; the next router may write there again.
    let mut known = None;
    for launch in launches {
        if super::is_route(launch.kernel) {
            known = None;
        } else if ROW.contains(&launch.kernel) {
            known = Some(launch.args.words()[IDS_WORD]);
        } else if ROW_ADDS.contains(&launch.kernel) && known == Some(launch.args.words()[IDS_WORD])
        {
            let word = launch.args.words()[EARLY_WORD];
            launch.args.patch(EARLY_WORD, &[word | 1 << 32]);
        }
    }
}

/// Lets gate and up of one row leave what they compute in the order of the down matrices as well, so that
/// thread blocks of down need not gather it. It lies in the scratch memory of down, the very next launch: nothing
/// else may use that in between.
fn order(gate_up: &mut Launch, down: &mut Launch) {
    if !ROW.contains(&gate_up.kernel) || down.kernel != ROW_ADD_SPLIT {
        return;
    }
    let (from, to) = (gate_up.args.words(), down.args.words());
    let (Some(own), Some(next)) = (gate_up.args.table(), down.args.table()) else {
        return;
    };
    // All experts have the one format of either, and their descriptors are staged: no matrix lies at 0.
    let staged = [from, to].iter().all(|words| words[EARLY_WORD] >> 48 != 0);
    let there = |records: &[u64]| {
        records
            .iter()
            .step_by(MATRIX_WORDS)
            .all(|&tiles| tiles != 0)
    };
    let all = own.len() == 2 * next.len() && there(own) && there(next);
    let [computed, read] = [from[SHAPE_WORD] >> 32, to[SHAPE_WORD] & 0xffff_ffff];
    let same = [OUT_WORD, IDS_WORD, EXPERTS_WORD].map(|word| from[word])
        == [X_WORD, IDS_WORD, EXPERTS_WORD].map(|word| to[word]);
    if !staged || !all || !same || computed != read {
        return;
    }
    // Behind the outputs of down's thread blocks (down_scratch).
    let [segments, outputs] = [to[EXPERTS_WORD], to[SHAPE_WORD]].map(|word| (word >> 32) as usize);
    let outputs = (4 * segments * SPLIT * outputs).next_multiple_of(ALIGN);
    let ordered = to[OUT_WORD] + outputs as u64;
    // Their records tell the order.
    let both = own.iter().chain(next.iter()).copied().collect();
    gate_up.args = gate_up.args.clone().with_table(both);
    gate_up.args.patch(ORDERED_WORD, &[ordered]);
    down.args.patch(ORDERED_WORD, &[ordered]);
}

/// What gate and up of one row read and write, which may choose the experts as well.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowTask {
    pub(super) x: u64,
    pub(super) ids: u64,
    pub(super) out: u64,
    pub(super) experts: u64,
    pub(super) segments: u64,
    pub(super) inputs: u64,
    pub(super) outputs: u64,
    /// Where the outputs are left in down's order, or 0.
    ordered: u64,
}

impl RowTask {
    /// Scratch memory behind what is left in down's order, if there is any (moe.rs: down_scratch).
    pub(super) fn behind(&self) -> Option<u64> {
        let bytes = (4 * self.segments * self.outputs).next_multiple_of(ALIGN as u64);
        (self.ordered != 0).then_some(self.ordered + bytes)
    }

    /// What a launch computes, if it is that, and has the descriptors of all experts at hand.
    pub(super) fn of(launch: &Launch) -> Option<Self> {
        if launch.kernel != ROW[0] {
            return None;
        }
        let words = launch.args.words();
        let staged = words[EARLY_WORD] >> 48 != 0;
        // One x for all experts.
        let shared = words[MODES_WORD] >> 32 & 0xffff == 0;
        let [experts, segments] = unpair(words[EXPERTS_WORD]);
        let [inputs, outputs] = unpair(words[SHAPE_WORD]);
        (staged && shared).then_some(Self {
            x: words[X_WORD],
            ids: words[IDS_WORD],
            out: words[OUT_WORD],
            experts,
            segments,
            inputs,
            outputs,
            ordered: words[ORDERED_WORD],
        })
    }
}

/// What a product with the experts' last matrices adds up, of one row.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowSum {
    /// The outputs of thread blocks: `[segments, SPLIT or 1, columns]`.
    pub(super) parts: u64,
    /// Whether thread blocks divide the rows.
    pub(super) split: bool,
    pub(super) weights: u64,
    pub(super) residual: u64,
    pub(super) out: u64,
    pub(super) segments: u64,
    pub(super) columns: u64,
}

impl RowSum {
    /// What a launch adds up, if it does that.
    pub(super) fn of(launch: &Launch) -> Option<Self> {
        let words = launch.args.words();
        ROW_ADDS.contains(&launch.kernel).then(|| Self {
            parts: words[OUT_WORD],
            split: launch.kernel == ROW_ADD_SPLIT,
            weights: words[SUM_WORDS],
            residual: words[SUM_WORDS + 1],
            out: words[SUM_WORDS + 2],
            segments: words[EXPERTS_WORD] >> 32,
            columns: words[SHAPE_WORD] >> 32,
        })
    }

    /// Lets the launch leave it to another one.
    pub(super) fn leave(launch: &mut Launch) {
        launch.args.patch(SUM_WORDS, &[0; 3]);
    }
}

/// How launches divide their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Few {
    /// Most rows of a segment.
    pub(super) rows: usize,
    kernel: Kernel,
    from: From,
    /// Bytes of shared memory.
    shared: usize,
    /// Column tiles of a thread block whose sums are held at a time; of gate and up each counts where their
    /// sums lie apart.
    slots: usize,
    /// Columns of one row of x that a thread block has room for.
    held: usize,
    /// Thread blocks that divide the rows of a matrix.
    split: usize,
    /// One row: thread blocks have the descriptors of all experts at hand.
    staged: bool,
}

/// Bytes of shared memory for the descriptors of all experts of one row, where they are that few.
fn staged_bytes(layer: &Layer<'_>) -> usize {
    let count = layer.experts * layer.parts();
    if count <= MOST_STAGED {
        DESCRIPTOR_BYTES * count
    } else {
        0
    }
}

impl Few {
    /// `None` when shared memory is too small.
    pub(super) fn new(
        layer: &Layer<'_>,
        format: &Format,
        kind: ScaleKind,
        (props, deterministic): (&DeviceProps, bool),
    ) -> Option<Self> {
        let kernel = match kind {
            ScaleKind::Codes => 0,
            ScaleKind::Columns => 1,
        };
        let find = |rows: usize, kernel: Kernel, wanted: &[From]| {
            let alone = wanted.contains(&From::Row);
            let apart = layer.act.is_some() && !alone;
            let slot = slot_bytes(rows, apart);
            let fixed = TASK_BYTES + if alone { staged_bytes(layer) } else { 0 };
            let free = (props.shared_per_block as usize).checked_sub(fixed)?;
            let ways = ways((rows, layer.inputs), format.orders, kind, props).into_iter();
            let (from, used, most) = ways
                .filter(|(from, _)| wanted.contains(from))
                .map(|(from, used)| (from, used, free.saturating_sub(used) / slot))
                .find(|way| way.2 > 0)?;
            // Turns of equal length, when those of a thread block do not fit at once.
            let mine = tiles_of(layer, rows, from, props).max(1);
            let tiles = mine.div_ceil(mine.div_ceil(most));
            Some(Self {
                rows,
                kernel,
                from,
                shared: fixed + used + tiles * slot,
                slots: if apart { 2 * tiles } else { tiles },
                held: layer.inputs,
                split: 1,
                staged: fixed > TASK_BYTES,
            })
        };
        // The sums of one row have another order.
        let alone = (layer.rows == 1 && !deterministic)
            .then(|| find(1, ROW[kernel], &[From::Row]))
            .flatten();
        // So many that an expert seldom has more, as none has more than there are rows.
        let average = layer.average() as f64;
        let usual = (average + 2.0 * average.sqrt()) as usize;
        let wanted = match deterministic {
            true => ROWS[ROWS.len() - 1].0,
            false => usual.min(layer.rows),
        };
        let larger = ROWS.iter().filter(|(rows, _)| *rows >= wanted);
        let smaller = ROWS.iter().rev().filter(|(rows, _)| *rows < wanted);
        let ways = [From::Blocks, From::Rings];
        let several = |(rows, kernels): &(usize, [Kernel; 2])| find(*rows, kernels[kernel], &ways);
        alone.or_else(|| larger.chain(smaller).find_map(several))
    }

    /// One row of a long input, whose outputs are added up: several thread blocks divide the rows of the same
    /// columns. `None` when that leaves more of the GPU idle.
    pub(super) fn split(layer: &Layer<'_>, format: &Format, props: &DeviceProps) -> Option<Self> {
        let columns = layer.outputs.div_ceil(TILE_COLUMNS);
        let blocks = props.sms as usize / (layer.top_k * SPLIT);
        if layer.inputs < SPLIT_INPUTS || blocks == 0 || columns < blocks {
            return None;
        }
        // Shares of the rows have about the same bytes.
        let mine = columns.div_ceil(blocks);
        if mine > SPLIT * columns.div_ceil(blocks_of(layer, 1, props)) {
            return None;
        }
        // Behind the rounded slice: x as it is (row_slice.cuh: SliceInput).
        let held = (format.slice * BLOCK_ROWS).next_multiple_of(X_CHUNK);
        let scales = (4 * (held / X_CHUNK + MAX_RUNS)).next_multiple_of(16);
        let x = 2 * held + scales + 4 * layer.inputs;
        let (_, used) = ways((1, 0), 1, ScaleKind::Codes, props)[0];
        let used = used + x;
        let slot = slot_bytes(1, false) / SPLIT;
        let fixed = TASK_BYTES + staged_bytes(layer);
        let free = (props.shared_per_block as usize).checked_sub(fixed + used)?;
        let most = free / slot / SPLIT * SPLIT;
        let slots = match most {
            0 => return None,
            most => mine.div_ceil(mine.div_ceil(most)).next_multiple_of(SPLIT),
        };
        Some(Self {
            rows: 1,
            kernel: ROW_ADD_SPLIT,
            from: From::Row,
            shared: fixed + used + slots * slot,
            slots,
            held,
            split: SPLIT,
            staged: fixed > TASK_BYTES,
        })
    }

    /// Whether there is one row, which is not prepared in scratch memory.
    pub(super) fn is_row(&self) -> bool {
        self.from == From::Row
    }

    /// Bytes of the prepared rows.
    pub(super) fn input_bytes(&self, layer: &Layer<'_>, format: &Format) -> usize {
        match self.is_row() {
            true => 0,
            false => format.orders * layer.slots() * row_bytes(layer.inputs),
        }
    }

    /// One row: thread blocks in equal number for each of its experts. With `sum` their outputs are
    /// added up.
    pub(super) fn row(
        &self,
        layer: &Layer<'_>,
        format: &Format,
        sum: Option<&Sum>,
        (target, list): (&Target<'_>, &mut Vec<Launch>),
    ) {
        let kernel = match sum {
            Some(_) if self.split == 1 => ROW_ADD,
            _ => self.kernel,
        };
        let blocks = blocks_of(layer, self.split, target.props);
        let mut task = Task::new(layer, self);
        task.each = layer.outputs.div_ceil(TILE_COLUMNS) / blocks;
        task.ids = layer.ids;
        task.segments = layer.top_k;
        task.sum = sum.copied();
        task.counters = target.scratch.counters;
        list.push(Launch {
            grid: [blocks as u32, (layer.top_k * self.split) as u32, 1],
            ..self.launch(kernel, blocks, format, &task)
        });
    }

    /// Segments of sorted slots.
    pub(super) fn rows(
        &self,
        layer: &Layer<'_>,
        format: &Format,
        space: &Space,
        (target, list): (&Target<'_>, &mut Vec<Launch>),
    ) {
        let row_bytes = row_bytes(layer.inputs);
        let part_bytes = layer.slots() * row_bytes;
        list.push(Launch {
            kernel: BLOCK_X,
            // Eight warps, each for one chunk of one row.
            grid: [
                layer.inputs.div_ceil(8 * X_CHUNK) as u32,
                layer.slots() as u32,
                format.orders as u32,
            ],
            block: [256, 1, 1],
            shared_bytes: 0,
            args: Args::new()
                .ptr(0)
                .block(&space.words())
                .ptr(layer.x)
                .ptr(space.inputs)
                .int(layer.parts())
                .int(layer.by)
                .int(layer.inputs)
                .int(row_bytes)
                .long(part_bytes as u64)
                .with_table(format.table.clone()),
        });
        let units = layer.segments(self.rows) * layer.outputs.div_ceil(TILE_COLUMNS);
        let grid = units.min(target.props.sms as usize);
        let mut task = Task::new(layer, self);
        task.sorted = space.words();
        task.blocks = space.inputs;
        task.part_bytes = part_bytes;
        list.push(self.launch(self.kernel, grid, format, &task));
    }

    fn launch(&self, kernel: Kernel, grid: usize, format: &Format, task: &Task<'_>) -> Launch {
        let launch = format.launch(kernel, grid, 32 * warps(self.rows), &task.words());
        let args = match &format.records {
            Some(records) if self.staged => launch.args.with_table(records.clone()),
            _ => launch.args,
        };
        Launch {
            shared_bytes: self.shared as u32,
            args,
            ..launch
        }
    }
}

/// Thread blocks for each expert of one row, and each of `split` parts of the rows of its matrices.
fn blocks_of(layer: &Layer<'_>, split: usize, props: &DeviceProps) -> usize {
    let columns = layer.outputs.div_ceil(TILE_COLUMNS).max(1);
    (props.sms as usize / (layer.top_k * split)).clamp(1, columns)
}

/// Most column tiles of an expert that one thread block has.
fn tiles_of(layer: &Layer<'_>, rows: usize, from: From, props: &DeviceProps) -> usize {
    let columns = layer.outputs.div_ceil(TILE_COLUMNS);
    if from == From::Row {
        return columns.div_ceil(blocks_of(layer, 1, props));
    }
    let units = layer.segments(rows) * columns;
    units.div_ceil(props.sms as usize).min(columns)
}

/// `ExpertsTask` of task.cuh.
struct Task<'l> {
    layer: &'l Layer<'l>,
    few: &'l Few,
    sorted: [u64; 4],
    ids: u64,
    blocks: u64,
    part_bytes: usize,
    sum: Option<Sum>,
    counters: u64,
    segments: usize,
    /// One row: least column tiles of a thread block.
    each: usize,
}

impl<'l> Task<'l> {
    fn new(layer: &'l Layer<'l>, few: &'l Few) -> Self {
        Self {
            layer,
            few,
            sorted: [0; 4],
            ids: 0,
            blocks: 0,
            part_bytes: 0,
            sum: None,
            counters: 0,
            segments: 0,
            each: 0,
        }
    }

    fn words(&self) -> Vec<u64> {
        let (l, few) = (self.layer, self.few);
        let sum = |of: fn(&Sum) -> u64| self.sum.as_ref().map_or(0, of);
        let flag = usize::from;
        let mut words = vec![0];
        words.extend(self.sorted);
        words.extend([self.ids, l.x, self.blocks, self.part_bytes as u64, l.out]);
        words.extend([sum(|s| s.weights), sum(|s| s.residual), sum(|s| s.out)]);
        words.extend([self.counters, 0]);
        words.push(pair(l.experts, self.segments));
        words.push(pair(l.inputs, l.outputs));
        words.push(pair(l.outputs.div_ceil(TILE_COLUMNS), few.slots));
        let modes = flag(l.by == 1) | flag(few.from == From::Rings) << 16;
        words.push(pair(row_bytes(l.inputs), modes));
        words.push(pair(few.held, flag(few.staged) << 16));
        let (gated, act) = (flag(l.act.is_some()), l.act.unwrap_or(0));
        words.push(pair(gated | act << 16, self.each));
        words
    }
}
