//! Up to 32 rows: one pass over the packed weights (cuda/qgemm/decode.cu).

use super::{LinearPart, activation_code, address, bias_code};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, ScaleKind};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops;

const MODULE: &str = "qgemm/decode";

/// By gate and up, variant, and kind of scales.
pub(super) const KERNELS: [Kernel; 4 * VARIANTS.len()] = [
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
    Kernel::new(MODULE, "exl_qgate_up_row1_exl2"),
    Kernel::new(MODULE, "exl_qgate_up_row1_gptq"),
    Kernel::new(MODULE, "exl_qgate_up_rows4_exl2"),
    Kernel::new(MODULE, "exl_qgate_up_rows4_gptq"),
    Kernel::new(MODULE, "exl_qgate_up_rows8_exl2"),
    Kernel::new(MODULE, "exl_qgate_up_rows8_gptq"),
    Kernel::new(MODULE, "exl_qgate_up_rows16_exl2"),
    Kernel::new(MODULE, "exl_qgate_up_rows16_gptq"),
    Kernel::new(MODULE, "exl_qgate_up_rows32_exl2"),
    Kernel::new(MODULE, "exl_qgate_up_rows32_gptq"),
];
/// Gathers and rounds several rows of x in the order of a matrix.
pub(super) const BLOCK_X: Kernel = Kernel::new(MODULE, "exl_block_x");

/// A kernel for up to so many rows.
struct Variant {
    rows: usize,
    /// Most warps of a thread block: as many as registers allow on a multiprocessor.
    warps: usize,
    /// Bytes of a warp's ring of x (decode.cu: x_ring).
    x_ring: usize,
}

const VARIANTS: [Variant; 5] = [
    Variant {
        rows: 1,
        warps: 16,
        x_ring: 0,
    },
    Variant {
        rows: 4,
        warps: 16,
        x_ring: 2048,
    },
    Variant {
        rows: 8,
        warps: 16,
        x_ring: 4096,
    },
    Variant {
        rows: 16,
        warps: 8,
        x_ring: 8192,
    },
    Variant {
        rows: 32,
        warps: 8,
        x_ring: 8192,
    },
];
/// Fewest warps that are worth a launch.
const MIN_WARPS: usize = 4;
/// Bytes of a warp's ring of weights (decode.cu: RING).
const RING: usize = 4096;
/// Columns of x with one scale, and of a block.
const X_CHUNK: usize = 128;
const X_BLOCK: usize = 32;
const ALIGN: usize = 256;

/// How a launch divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Index in [`VARIANTS`].
    variant: usize,
    /// Warps of a thread block.
    pub(crate) warps: usize,
    /// Thread blocks of the grid.
    pub(crate) grid: usize,
    /// Bytes of shared memory.
    pub(crate) shared: usize,
    /// Bytes of it for pieces and codes of one matrix.
    stage: usize,
    /// Column tiles.
    tiles: usize,
    /// Gate and up need different orders of x.
    two_x: bool,
}

impl Config {
    /// For matrices with one input. `None` when there are more rows, or shared memory is too small.
    pub(crate) fn linear(
        matrices: &[&CudaMatrix],
        rows: usize,
        target: &Target<'_>,
    ) -> Option<Self> {
        let tiles = matrices.iter().map(|m| m.columns()).sum();
        Self::new(matrices, tiles, (rows, 1, false), target.props)
    }

    /// For gate and up.
    pub(crate) fn gate_up(
        gate: &CudaMatrix,
        up: &CudaMatrix,
        rows: usize,
        target: &Target<'_>,
    ) -> Option<Self> {
        let two_x = gate.perm() != up.perm();
        let tiles = gate.columns().max(up.columns());
        Self::new(&[gate, up], tiles, (rows, 2, two_x), target.props)
    }

    fn new(
        matrices: &[&CudaMatrix],
        tiles: usize,
        (rows, twins, two_x): (usize, usize, bool),
        props: &DeviceProps,
    ) -> Option<Self> {
        let (variant, limits) = variant(rows)?;
        let inputs = matrices.first()?.inputs();
        let stage = matrices.iter().map(|m| staged_bytes(m)).max()?;
        let orders = 1 + usize::from(two_x);
        let x = XBytes::new(rows, inputs);
        let shared = |warps: usize| {
            let x = match rows {
                1 => orders * x.all,
                _ => warps * limits.x_ring + orders * (x.all - x.scales),
            };
            warps * (RING + 2 * rows * 128) + 2 * twins * stage + x
        };
        let fits = |&w: &usize| shared(w) <= props.shared_per_block as usize;
        let halves = std::iter::successors(Some(limits.warps), |w| Some(w / 2));
        let warps = halves.take_while(|&w| w >= MIN_WARPS).find(fits)?;
        Some(Self {
            variant,
            warps,
            grid: tiles.min(props.sms as usize),
            shared: shared(warps),
            stage,
            tiles,
            two_x,
        })
    }
}

/// The first variant for so many rows, and its place in [`VARIANTS`].
fn variant(rows: usize) -> Option<(usize, &'static Variant)> {
    VARIANTS.iter().enumerate().find(|(_, v)| rows <= v.rows)
}

