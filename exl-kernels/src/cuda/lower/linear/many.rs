//! Many rows: the weights become 16-bit floats in scratch memory, a range of columns at a time,
//! and a dense product reads them.

mod blocked;

use super::super::gemm::{self, GemmF16, PrepareX, wgmma};
use super::{LinearPart, instance};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, TILE_COLUMNS};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops;
use crate::{Mem, Result};

pub(super) const DEQUANT: [Kernel; 2] = [
    Kernel::new("qgemm/dequant", "exl_dequant_f16_exl2"),
    Kernel::new("qgemm/dequant", "exl_dequant_f16_gptq"),
];

/// Weights in scratch memory at a time: large enough for full waves of the product.
const CHUNK_BYTES: usize = 192 << 20;
const ALIGN: usize = 256;

/// Regions of the scratch memory.
struct Regions {
    x: u64,
    weights: u64,
    gate: u64,
}

fn sizes(matrices: &[&CudaMatrix], rows: usize, gated: bool) -> [usize; 3] {
    let inputs = matrices.first().map_or(0, |m| m.inputs());
    let widest = matrices.iter().map(|m| chunk(m) * TILE_COLUMNS).max();
    let outputs = matrices.iter().map(|m| m.outputs()).max().unwrap_or(0);
    [
        (2 * rows * inputs).next_multiple_of(ALIGN),
        (2 * widest.unwrap_or(0) * inputs).next_multiple_of(ALIGN),
        if gated { 4 * rows * outputs } else { 0 },
    ]
}

/// Column tiles of a matrix that are expanded at a time.
fn chunk(m: &CudaMatrix) -> usize {
    let column = 2 * TILE_COLUMNS * m.inputs();
    (CHUNK_BYTES / column).clamp(1, m.columns())
}

/// Bytes of scratch.
pub(super) fn scratch(
    matrices: &[&CudaMatrix],
    rows: usize,
    gated: bool,
    props: &DeviceProps,
) -> u64 {
    if matrices.is_empty() {
        return 0;
    }
    if wgmma::available(props) && (!gated || blocked::fuses(matrices[0], matrices[1])) {
        return blocked::scratch(matrices, rows, gated, props);
    }
    sizes(matrices, rows, gated).iter().sum::<usize>() as u64
}

fn regions(matrices: &[&CudaMatrix], rows: usize, gated: bool, target: &Target<'_>) -> Regions {
    let [x, weights, _] = sizes(matrices, rows, gated);
    let base = target.scratch.address;
    Regions {
        x: base,
        weights: base + x as u64,
        gate: base + (x + weights) as u64,
    }
}

fn typed(mem: &Option<Mem<'_>>) -> Option<(u64, crate::DType)> {
    mem.as_ref().map(|m| (m.as_ptr() as u64, m.dtype()))
}

fn prepare(list: &mut Vec<Launch>, x: u64, m: &CudaMatrix, rows: usize, out: u64) {
    let args = PrepareX {
        x,
        perm: m.perm(),
        out,
        rows,
        k: m.inputs(),
        blocked: false,
    };
    gemm::prepare_x(list, &args);
}

/// Expands column tiles of a matrix.
fn dequant(m: &CudaMatrix, columns: usize, args: Args) -> Launch {
    Launch {
        kernel: DEQUANT[instance(m.kind())],
        grid: [(m.blocks() * columns).div_ceil(8) as u32, 1, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
        args,
    }
}

/// One matrix: expand and multiply chunk by chunk. `product` is complete but for the weights'
/// address and the columns; its other addresses are those of column 0.
fn product(
    m: &CudaMatrix,
    product: &GemmF16,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let step = chunk(m);
    for first in (0..m.columns()).step_by(step) {
        let columns = step.min(m.columns() - first);
        let column = first * TILE_COLUMNS;
        if column >= product.n_out {
            break;
        }
        let args = Args::new()
            .block(m.words())
            .ptr(product.b)
            .int(first)
            .int(columns);
        // Row by row, not in blocks.
        let args = [0; 4].into_iter().fold(args, Args::int);
        list.push(dequant(m, columns, args));
        let floats = |address: u64| address + 4 * column as u64;
        let part = GemmF16 {
            out: floats(product.out),
            bias: product
                .bias
                .map(|(at, dtype)| (at + (dtype.bytes() * column) as u64, dtype)),
            residual: product.residual.map(floats),
            gate: product.gate.map(|(at, act)| (floats(at), act)),
            n: columns * TILE_COLUMNS,
            n_out: (columns * TILE_COLUMNS).min(product.n_out - column),
            ..*product
        };
        gemm::gemm_f16(list, target, &part)?;
    }
    Ok(())
}

pub(super) fn linear(
    o: &ops::Linear<'_>,
    parts: &[(&CudaMatrix, &LinearPart<'_>)],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    if wgmma::available(target.props) {
        blocked::linear(o, parts, target, list);
        return Ok(());
    }
    let matrices: Vec<&CudaMatrix> = parts.iter().map(|p| p.0).collect();
    let at = regions(&matrices, o.rows, false, target);
    let mut prepared = None;
    for (m, part) in parts {
        if prepared != Some(m.perm()) {
            prepare(list, o.x.as_ptr() as u64, m, o.rows, at.x);
            prepared = Some(m.perm());
        }
        let whole = GemmF16 {
            a: at.x,
            b: at.weights,
            out: part.out.as_mem().as_ptr() as u64,
            bias: typed(&part.bias),
            residual: part.residual.as_ref().map(|r| r.as_ptr() as u64),
            gate: None,
            rows: o.rows,
            n: m.outputs(),
            n_out: part.outputs,
            ld_out: part.outputs,
            k: o.inputs,
        };
        product(m, &whole, target, list)?;
    }
    Ok(())
}

pub(super) fn gate_up(
    o: &ops::GateUp<'_>,
    (gate, up): (&CudaMatrix, &CudaMatrix),
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    if wgmma::available(target.props) && blocked::fuses(gate, up) {
        blocked::gate_up(o, (gate, up), target, list);
        return Ok(());
    }
    let at = regions(&[gate, up], o.rows, true, target);
    let x = o.x.as_ptr() as u64;
    prepare(list, x, gate, o.rows, at.x);
    let first = GemmF16 {
        a: at.x,
        b: at.weights,
        out: at.gate,
        bias: typed(&o.gate_bias),
        residual: None,
        gate: None,
        rows: o.rows,
        n: gate.outputs(),
        n_out: o.outputs,
        ld_out: o.outputs,
        k: o.inputs,
    };
    product(gate, &first, target, list)?;
    if up.perm() != gate.perm() {
        prepare(list, x, up, o.rows, at.x);
    }
    let second = GemmF16 {
        out: o.out.as_mem().as_ptr() as u64,
        bias: typed(&o.up_bias),
        gate: Some((at.gate, o.act)),
        n: up.outputs(),
        ..first
    };
    product(up, &second, target, list)
}
