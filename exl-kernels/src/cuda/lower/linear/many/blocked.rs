//! Many rows where warpgroups multiply: both operands in blocks, all parts with one input in one
//! product, gate and up with their activation.

use super::super::super::gemm::wgmma::{self, PARTS, Part, Product, Tile};
use super::super::super::gemm::{PrepareX, prepare_x};
use super::super::LinearPart;
use super::{ALIGN, dequant, typed};
use crate::cuda::launch::Args;
use crate::cuda::lower::Target;
use crate::cuda::matrix::{CudaMatrix, TILE_COLUMNS};
use crate::cuda::{DeviceProps, Launch};
use crate::ops::{self, Activation};

/// Most bytes of weights in scratch memory at a time, unless that is too little to keep the GPU busy with
/// a prompt of 512 tokens.
const CHUNK_BYTES: usize = 96 << 20;

/// Whether gate and up can be one product.
pub(super) fn fuses(gate: &CudaMatrix, up: &CudaMatrix) -> bool {
    gate.perm() == up.perm()
}

/// A matrix and what becomes of its product.
struct Source<'a> {
    matrix: &'a CudaMatrix,
    /// Gate's is followed by up.
    other: Option<&'a CudaMatrix>,
    part: Part,
}

/// How a product is cut.
struct Cut {
    tile: Tile,
    /// Columns of one matrix in a tile.
    width: usize,
    /// Tiles at a time.
    chunk: usize,
}

impl Cut {
    /// For matrices with these numbers of outputs.
    fn new(
        rows: usize,
        inputs: usize,
        outputs: &[usize],
        gated: bool,
        props: &DeviceProps,
    ) -> Self {
        let each = if gated { 2 } else { 1 };
        let widths: Vec<usize> = outputs.iter().map(|n| each * n).collect();
        let tile = Tile::fastest(rows, &widths, props);
        let width = tile.columns() / each;
        let tiles = outputs.iter().map(|n| n.div_ceil(width)).sum();
        let most = CHUNK_BYTES / wgmma::operand_bytes(tile.columns(), inputs);
        let most = most.max(props.sms as usize / 4).clamp(1, tiles);
        let waves = |chunk: usize| {
            let last = tiles % chunk;
            let rest = if last > 0 {
                tile.waves(rows, last, props)
            } else {
                0
            };
            tiles / chunk * tile.waves(rows, chunk, props) + rest
        };
        // The fewest waves, then the fewest chunks.
        let chunk = (most.div_ceil(2)..=most).rev().min_by_key(|&c| waves(c));
        Self {
            tile,
            width,
            chunk: chunk.unwrap_or(most),
        }
    }

    fn weight_bytes(&self, inputs: usize) -> usize {
        wgmma::operand_bytes(self.chunk * self.tile.columns(), inputs)
    }
}

/// Bytes of scratch for matrices of which any may be computed together.
pub(super) fn scratch(
    matrices: &[&CudaMatrix],
    rows: usize,
    gated: bool,
    props: &DeviceProps,
) -> u64 {
    let inputs = matrices.first().map_or(0, |m| m.inputs());
    // Matrices that do not share their order are computed one by one.
    let outputs: Vec<usize> = matrices.iter().map(|m| m.outputs()).collect();
    let sets = if gated {
        vec![&outputs[..1]]
    } else {
        subsets(&outputs)
    };
    let bytes = |set: &[usize]| Cut::new(rows, inputs, set, gated, props).weight_bytes(inputs);
    let weights = sets.into_iter().map(bytes).max().unwrap_or(0);
    (x_bytes(rows, inputs) + weights) as u64
}

/// All runs of neighbours of at most [`PARTS`].
fn subsets(outputs: &[usize]) -> Vec<&[usize]> {
    let sizes = 1..=outputs.len().min(PARTS);
    sizes.flat_map(|n| outputs.windows(n)).collect()
}

fn x_bytes(rows: usize, inputs: usize) -> usize {
    wgmma::operand_bytes(rows, inputs).next_multiple_of(ALIGN)
}

