//! The quantizer's ops (cuda/quant): long lists of launches, each small.

mod refine;
#[cfg(test)]
mod tests;

use super::Target;
use crate::cuda::launch::Args;
use crate::cuda::{Kernel, Launch};
use crate::ops::gptq::{FINALISTS, GRID, MAXIMA, maxima, panels, range, ratios};
use crate::ops::{Gptq, HessianFactor, HessianLoss};
use crate::{Error, Mem, MemMut, Result};

pub(super) use refine::{refine, refine_scratch};

const GATHER: Kernel = Kernel::new("quant/gptq", "exl_gptq_gather");
const ROUND: Kernel = Kernel::new("quant/gptq", "exl_gptq_round");
const UPDATE: Kernel = Kernel::new("quant/gptq", "exl_gptq_update");
const TABLE: Kernel = Kernel::new("quant/scales", "exl_gptq_table");
const JUDGE: Kernel = Kernel::new("quant/scales", "exl_gptq_judge");
const RANK: Kernel = Kernel::new("quant/scales", "exl_gptq_rank");
const EXACT: Kernel = Kernel::new("quant/scales", "exl_gptq_exact");
const FACTOR_LOAD: Kernel = Kernel::new("quant/factor", "exl_factor_load");
const FACTOR_DIAGONAL: Kernel = Kernel::new("quant/factor", "exl_factor_diagonal");
const FACTOR_PANEL: Kernel = Kernel::new("quant/factor", "exl_factor_panel");
const FACTOR_UPDATE: Kernel = Kernel::new("quant/factor", "exl_factor_update");
const FACTOR_STORE: Kernel = Kernel::new("quant/factor", "exl_factor_store");
const LOSS_TILES: Kernel = Kernel::new("quant/loss", "exl_loss_tiles");
const LOSS_SUM: Kernel = Kernel::new("quant/loss", "exl_loss_sum");

/// Entry points of this family.
pub(crate) static KERNELS: &[Kernel] = &[
    GATHER,
    ROUND,
    UPDATE,
    TABLE,
    JUDGE,
    RANK,
    EXACT,
    FACTOR_LOAD,
    FACTOR_DIAGONAL,
    FACTOR_PANEL,
    FACTOR_UPDATE,
    FACTOR_STORE,
    LOSS_TILES,
    LOSS_SUM,
    refine::LOAD,
    refine::BEGIN,
    refine::PULL,
    refine::SETTLE,
    refine::PASS,
];

const THREADS: u32 = 256;
/// Rows and columns of a tile of the products.
const TILE: usize = 64;
/// Columns of a block that rounds.
const COLUMNS: usize = 32;
/// Most blocks of the second dimension of a grid.
const MOST_TILES: usize = u16::MAX as usize;

fn at(mem: &Mem<'_>) -> u64 {
    mem.as_ptr() as u64
}

fn out(mem: &MemMut<'_>) -> u64 {
    at(&mem.as_mem())
}

fn push(list: &mut Vec<Launch>, kernel: Kernel, (x, y): (usize, usize), args: Args) {
    list.push(Launch {
        kernel,
        grid: [x as u32, y as u32, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
        args,
    });
}

/// Floats as words of a struct that is passed by value.
fn packed<const N: usize>(values: &[f32]) -> [u64; N] {
    std::array::from_fn(|i| {
        let bits = |at: usize| u64::from(values.get(at).copied().unwrap_or(0.0).to_bits());
        bits(2 * i) | bits(2 * i + 1) << 32
    })
}

/// Sizes beyond what the kernels count in 31 bits.
fn check_sizes(op: &'static str, sizes: &[usize]) -> Result<()> {
    match sizes.iter().find(|&&n| n > MOST_TILES * TILE) {
        None => Ok(()),
        Some(n) => Err(Error::Unsupported {
            op,
            what: format!("a size of {n}"),
        }),
    }
}

/// Parts of scratch memory, each aligned to 256 bytes.
#[derive(Default)]
struct Parts {
    next: u64,
}

impl Parts {
    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.next;
        self.next += (bytes as u64).next_multiple_of(256);
        at
    }
}

/// Bytes of scratch for a factor: the matrix in f64 and a block column of it.
pub(super) fn hessian_factor_scratch(o: &HessianFactor<'_>) -> u64 {
    factor_scratch(o.dim)
}

/// As [`hessian_factor_scratch`], from the size.
pub(crate) fn factor_scratch(dim: usize) -> u64 {
    let mut parts = Parts::default();
    parts.take(8 * dim * dim);
    parts.take(8 * dim * TILE);
    parts.next
}

