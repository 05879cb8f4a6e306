//! Mixture of experts: which rows an expert has is known on the GPU alone, so launches are made for any
//! choice of experts.
//!
//! The address of every expert's matrix lies in a table in device memory ([`Args::with_table`]); kernels
//! read the experts of the rows and look there. For one row and few experts the table has the matrices' descriptors
//! themselves, which a launch needs before anything else. Experts may differ in format: then each format has
//! launches of its own, with a table that has no others.

mod dense;
mod few;
mod router;
mod sort;
mod sum;
mod tile;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::few::Few;
use self::sort::Space;
use self::tile::Tile;
use super::linear::{MATRIX_WORDS, activation_code, ordered_bytes, router_sum_bytes};
use super::{COUNTERS, Target};
use crate::cuda::launch::Args;
use crate::cuda::matrix::{CudaMatrix, SHARES, ScaleKind};
use crate::cuda::{DeviceProps, Kernel, Launch};
use crate::ops::{Matrix, MoeDown, MoeGateUp, MoeRoute};
use crate::{DType, Error, Result};

pub(super) use few::link;
pub(super) use router::{fuse, routed};
pub(super) use sum::{leave, take_sums};
#[cfg(test)]
pub(super) use {
    router::{ROUTED, ROUTERS},
    sum::SUM_NORM,
};

/// Most experts of a layer (cuda/moe/experts.cuh).
const MOST_EXPERTS: usize = 1024;
/// Most row slots of one pass over the experts, where rows could be multiplied in passes.
const PASS_SLOTS: usize = 4096;
const ALIGN: usize = 256;

const ROUTE: [(usize, Kernel); 3] = [
    (32, Kernel::new("moe/route", "exl_moe_route_1")),
    (256, Kernel::new("moe/route", "exl_moe_route_8")),
    (MOST_EXPERTS, Kernel::new("moe/route", "exl_moe_route_32")),
];
/// Rows of a block, one per warp.
const ROUTE_ROWS: usize = 4;

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    ROUTE[0].1,
    ROUTE[1].1,
    ROUTE[2].1,
    router::ROUTERS[0],
    router::ROUTERS[1],
    router::ROUTERS[2],
    router::ROUTERS[3],
    sum::SUM_NORM[0],
    sum::SUM_NORM[1],
    sum::SUM_NORM[2],
    sum::SUM_NORM[3],
    sort::SORT,
    sort::COMBINE,
    few::BLOCK_X,
    few::ROW[0],
    few::ROW[1],
    router::ROUTED,
    few::ROW_ADD,
    few::ROW_ADD_SPLIT,
    few::ROWS[0].1[0],
    few::ROWS[0].1[1],
    few::ROWS[1].1[0],
    few::ROWS[1].1[1],
    few::ROWS[2].1[0],
    few::ROWS[2].1[1],
    tile::BLOCK_X[0],
    tile::BLOCK_X[1],
    tile::GROUPS[0].1[0],
    tile::GROUPS[0].1[1],
    tile::GROUPS[1].1[0],
    tile::GROUPS[1].1[1],
    tile::TILES[0].1[0],
    tile::TILES[0].1[1],
    tile::TILES[1].1[0],
    tile::TILES[1].1[1],
    tile::TILES[2].1[0],
    tile::TILES[2].1[1],
    dense::DENSE[0],
    dense::DENSE[1],
    dense::DENSE[2],
    dense::GATE_UP[0],
    dense::GATE_UP[1],
    dense::GATE_UP[2],
];

/// Whether a kernel chooses experts.
fn is_route(kernel: Kernel) -> bool {
    ROUTE.iter().any(|(_, route)| *route == kernel) || router::is_router(kernel)
}

fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

/// The halves of [`pair`].
fn unpair(word: u64) -> [u64; 2] {
    [word & 0xffff_ffff, word >> 32]
}

