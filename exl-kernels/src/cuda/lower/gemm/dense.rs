//! Unquantized weights (cuda/gemm/dense.cu).

use super::bias_words;
use crate::DType;
use crate::cuda::launch::Args;
use crate::cuda::lower::linear::{activation_code, dtype_code};
use crate::cuda::{Kernel, Launch};
use crate::ops::Activation;

const UNIT: &str = "gemm/dense";

/// By element type as [`dtype_code`] numbers them.
pub(super) const DENSE: [Kernel; 3] = [
    Kernel::new(UNIT, "exl_dense_f32"),
    Kernel::new(UNIT, "exl_dense_f16"),
    Kernel::new(UNIT, "exl_dense_bf16"),
];
/// The same for few columns.
pub(super) const NARROW: [Kernel; 3] = [
    Kernel::new(UNIT, "exl_dense_narrow_f32"),
    Kernel::new(UNIT, "exl_dense_narrow_f16"),
    Kernel::new(UNIT, "exl_dense_narrow_bf16"),
];
pub(super) const GATE_UP: [Kernel; 3] = [
    Kernel::new(UNIT, "exl_dense_gate_up_f32"),
    Kernel::new(UNIT, "exl_dense_gate_up_f16"),
    Kernel::new(UNIT, "exl_dense_gate_up_bf16"),
];

/// Columns of a block, one per warp, and rows of a warp.
const COLUMNS: usize = 8;
const ROWS: usize = 8;
/// Columns below which one warp for each leaves most of a GPU idle, and the shortest ones that are worth
/// a block each.
const NARROW_COLUMNS: usize = 512;
const NARROW_INPUTS: usize = 1024;
/// Rows up to which a block for each column reads x often enough.
const NARROW_ROWS: usize = 32;

/// A linear layer with addresses on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DenseLinear {
    pub(crate) x: u64,
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) weight: u64,
    pub(crate) dtype: DType,
    pub(crate) bias: Option<(u64, DType)>,
    pub(crate) residual: Option<u64>,
    pub(crate) out: u64,
    pub(crate) outputs: usize,
}

/// A product of one row with a matrix of 16 bits, to which nothing is added: another launch may compute it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DenseRow {
    pub(crate) x: u64,
    pub(crate) inputs: usize,
    pub(crate) weight: u64,
    pub(crate) bf16: bool,
    pub(crate) out: u64,
    pub(crate) outputs: usize,
}

impl DenseRow {
    /// What a launch computes, if it is that.
    pub(crate) fn of(launch: &Launch) -> Option<Self> {
        let is = |dtype| {
            let code = dtype_code(dtype);
            [DENSE[code], NARROW[code]].contains(&launch.kernel)
        };
        let bf16 = is(DType::Bf16);
        if !bf16 && !is(DType::F16) {
            return None;
        }
        let &[x, weight, out, bias, _, residual, rows, inputs, outputs] = launch.args.words()
        else {
            return None;
        };
        (bias == 0 && residual == 0 && rows == 1).then_some(Self {
            x,
            inputs: inputs as usize,
            weight,
            bf16,
            out,
            outputs: outputs as usize,
        })
    }
}

/// Gate and up with addresses on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DenseGateUp {
    pub(crate) x: u64,
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) gate: u64,
    pub(crate) up: u64,
    pub(crate) dtype: DType,
    pub(crate) gate_bias: Option<(u64, DType)>,
    pub(crate) up_bias: Option<(u64, DType)>,
    pub(crate) out: u64,
    pub(crate) outputs: usize,
    pub(crate) act: Activation,
}

fn launch(kernel: Kernel, (rows, outputs): (usize, usize), args: Args) -> Launch {
    Launch {
        kernel,
        grid: [
            outputs.div_ceil(COLUMNS) as u32,
            rows.div_ceil(ROWS) as u32,
            1,
        ],
        block: [32 * COLUMNS as u32, 1, 1],
        shared_bytes: 0,
        args,
    }
}

/// Whether a block for each column is the way. With `deterministic` the number of rows does not matter,
/// as it is another order of the sums.
fn is_narrow(o: &DenseLinear, deterministic: bool) -> bool {
    o.outputs < NARROW_COLUMNS
        && o.inputs >= NARROW_INPUTS
        && o.inputs.is_multiple_of(8)
        && (deterministic || o.rows <= NARROW_ROWS)
}

pub(crate) fn dense_linear(list: &mut Vec<Launch>, o: &DenseLinear, deterministic: bool) {
    let (bias, bias_type) = bias_words(o.bias);
    let args = Args::new()
        .ptr(o.x)
        .ptr(o.weight)
        .ptr(o.out)
        .ptr(bias)
        .int(bias_type)
        .ptr(o.residual.unwrap_or(0))
        .int(o.rows)
        .int(o.inputs)
        .int(o.outputs);
    let dtype = dtype_code(o.dtype);
    let mut launch = launch(DENSE[dtype], (o.rows, o.outputs), args);
    if is_narrow(o, deterministic) {
        launch.kernel = NARROW[dtype];
        launch.grid[0] = o.outputs as u32;
    }
    list.push(launch);
}

pub(crate) fn dense_gate_up(list: &mut Vec<Launch>, o: &DenseGateUp) {
    let (gate_bias, gate_bias_type) = bias_words(o.gate_bias);
    let (up_bias, up_bias_type) = bias_words(o.up_bias);
    let args = Args::new()
        .ptr(o.x)
        .ptr(o.gate)
        .ptr(o.up)
        .ptr(o.out)
        .ptr(gate_bias)
        .int(gate_bias_type)
        .ptr(up_bias)
        .int(up_bias_type)
        .int(activation_code(o.act))
        .int(o.rows)
        .int(o.inputs)
        .int(o.outputs);
    let kernel = GATE_UP[dtype_code(o.dtype)];
    list.push(launch(kernel, (o.rows, o.outputs), args));
}