pub(super) fn hessian_factor(
    o: &HessianFactor<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    let dim = o.dim;
    check_sizes("hessian_factor", &[dim])?;
    if dim == 0 {
        return Ok(());
    }
    let mut parts = Parts::default();
    let matrix = target.scratch.address + parts.take(8 * dim * dim);
    let panel = target.scratch.address + parts.take(8 * dim * TILE);
    let status = out(&o.status);
    let load = Args::new()
        .ptr(at(&o.h))
        .ptr(at(&o.order))
        .ptr(matrix)
        .ptr(status)
        .int(dim)
        .long(o.scale.to_bits())
        .long(o.lambda.to_bits());
    push(list, FACTOR_LOAD, (dim, 1), load);
    let tiles = dim.div_ceil(TILE);
    for block in 0..tiles {
        let first = block * TILE;
        let diagonal = Args::new().ptr(matrix).ptr(status).int(first).int(dim);
        push(list, FACTOR_DIAGONAL, (1, 1), diagonal);
        if tiles == 1 {
            break;
        }
        let both = Args::new().ptr(matrix).ptr(panel).int(first).int(dim);
        push(list, FACTOR_PANEL, (tiles, 1), both.clone());
        if block + 1 < tiles {
            push(list, FACTOR_UPDATE, (tiles, tiles - block - 1), both);
        }
    }
    let store = Args::new()
        .ptr(matrix)
        .ptr(out(&o.upper))
        .ptr(status)
        .int(dim);
    push(list, FACTOR_STORE, (dim, 1), store);
    Ok(())
}

/// Bytes of scratch for a loss: a sum of each tile.
pub(super) fn hessian_loss_scratch(o: &HessianLoss<'_>) -> u64 {
    let tiles = o.dim.div_ceil(TILE) * o.columns.div_ceil(TILE);
    Parts::default().next + (8 * tiles as u64).next_multiple_of(256)
}

pub(super) fn hessian_loss(
    o: &HessianLoss<'_>,
    target: &Target<'_>,
    list: &mut Vec<Launch>,
) -> Result<()> {
    check_sizes("hessian_loss", &[o.dim, o.columns])?;
    let tiles = (o.columns.div_ceil(TILE), o.dim.div_ceil(TILE));
    let sums = target.scratch.address;
    if tiles.0 * tiles.1 > 0 {
        let args = Args::new()
            .ptr(at(&o.h))
            .ptr(at(&o.a))
            .ptr(o.b.as_ref().map_or(0, at))
            .ptr(sums)
            .int(o.dim)
            .int(o.columns);
        push(list, LOSS_TILES, tiles, args);
    }
    let args = Args::new()
        .ptr(sums)
        .ptr(out(&o.out))
        .int(tiles.0 * tiles.1)
        .long(o.scale.to_bits());
    push(list, LOSS_SUM, (1, 1), args);
    Ok(())
}

/// Scratch memory of a [`Gptq`], as addresses.
struct Space {
    /// F32 `[inputs, outputs]`: rows in packed order with all compensation so far.
    w: u64,
    /// F32 `[rows of the largest panel, outputs]`.
    errors: u64,
    /// F32 `[GRID, outputs]`.
    table: u64,
    /// F32 `[outputs]` each.
    beta: u64,
    total: u64,
    best: u64,
    /// F32 `[blocks]`.
    widest: u64,
    /// F64 `[blocks, MAXIMA]`.
    judged: u64,
    /// F64 `[blocks, FINALISTS]`.
    exact: u64,
    /// U8 `[FINALISTS, outputs]`.
    found: u64,
    /// F32 `[FINALISTS + 2]`.
    finals: u64,
    end: u64,
}

impl Space {
    fn new(o: &Gptq<'_>, base: u64) -> Self {
        let (k, n) = (o.inputs, o.outputs);
        let blocks = n / COLUMNS;
        let rows = |p: &Vec<(usize, usize, u8)>| p.iter().map(|g| g.1 - g.0).sum::<usize>();
        let panel = panels(o.groups).iter().map(rows).max().unwrap_or(0);
        let mut parts = Parts { next: base };
        Self {
            w: parts.take(4 * k * n),
            errors: parts.take(4 * panel * n),
            table: parts.take(4 * GRID * n),
            beta: parts.take(4 * n),
            total: parts.take(4 * n),
            best: parts.take(4 * n),
            widest: parts.take(4 * blocks),
            judged: parts.take(8 * MAXIMA * blocks),
            exact: parts.take(8 * FINALISTS * blocks),
            found: parts.take(FINALISTS * n),
            finals: parts.take(4 * (FINALISTS + 2)),
            end: parts.next,
        }
    }
}

