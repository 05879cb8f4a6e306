//! Linear layers: which kernels compute them, with what split of the work.

mod few;
mod many;

#[cfg(test)]
mod tests;

use super::Target;
use super::gemm;
use crate::cuda::launch::Args;
use crate::cuda::matrix::{CudaMatrix, ScaleKind};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{self, Activation, LinearPart, Matrix};
use crate::{DType, Error, Mem, Result};

#[cfg(test)]
pub(super) use few::ORDERED_KERNEL;
pub(in crate::cuda) use few::{CLUSTER, CLUSTER_ARCHITECTURES};
pub(super) use few::{
    From, MATRIX_WORDS, Ordered, ROUTER_EXPERTS, RouterSums, X_CHUNK, hand_over, is_row_product,
    leave, ordered_bytes, product_bytes, router_sum_bytes, row_bytes, slot_bytes, warps, ways,
};

/// The one of its module that takes most of a multiprocessor.
pub(in crate::cuda) const CLUSTER_KERNEL: Kernel = few::CLUSTER_KERNELS[2];

/// Entry points of quantized products.
pub(crate) static KERNELS: &[Kernel] = &[
    few::BLOCK_X,
    few::BLOCK_X_F16,
    few::KERNELS[0],
    few::KERNELS[1],
    few::KERNELS[2],
    few::KERNELS[3],
    few::KERNELS[4],
    few::KERNELS[5],
    few::KERNELS[6],
    few::KERNELS[7],
    few::KERNELS[8],
    few::KERNELS[9],
    few::ORDERED_KERNEL,
    few::LONG_ROW_KERNELS[0],
    few::LONG_ROW_KERNELS[1],
    few::CLUSTER_KERNELS[0],
    few::CLUSTER_KERNELS[1],
    few::CLUSTER_KERNELS[2],
    few::CLUSTER_KERNELS[3],
    many::DEQUANT[0],
    many::DEQUANT[1],
    DEQUANT_F32[0],
    DEQUANT_F32[1],
];

const DEQUANT_F32: [Kernel; 2] = [
    Kernel::new("qgemm/dequant", "exl_dequant_f32_exl2"),
    Kernel::new("qgemm/dequant", "exl_dequant_f32_gptq"),
];

const KINDS: [ScaleKind; 2] = [ScaleKind::Codes, ScaleKind::Columns];

/// Parts that one launch takes.
const MAX_PARTS: usize = 3;

/// Index of a kernel's instance for a kind of matrix.
fn instance(kind: ScaleKind) -> usize {
    match kind {
        ScaleKind::Codes => 0,
        ScaleKind::Columns => 1,
    }
}

/// As the kernels number element types (cuda/common/types.cuh).
pub(super) fn dtype_code(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 1,
        DType::Bf16 => 2,
        _ => 0,
    }
}

/// As the kernels number activations.
pub(super) fn activation_code(act: Activation) -> usize {
    match act {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Sigmoid => 3,
        Activation::Relu2 => 4,
    }
}

pub(super) fn address(mem: &Option<Mem<'_>>) -> u64 {
    mem.as_ref().map_or(0, |m| m.as_ptr() as u64)
}

pub(super) fn bias_code(mem: &Option<Mem<'_>>) -> usize {
    mem.as_ref().map_or(0, |m| dtype_code(m.dtype()))
}

/// Where a matrix is, or an error for one that is not on the GPU.
enum Where<'a> {
    Dense(Mem<'a>),
    Quant(&'a CudaMatrix),
}

fn place<'a>(matrix: &Matrix<'a>) -> Result<Where<'a>> {
    match matrix {
        Matrix::Dense(mem) => Ok(Where::Dense(*mem)),
        Matrix::Cuda(m) => Ok(Where::Quant(m)),
        Matrix::Quant(_) => Err(Error::Unsupported {
            op: "linear",
            what: "a matrix packed for the CPU".to_owned(),
        }),
    }
}