fn unsupported<T>(op: &'static str, what: impl Into<String>) -> Result<T> {
    let what = what.into();
    Err(Error::Unsupported { op, what })
}

pub(super) fn route(o: &MoeRoute<'_>, _: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
    let Some((_, kernel)) = ROUTE.into_iter().find(|(most, _)| o.experts <= *most) else {
        return unsupported("moe_route", format!("{} experts", o.experts));
    };
    if o.rows == 0 {
        return Ok(());
    }
    list.push(Launch {
        kernel,
        grid: [o.rows.div_ceil(ROUTE_ROWS) as u32, 1, 1],
        block: [32 * ROUTE_ROWS as u32, 1, 1],
        shared_bytes: 0,
        args: Args::new()
            .ptr(o.logits.as_ptr() as u64)
            .ptr(o.ids.as_mem().as_ptr() as u64)
            .ptr(o.weights.as_mem().as_ptr() as u64)
            .int(o.rows)
            .int(o.experts)
            .int(o.top_k)
            .float(o.norm.exponent().unwrap_or(0.0)),
    });
    Ok(())
}

/// A format that kernels are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Quant(ScaleKind),
    Dense(DType),
}

/// The experts of one format.
#[derive(Debug)]
struct Format {
    kind: Kind,
    /// `[experts, parts]`: addresses of matrices, 0 for those of another format.
    table: Arc<[u64]>,
    /// The same with the words of their descriptors, where there are few: for one row.
    records: Option<Arc<[u64]>>,
    /// Orders that the inputs of an expert have, at most.
    orders: usize,
    /// Most blocks of rows of any matrix that one of [`few::SPLIT`] thread blocks has.
    slice: usize,
}

impl Format {
    /// Launches a kernel whose one parameter is a struct that begins with the table's address.
    fn launch(&self, kernel: Kernel, grid: usize, threads: usize, task: &[u64]) -> Launch {
        Launch {
            kernel,
            grid: [grid as u32, 1, 1],
            block: [threads as u32, 1, 1],
            shared_bytes: 0,
            args: Args::new().block(task).with_table(self.table.clone()),
        }
    }
}

/// What multiplies the rows of a layer, or some of them.
#[derive(Clone, Copy, Debug)]
struct Layer<'f> {
    formats: &'f [Format],
    x: u64,
    /// The row of slot `s` is row `s / by` of x.
    by: usize,
    ids: u64,
    out: u64,
    rows: usize,
    top_k: usize,
    experts: usize,
    inputs: usize,
    outputs: usize,
    /// Of gate and up; one matrix without.
    act: Option<usize>,
}

/// What is done with the outputs of the experts.
#[derive(Clone, Copy, Debug)]
struct Sum {
    weights: u64,
    residual: u64,
    out: u64,
}

/// How one format's products are made.
enum Way {
    Few(Few),
    Tile(Tile),
    Dense,
}

/// Every format of experts, each a list of matrices with one input.
fn formats<'m>(
    op: &'static str,
    experts: usize,
    parts: usize,
    matrix: impl Fn(usize, usize) -> Matrix<'m>,
) -> Result<Vec<Format>> {
    if experts > MOST_EXPERTS {
        return unsupported(op, format!("{experts} experts"));
    }
    // By format: addresses, words, orders, slice.
    let mut found: Vec<(Kind, [Vec<u64>; 2], usize, usize)> = Vec::new();
    let staged = experts * parts <= few::MOST_STAGED;
    for e in 0..experts {
        let own = (0..parts).map(|p| locate(op, matrix(e, p)));
        let own = own.collect::<Result<Vec<_>>>()?;
        let kind = own[0].0;
        if own.iter().any(|o| o.0 != kind) {
            return unsupported(op, "gate and up of different formats");
        }
        let at = found.iter().position(|f| f.0 == kind).unwrap_or_else(|| {
            let words = experts * parts * MATRIX_WORDS;
            found.push((kind, [vec![0; experts * parts], vec![0; words]], 1, 0));
            found.len() - 1
        });
        let (_, [table, records], orders, slice) = &mut found[at];
        for (p, (_, address, order)) in own.iter().enumerate() {
            let i = e * parts + p;
            table[i] = *address;
            if let Matrix::Cuda(m) = matrix(e, p) {
                records[i * MATRIX_WORDS..][..MATRIX_WORDS].copy_from_slice(m.words());
            }
            *slice = (*slice).max(slice_of(matrix(e, p)));
            if *order != own[0].2 {
                *orders = parts;
            }
        }
    }
    let formats = found
        .into_iter()
        .map(|(kind, [table, records], orders, slice)| Format {
            kind,
            table: table.into(),
            records: (staged && matches!(kind, Kind::Quant(_))).then(|| records.into()),
            orders,
            slice,
        });
    Ok(formats.collect())
}