pub(super) fn linear(
    o: &ops::Linear<'_>,
    parts: &[(&CudaMatrix, &LinearPart<'_>)],
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let same = parts.chunk_by(|a, b| a.0.perm() == b.0.perm());
    for parts in same.flat_map(|run| run.chunks(PARTS)) {
        let sources = parts.iter().map(|&(matrix, part)| Source {
            matrix,
            other: None,
            part: Part {
                out: part.out.as_mem().as_ptr() as u64,
                bias: typed(&part.bias),
                other_bias: None,
                residual: part.residual.as_ref().map(|r| r.as_ptr() as u64),
                n: part.outputs,
                stride: part.outputs,
                tiles: 0,
            },
        });
        let sources: Vec<Source<'_>> = sources.collect();
        whole(&sources, (o.x.as_ptr() as u64, o.rows), None, target, list);
    }
}

pub(super) fn gate_up(
    o: &ops::GateUp<'_>,
    (gate, up): (&CudaMatrix, &CudaMatrix),
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let source = Source {
        matrix: gate,
        other: Some(up),
        part: Part {
            out: o.out.as_mem().as_ptr() as u64,
            bias: typed(&o.gate_bias),
            other_bias: typed(&o.up_bias),
            residual: None,
            n: o.outputs,
            stride: o.outputs,
            tiles: 0,
        },
    };
    let x = (o.x.as_ptr() as u64, o.rows);
    whole(&[source], x, Some(o.act), target, list);
}

/// Prepares x, then expands and multiplies chunk by chunk.
fn whole(
    sources: &[Source<'_>],
    (x, rows): (u64, usize),
    act: Option<Activation>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) {
    let inputs = sources[0].matrix.inputs();
    let outputs: Vec<usize> = sources.iter().map(|s| s.matrix.outputs()).collect();
    let cut = Cut::new(rows, inputs, &outputs, act.is_some(), target.props);
    let a = target.scratch.address;
    let b = a + x_bytes(rows, inputs) as u64;
    prepare_x(
        list,
        &PrepareX {
            x,
            perm: sources[0].matrix.perm(),
            out: a,
            rows,
            k: inputs,
            blocked: true,
        },
    );
    let tiles = |s: &Source<'_>| s.part.n.div_ceil(cut.width);
    let all: usize = sources.iter().map(tiles).sum();
    for first in (0..all).step_by(cut.chunk) {
        let end = all.min(first + cut.chunk);
        let (mut begin, mut parts) = (0, Vec::new());
        for source in sources {
            let (from, to) = (first.max(begin), end.min(begin + tiles(source)));
            if from < to {
                let at = Range {
                    first: from - begin,
                    tiles: to - from,
                    place: from - first,
                };
                parts.push(at.expand(source, &cut, b, list));
            }
            begin += tiles(source);
        }
        let product = Product {
            a,
            b,
            rows,
            k: inputs,
            parts: &parts,
            act,
        };
        wgmma::product(list, target.props, cut.tile, &product);
    }
}

/// Tiles of one output.
struct Range {
    first: usize,
    tiles: usize,
    /// The first one's in the chunk.
    place: usize,
}

impl Range {
    /// Appends the launches that expand the weights; gives what the product does with them.
    fn expand(&self, source: &Source<'_>, cut: &Cut, b: u64, list: &mut Vec<Launch>) -> Part {
        let column = self.first * cut.width;
        let matrices = [Some(source.matrix), source.other];
        for (turn, m) in matrices.into_iter().flatten().enumerate() {
            let first = column / TILE_COLUMNS;
            let last = (column + self.tiles * cut.width) / TILE_COLUMNS;
            let columns = last.min(m.columns()) - first;
            let args = Args::new()
                .block(m.words())
                .ptr(b)
                .int(first)
                .int(columns)
                .int(wgmma::blocks(m.inputs()))
                .int(self.place * cut.tile.columns() + turn * cut.width)
                .int(cut.width)
                .int(cut.tile.columns());
            list.push(dequant(m, columns, args));
        }
        let floats = |at: u64| at + 4 * column as u64;
        let typed = |bias: Option<(u64, crate::DType)>| {
            bias.map(|(at, dtype)| (at + (dtype.bytes() * column) as u64, dtype))
        };
        Part {
            out: floats(source.part.out),
            bias: typed(source.part.bias),
            other_bias: typed(source.part.other_bias),
            residual: source.part.residual.map(floats),
            n: (source.part.n - column).min(self.tiles * cut.width),
            stride: source.part.stride,
            tiles: self.tiles,
        }
    }
}