/// Where the parts of rounded x lie: `XBytes` of decode.cu.
struct XBytes {
    scales: usize,
    all: usize,
}

impl XBytes {
    fn new(rows: usize, inputs: usize) -> Self {
        let blocks = inputs / X_BLOCK;
        let padded = |values: usize| (4 * values).next_multiple_of(16);
        let scales = blocks * rows * 2 * X_BLOCK;
        Self {
            scales,
            all: scales + padded(inputs.div_ceil(X_CHUNK) * rows) + padded(blocks * rows),
        }
    }
}

/// Shared memory for what a column tile needs of a matrix; as `staged` of decode.cu.
fn staged_bytes(m: &CudaMatrix) -> usize {
    let pieces = (2 * m.blocks()).next_multiple_of(16);
    pieces
        + match m.kind() {
            ScaleKind::Codes => (2 * m.pieces()).next_multiple_of(16) + 16 * m.pieces(),
            ScaleKind::Columns => 128 * m.pieces(),
        }
}

/// Bytes of several rows of rounded x.
fn blocks_bytes(rows: usize, inputs: usize) -> usize {
    XBytes::new(rows, inputs).all.next_multiple_of(ALIGN)
}

/// Bytes of scratch: x of several rows, twice for gate and up.
pub(super) fn scratch(rows: usize, inputs: usize, gated: bool) -> u64 {
    if rows > 1 && variant(rows).is_some() {
        (blocks_bytes(rows, inputs) * (1 + usize::from(gated))) as u64
    } else {
        0
    }
}

/// The kernel's argument, word by word: `Task` of decode.cu.
struct Task {
    words: Vec<u64>,
}

/// What happens to the sums of a part: `Epilogue` of epilogue.cuh.
#[derive(Default)]
struct Epilogue {
    out: u64,
    bias: u64,
    add: u64,
    outputs: usize,
    bias_type: usize,
}

/// Words of a matrix in the task.
const MATRIX_WORDS: usize = 15;

fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

impl Task {
    fn new(matrices: &[&CudaMatrix], epilogues: &[Epilogue]) -> Self {
        let mut words = Vec::with_capacity(crate::cuda::launch::MAX_WORDS);
        for i in 0..super::MAX_PARTS {
            match matrices.get(i) {
                Some(m) => words.extend_from_slice(m.words()),
                None => words.extend([0; MATRIX_WORDS]),
            }
        }
        let none = Epilogue::default();
        for i in 0..super::MAX_PARTS {
            let e = epilogues.get(i).unwrap_or(&none);
            words.extend([e.out, e.bias, e.add, pair(e.outputs, e.bias_type)]);
        }
        Self { words }
    }

    fn launch(
        mut self,
        (config, kernel): (&Config, usize),
        (x, blocks): (u64, [u64; 2]),
        (rows, inputs): (usize, usize),
        act: usize,
    ) -> Launch {
        self.words.extend([x, blocks[0], blocks[1]]);
        self.words.extend([
            pair(rows, inputs),
            pair(config.tiles, config.stage),
            pair(usize::from(config.two_x), act),
        ]);
        Launch {
            kernel: KERNELS[kernel],
            grid: [config.grid as u32, 1, 1],
            block: [32 * config.warps as u32, 1, 1],
            shared_bytes: config.shared as u32,
            args: Args::new().block(&self.words),
        }
    }
}

fn kernel(gated: bool, config: &Config, kind: ScaleKind) -> usize {
    let columns = usize::from(kind == ScaleKind::Columns);
    (usize::from(gated) * VARIANTS.len() + config.variant) * 2 + columns
}

/// Gathers several rows of x for a matrix.
fn block_x(x: u64, m: &CudaMatrix, out: u64, rows: usize) -> Launch {
    Launch {
        kernel: BLOCK_X,
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
    let x = o.x.as_ptr() as u64;
    let blocks = target.scratch.address;
    if o.rows > 1 {
        list.push(block_x(x, matrices[0], blocks, o.rows));
    }
    let kernel = kernel(false, config, matrices[0].kind());
    let shape = (o.rows, o.inputs);
    list.push(Task::new(&matrices, &epilogues).launch(
        (config, kernel),
        (x, [blocks; 2]),
        shape,
        0,
    ));
}

pub(super) fn gate_up(
    config: &Config,
    o: &ops::GateUp<'_>,
    (gate, up): (&CudaMatrix, &CudaMatrix),
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
    let x = o.x.as_ptr() as u64;
    let first = target.scratch.address;
    let second = match config.two_x {
        true => first + blocks_bytes(o.rows, o.inputs) as u64,
        false => first,
    };
    if o.rows > 1 {
        list.push(block_x(x, gate, first, o.rows));
        if config.two_x {
            list.push(block_x(x, up, second, o.rows));
        }
    }
    let kernel = kernel(true, config, gate.kind());
    let shape = (o.rows, o.inputs);
    list.push(Task::new(&[gate, up], &epilogues).launch(
        (config, kernel),
        (x, [first, second]),
        shape,
        activation_code(o.act),
    ));
}