/// Most blocks of rows that one of [`few::SPLIT`] thread blocks has.
fn slice_of(matrix: Matrix<'_>) -> usize {
    let Matrix::Cuda(m) = matrix else { return 0 };
    let bounds = m.shares().iter().step_by(SHARES / few::SPLIT);
    let bounds: Vec<usize> = bounds.map(|&b| usize::from(b)).collect();
    let slices = bounds.windows(2).map(|b| b[1] - b[0]);
    slices.max().unwrap_or(0)
}

/// A matrix's format, where kernels find it, and what tells the order of its input.
fn locate(op: &'static str, matrix: Matrix<'_>) -> Result<(Kind, u64, u64)> {
    match matrix {
        Matrix::Dense(mem) => Ok((Kind::Dense(mem.dtype()), mem.as_ptr() as u64, 0)),
        Matrix::Cuda(m) => Ok((Kind::Quant(m.kind()), CudaMatrix::address(m), m.perm())),
        Matrix::Quant(_) => unsupported(op, "a matrix packed for the CPU"),
    }
}

impl Layer<'_> {
    fn slots(&self) -> usize {
        self.rows * self.top_k
    }

    fn parts(&self) -> usize {
        if self.act.is_some() { 2 } else { 1 }
    }

    /// Rows of an expert on average, rounded up.
    fn average(&self) -> usize {
        self.slots().div_ceil(self.experts)
    }

    /// Most segments of at most so many rows.
    fn segments(&self, rows: usize) -> usize {
        self.slots() / rows + self.experts.min(self.slots())
    }

    fn way(&self, format: &Format, props: &DeviceProps, deterministic: bool) -> Result<Way> {
        let kind = match format.kind {
            Kind::Dense(_) => return Ok(Way::Dense),
            Kind::Quant(kind) => kind,
        };
        // The products of few rows give each row the same, whatever the others are.
        let many = !deterministic && self.average() > few::MOST_AVERAGE;
        if let Some(tile) = Tile::new(self, format, kind, props).filter(|_| many) {
            return Ok(Way::Tile(tile));
        }
        match Few::new(self, format, kind, (props, deterministic)) {
            Some(few) => Ok(Way::Few(few)),
            None => unsupported("a product of experts", format!("{} inputs", self.inputs)),
        }
    }

    /// How rows are multiplied, and how many at a time.
    fn passes(
        &self,
        format: &Format,
        props: &DeviceProps,
        deterministic: bool,
    ) -> Result<(Way, usize)> {
        let way = self.way(format, props, deterministic)?;
        let rows = PASS_SLOTS / self.top_k;
        match way {
            Way::Few(_) if rows < self.rows => {
                let some = self.some(0, rows.max(1));
                Ok((some.way(format, props, true)?, some.rows))
            }
            way => Ok((way, self.rows)),
        }
    }

    /// Rows from `first` on, `rows` of them at most.
    fn some(&self, first: usize, rows: usize) -> Self {
        let slots = first * self.top_k;
        Self {
            x: self.x + 4 * (slots / self.by * self.inputs) as u64,
            ids: self.ids + 4 * slots as u64,
            out: self.out + 4 * (slots * self.outputs) as u64,
            rows: rows.min(self.rows - first),
            ..*self
        }
    }

    /// Bytes of scratch behind the outputs.
    fn scratch(&self, props: &DeviceProps, deterministic: bool) -> usize {
        let of = |format: &Format| {
            let (way, rows) = self.passes(format, props, deterministic).ok()?;
            let pass = self.some(0, rows);
            Some(Space::bytes(&pass, way.segment_rows()) + way.input_bytes(&pass, format))
        };
        self.formats.iter().filter_map(of).max().unwrap_or(0)
    }

    /// Appends the products, with scratch memory from `scratch` on.
    fn lower(&self, scratch: u64, target: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
        for format in self.formats {
            let (way, rows) = self.passes(format, target.props, target.deterministic)?;
            for first in (0..self.rows).step_by(rows.max(1)) {
                way.lower(&self.some(first, rows), format, scratch, (target, list));
            }
        }
        Ok(())
    }
}