/// Bytes of scratch for rounding.
pub(super) fn gptq_scratch(o: &Gptq<'_>) -> u64 {
    Space::new(o, 0).end
}

pub(super) fn gptq(o: &Gptq<'_>, target: &Target<'_>, list: &mut Vec<Launch>) -> Result<()> {
    let (k, n) = (o.inputs, o.outputs);
    check_sizes("gptq", &[k, n])?;
    let space = Space::new(o, target.scratch.address);
    if k == 0 {
        return Ok(());
    }
    let gather = Args::new()
        .ptr(at(&o.weight))
        .ptr(at(&o.order))
        .ptr(space.w)
        .int(n);
    push(list, GATHER, (k, 1), gather);
    let mut index = 0;
    for panel in panels(o.groups) {
        let span = (panel[0].0, panel[panel.len() - 1].1);
        for group in panel {
            scales(o, &space, group, list);
            round(o, &space, (index, group), span, list);
            index += 1;
        }
        if span.1 < k {
            let args = Args::new()
                .ptr(space.w)
                .ptr(at(&o.upper))
                .ptr(space.errors)
                .int(span.0)
                .int(span.1)
                .int(k)
                .int(n);
            let grid = (n.div_ceil(TILE), (k - span.1).div_ceil(TILE));
            push(list, UPDATE, grid, args);
        }
    }
    Ok(())
}

/// Finds the three best maxima of a group and the codes of all columns for each.
fn scales(
    o: &Gptq<'_>,
    space: &Space,
    (first, end, bits): (usize, usize, u8),
    list: &mut Vec<Launch>,
) {
    let (k, n) = (o.inputs, o.outputs);
    let (rows, blocks) = (end - first, n / COLUMNS);
    // The group's rows, and the diagonal of U along them.
    let group = Args::new()
        .ptr(space.w + 4 * (first * n) as u64)
        .ptr(at(&o.upper) + 4 * (first * (k + 1)) as u64)
        .long(k as u64 + 1);
    let table = group
        .clone()
        .ptr(space.table)
        .ptr(space.beta)
        .ptr(space.total)
        .ptr(space.best)
        .ptr(space.widest)
        .int(rows)
        .int(n)
        .int(usize::from(bits))
        .block(&packed::<{ GRID.div_ceil(2) }>(&ratios(bits)));
    push(list, TABLE, (blocks, 1), table);
    let maxima = packed::<{ MAXIMA.div_ceil(2) }>(&maxima());
    let judge = Args::new()
        .ptr(space.table)
        .ptr(space.beta)
        .ptr(space.total)
        .ptr(space.best)
        .ptr(space.widest)
        .ptr(space.judged)
        .int(n)
        .float(range(bits).0)
        .float(range(bits).1)
        .block(&maxima);
    push(list, JUDGE, (blocks, 1), judge);
    let rank = Args::new()
        .ptr(space.widest)
        .ptr(space.judged)
        .ptr(space.finals)
        .int(blocks)
        .block(&maxima);
    push(list, RANK, (1, 1), rank);
    let exact = group
        .ptr(space.best)
        .ptr(space.finals)
        .ptr(space.found)
        .ptr(space.exact)
        .int(rows)
        .int(n)
        .int(usize::from(bits));
    push(list, EXACT, (blocks, 1), exact);
}

/// Rounds the group number `index` of a panel over the rows `panel`.
fn round(
    o: &Gptq<'_>,
    space: &Space,
    (index, (first, end, bits)): (usize, (usize, usize, u8)),
    panel: (usize, usize),
    list: &mut Vec<Launch>,
) {
    let n = o.outputs;
    let args = Args::new()
        .ptr(space.w)
        .ptr(at(&o.upper))
        .ptr(at(&o.order))
        .ptr(space.errors)
        .ptr(out(&o.codes))
        .ptr(out(&o.scale_codes) + (index * n) as u64)
        .ptr(out(&o.scale_max) + 4 * index as u64)
        .ptr(out(&o.decoded))
        .ptr(space.finals)
        .ptr(space.found)
        .ptr(space.exact)
        .int(first)
        .int(end - first)
        .int(panel.0)
        .int(panel.1)
        .int(o.inputs)
        .int(n)
        .int(usize::from(bits));
    push(list, ROUND, (n / COLUMNS, 1), args);
}
