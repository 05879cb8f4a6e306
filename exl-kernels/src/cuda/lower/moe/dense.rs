//! Unquantized experts (cuda/moe/dense.cu).

use super::sort::Space;
use super::{Format, Kind, Layer, pair};
use crate::cuda::lower::linear::dtype_code;
use crate::cuda::{Kernel, Launch};

/// By element type as [`dtype_code`] numbers them.
pub(super) const DENSE: [Kernel; 3] = [
    Kernel::new("moe/dense", "exl_moe_dense_f32"),
    Kernel::new("moe/dense", "exl_moe_dense_f16"),
    Kernel::new("moe/dense", "exl_moe_dense_bf16"),
];
pub(super) const GATE_UP: [Kernel; 3] = [
    Kernel::new("moe/dense", "exl_moe_dense_gate_up_f32"),
    Kernel::new("moe/dense", "exl_moe_dense_gate_up_f16"),
    Kernel::new("moe/dense", "exl_moe_dense_gate_up_bf16"),
];

/// Most rows of a segment, and columns of a block, one per warp.
pub(super) const ROWS: usize = 8;
const COLUMNS: usize = 8;

pub(super) fn lower(layer: &Layer<'_>, format: &Format, space: &Space, list: &mut Vec<Launch>) {
    let Kind::Dense(dtype) = format.kind else {
        return;
    };
    let kernels = if layer.act.is_some() { GATE_UP } else { DENSE };
    let mut task = vec![0];
    task.extend(space.words());
    task.extend([layer.x, layer.out]);
    task.push(pair(layer.by, layer.inputs));
    task.push(pair(layer.outputs, layer.act.unwrap_or(0)));
    let grid = layer.segments(ROWS) * layer.outputs.div_ceil(COLUMNS);
    list.push(format.launch(kernels[dtype_code(dtype)], grid, 32 * COLUMNS, &task));
}