impl Way {
    /// Most rows of a segment.
    fn segment_rows(&self) -> usize {
        match self {
            Way::Few(few) => few.rows,
            Way::Tile(tile) => tile.rows,
            Way::Dense => dense::ROWS,
        }
    }

    /// Bytes of prepared inputs.
    fn input_bytes(&self, layer: &Layer<'_>, format: &Format) -> usize {
        let bytes = match self {
            Way::Few(few) => few.input_bytes(layer, format),
            Way::Tile(tile) => tile.input_bytes(layer, format),
            Way::Dense => 0,
        };
        bytes.next_multiple_of(ALIGN)
    }

    fn lower(
        &self,
        layer: &Layer<'_>,
        format: &Format,
        scratch: u64,
        (target, list): (&Target<'_>, &mut Vec<Launch>),
    ) {
        if let Way::Few(few) = self
            && few.is_row()
        {
            return few.row(layer, format, None, (target, list));
        }
        let space = Space::new(layer, self.segment_rows(), scratch);
        space.sort(layer, list);
        match self {
            Way::Few(few) => few.rows(layer, format, &space, (target, list)),
            Way::Tile(tile) => tile.lower(layer, format, &space, (target, list)),
            Way::Dense => dense::lower(layer, format, &space, list),
        }
    }
}

fn gate_up_formats(o: &MoeGateUp<'_>) -> Result<Vec<Format>> {
    formats("moe_gate_up", o.experts.len(), 2, |e, part| {
        let (gate, up) = o.experts[e];
        if part == 0 { gate } else { up }
    })
}

fn gate_up_layer<'f>(o: &MoeGateUp<'_>, formats: &'f [Format]) -> Layer<'f> {
    Layer {
        formats,
        x: o.x.as_ptr() as u64,
        by: o.top_k,
        ids: o.ids.as_ptr() as u64,
        out: o.out.as_mem().as_ptr() as u64,
        rows: o.rows,
        top_k: o.top_k,
        experts: o.experts.len(),
        inputs: o.inputs,
        outputs: o.outputs,
        act: Some(activation_code(o.act)),
    }
}

pub(super) fn gate_up(
    o: &MoeGateUp<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let formats = gate_up_formats(o)?;
    gate_up_layer(o, &formats).lower(target.scratch.address, target, list)
}

fn down_formats(o: &MoeDown<'_>) -> Result<Vec<Format>> {
    formats("moe_down", o.experts.len(), 1, |e, _| o.experts[e])
}

/// The outputs of all slots lie in scratch memory.
fn down_layer<'f>(o: &MoeDown<'_>, formats: &'f [Format], scratch: u64) -> Layer<'f> {
    Layer {
        formats,
        x: o.x.as_ptr() as u64,
        by: 1,
        ids: o.ids.as_ptr() as u64,
        out: scratch,
        rows: o.rows,
        top_k: o.top_k,
        experts: o.experts.len(),
        inputs: o.inputs,
        outputs: o.outputs,
        act: None,
    }
}

/// Bytes of the outputs of all slots, of one row those of all thread blocks that divide them.
fn output_bytes(o: &MoeDown<'_>) -> usize {
    let parts = if o.rows == 1 { few::SPLIT } else { 1 };
    (4 * o.rows * o.top_k * parts * o.outputs).next_multiple_of(ALIGN)
}

pub(super) fn down(o: &MoeDown<'_>, target: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
    let formats = down_formats(o)?;
    let scratch = target.scratch.address;
    let layer = down_layer(o, &formats, scratch);
    let sum = Sum {
        weights: o.weights.as_ptr() as u64,
        residual: o.residual.as_ref().map_or(0, |r| r.as_ptr() as u64),
        out: o.out.as_mem().as_ptr() as u64,
    };
    if let [format] = &formats[..]
        && format.kind == Kind::Quant(ScaleKind::Codes)
        && o.outputs.div_ceil(32) <= COUNTERS
        && let Way::Few(few) = layer.way(format, target.props, target.deterministic)?
        && few.is_row()
    {
        let few = Few::split(&layer, format, target.props).unwrap_or(few);
        few.row(&layer, format, Some(&sum), (target, list));
        return Ok(());
    }
    layer.lower(scratch + output_bytes(o) as u64, target, list)?;
    sort::combine(&layer, &sum, list);
    Ok(())
}

/// Bytes of scratch for gate and up.
pub(super) fn gate_up_scratch(o: &MoeGateUp<'_>, props: &DeviceProps) -> u64 {
    let Ok(formats) = gate_up_formats(o) else {
        return 0;
    };
    let layer = gate_up_layer(o, &formats);
    let ways = [false, true].map(|fixed| layer.scratch(props, fixed));
    ways.into_iter().max().unwrap_or(0) as u64
}

/// Bytes of scratch for down.
pub(super) fn down_scratch(o: &MoeDown<'_>, props: &DeviceProps) -> u64 {
    let Ok(formats) = down_formats(o) else {
        return 0;
    };
    let layer = down_layer(o, &formats, 0);
    let ways = [false, true].map(|fixed| layer.scratch(props, fixed));
    // Of one row its inputs in the order of the matrices (few.rs: order), and behind them what a product in front of
    // the router leaves (router.rs: routed).
    let ordered = if o.rows == 1 {
        (4 * o.top_k * o.inputs).next_multiple_of(ALIGN) + router_sum_bytes(o.outputs)
    } else {
        0
    };
    // And behind that, what the norm of the sum leaves (sum.rs: leave).
    let behind = ordered_bytes(o.rows, o.outputs);
    (output_bytes(o) + ways.into_iter().max().unwrap_or(0).max(ordered) + behind) as u64
}

/// Bytes of the tables that launches of an op with any number of rows keep in device memory, each in a region of its
/// own.
fn table_bytes(formats: Result<Vec<Format>>, records: fn(usize) -> usize) -> u64 {
    let bytes = |words: usize| (8 * words).next_multiple_of(ALIGN) as u64;
    let own = |f: &Format| f.records.as_ref().map_or(0, |r| bytes(records(r.len())));
    let both = |f: &Format| bytes(f.table.len()) + own(f);
    formats.map_or(0, |formats| formats.iter().map(both).sum())
}

/// [`table_bytes`] of gate and up, with the records of down behind their own (few.rs: order).
pub(super) fn gate_up_tables(o: &MoeGateUp<'_>) -> u64 {
    table_bytes(gate_up_formats(o), |own| own + own / 2)
}

/// [`table_bytes`] of down.
pub(super) fn down_tables(o: &MoeDown<'_>) -> u64 {
    table_bytes(down_formats(o), |own| own)
}