pub(super) fn linear(
    o: &ops::Linear<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let x = o.x.as_ptr() as u64;
    let mut quant = Vec::new();
    for part in &o.parts {
        match place(&part.matrix)? {
            Where::Quant(m) => quant.push((m, part)),
            Where::Dense(mem) => gemm::dense_linear(
                list,
                &gemm::DenseLinear {
                    x,
                    rows: o.rows,
                    inputs: o.inputs,
                    weight: mem.as_ptr() as u64,
                    dtype: mem.dtype(),
                    bias: part.bias.as_ref().map(|b| (b.as_ptr() as u64, b.dtype())),
                    residual: part.residual.as_ref().map(|r| r.as_ptr() as u64),
                    out: part.out.as_mem().as_ptr() as u64,
                    outputs: part.outputs,
                },
                target.deterministic,
            ),
        }
    }
    for kind in KINDS {
        let same = quant.iter().filter(|(m, _)| m.kind() == kind);
        let same: Vec<_> = same.copied().collect();
        for parts in same.chunks(MAX_PARTS) {
            let matrices: Vec<&CudaMatrix> = parts.iter().map(|p| p.0).collect();
            match few::Config::new(&matrices, o.rows, false, target) {
                Some(config) => few::linear(&config, o, parts, target, list),
                None => many::linear(o, parts, target, list)?,
            }
        }
    }
    Ok(())
}

pub(super) fn gate_up(
    o: &ops::GateUp<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    match (place(&o.gate)?, place(&o.up)?) {
        (Where::Quant(gate), Where::Quant(up)) => {
            let config = if gate.kind() == up.kind() {
                few::Config::new(&[gate, up], o.rows, true, target)
            } else {
                None
            };
            match config {
                Some(config) => {
                    few::gate_up(&config, o, [gate, up], target, list);
                    Ok(())
                }
                None => many::gate_up(o, (gate, up), target, list),
            }
        }
        (Where::Dense(gate), Where::Dense(up)) if gate.dtype() == up.dtype() => {
            let bias = |b: &Option<Mem<'_>>| b.as_ref().map(|b| (b.as_ptr() as u64, b.dtype()));
            gemm::dense_gate_up(
                list,
                &gemm::DenseGateUp {
                    x: o.x.as_ptr() as u64,
                    rows: o.rows,
                    inputs: o.inputs,
                    gate: gate.as_ptr() as u64,
                    up: up.as_ptr() as u64,
                    dtype: gate.dtype(),
                    gate_bias: bias(&o.gate_bias),
                    up_bias: bias(&o.up_bias),
                    out: o.out.as_mem().as_ptr() as u64,
                    outputs: o.outputs,
                    act: o.act,
                },
            );
            Ok(())
        }
        _ => Err(Error::Unsupported {
            op: "gate_up",
            what: "gate and up of different formats".to_owned(),
        }),
    }
}

pub(super) fn dequant(
    o: &ops::Dequant<'_>,
    _target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let Matrix::Cuda(m) = o.matrix else {
        return Err(Error::Unsupported {
            op: "dequant",
            what: "a matrix that is not on the GPU".to_owned(),
        });
    };
    list.push(Launch {
        kernel: DEQUANT_F32[instance(m.kind())],
        grid: [(m.blocks() * m.columns()).div_ceil(8) as u32, 1, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .block(m.words())
            .ptr(o.out.as_mem().as_ptr() as u64)
            .int(m.outputs()),
    });
    Ok(())
}

/// Bytes of scratch for a linear layer.
pub(super) fn linear_scratch(o: &ops::Linear<'_>, props: &DeviceProps) -> u64 {
    let quant: Vec<&CudaMatrix> = o.parts.iter().filter_map(on_gpu).collect();
    if quant.is_empty() {
        return 0;
    }
    let few = KINDS.map(|kind| {
        let same = quant.iter().filter(|m| m.kind() == kind);
        let same: Vec<&CudaMatrix> = same.copied().collect();
        let groups = same.chunks(MAX_PARTS);
        groups
            .map(|parts| few::scratch(parts, o.rows, o.inputs))
            .max()
    });
    let few = few.into_iter().flatten().max();
    many::scratch(&quant, o.rows, false, props).max(few.unwrap_or(0))
}

fn on_gpu<'a>(part: &LinearPart<'a>) -> Option<&'a CudaMatrix> {
    match part.matrix {
        Matrix::Cuda(m) => Some(m),
        _ => None,
    }
}

/// Bytes of scratch for gate and up.
pub(super) fn gate_up_scratch(o: &ops::GateUp<'_>, props: &DeviceProps) -> u64 {
    match (o.gate, o.up) {
        (Matrix::Cuda(gate), Matrix::Cuda(up)) => {
            let few = few::scratch(&[gate, up], o.rows, o.inputs);
            // One row that is read in order while what becomes of it is left so.
            let left = ordered_bytes(o.rows, o.outputs);
            many::scratch(&[gate, up], o.rows, true, props).max(few + left as u64)
        }
        _ => 0,
    }
}
