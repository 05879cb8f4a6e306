//! `Linear` and `GateUp`: columns in chunks over the threads, rows in blocks that fit L2.
//!
//! Matrices that agree in permutation and group sizes share their prepared activations, and all
//! matrices of an op share one parallel region.

mod experts;

use std::ops::Range;

use super::dense::{self, Dense};
use super::qgemm::{self, CHUNK, Input, Product, Rows};
use super::{Cpu, Isa};
use crate::ops::{GateUp, Linear, LinearPart, Matrix};
use crate::quant::PANEL;
use crate::{Error, Mem, QuantMatrix, Result};
pub(super) use experts::{down as moe_down, down_words as moe_down_words};
pub(super) use experts::{gate_up as moe_gate_up, gate_up_words as moe_gate_up_words};

/// Tiles of a block of rows: their activations and the accumulator stay in L2 while columns go by.
const BLOCK_TILES: usize = 32;
/// Rows up to which an op has more to gain from even shares than from wide ones.
const FEW_ROWS: usize = 4;
/// Parts of a linear op that run in one parallel region: q, k and v, and one to spare.
const FUSED: usize = 4;

/// A matrix with its input prepared.
enum Source<'a> {
    Dense {
        w: Dense<'a>,
        x: &'a [f32],
        inputs: usize,
    },
    Quant(Product<'a>),
}

/// A bias or residual in any float type.
struct Vector<'a>(Option<Dense<'a>>);

impl<'a> Vector<'a> {
    fn new(mem: &Option<Mem<'a>>) -> Result<Self> {
        mem.as_ref().map(Dense::new).transpose().map(Self)
    }

    fn add_to(&self, first: usize, row: &mut [f32], isa: Isa) {
        let Some(values) = &self.0 else { return };
        let mut wide = [0f32; CHUNK];
        let wide = &mut wide[..row.len()];
        values.copy_to(first, wide, isa);
        row.iter_mut().zip(wide).for_each(|(a, b)| *a += *b);
    }
}

/// An output matrix that tasks write in disjoint column ranges.
struct Out {
    ptr: *mut f32,
    columns: usize,
}

// SAFETY: tasks write disjoint columns.
unsafe impl Sync for Out {}

impl Out {
    fn new(mem: &mut crate::MemMut<'_>, columns: usize) -> Result<Self> {
        Ok(Self {
            ptr: mem.slice_mut::<f32>()?.as_mut_ptr(),
            columns,
        })
    }

    /// # Safety
    /// No other task may use these columns of this row, and the row must exist.
    #[allow(clippy::mut_from_ref)] // disjoint by the caller's promise
    unsafe fn row(&self, row: usize, first: usize, n: usize) -> &mut [f32] {
        // SAFETY: inside row `row` of the checked output; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.columns + first), n) }
    }
}

/// Rows of a block, whole tiles of the quantized input.
fn block_rows(rows: usize) -> usize {
    (BLOCK_TILES * qgemm::tile_rows(rows)).min(rows)
}

/// Up to [`FUSED`] matrices that multiply the same activations.
struct Matrices<'m, 'a> {
    list: [Option<&'m Matrix<'a>>; FUSED],
    rows: usize,
    inputs: usize,
}

impl<'m, 'a> Matrices<'m, 'a> {
    fn new(
        list: impl Iterator<Item = &'m Matrix<'a>>,
        (rows, inputs): (usize, usize),
    ) -> Matrices<'m, 'a> {
        let mut matrices = Matrices {
            list: [None; FUSED],
            rows,
            inputs,
        };
        matrices
            .list
            .iter_mut()
            .zip(list)
            .for_each(|(to, m)| *to = Some(m));
        matrices
    }

    fn quant(&self, i: usize) -> Option<&'a QuantMatrix> {
        self.list[i].and_then(Matrix::host_quant)
    }

    /// The first matrix whose prepared input the `i`-th can use: itself or an earlier one.
    fn input_of(&self, i: usize) -> usize {
        let Some(matrix) = self.quant(i) else {
            return i;
        };
        (0..i)
            .find(|&j| self.quant(j).is_some_and(|q| q.shares_input(matrix)))
            .unwrap_or(i)
    }

    /// Scratch words for the prepared input of the `i`-th matrix.
    fn input_words(&self, i: usize) -> usize {
        match self.quant(i) {
            Some(q) if self.input_of(i) == i => {
                qgemm::scratch_words(q, self.rows).next_multiple_of(16)
            }
            _ => 0,
        }
    }

    /// Scratch words of one thread: an accumulator per matrix that a task computes.
    fn thread_words(&self, per_task: usize) -> usize {
        (per_task * block_rows(self.rows) * CHUNK).next_multiple_of(16)
    }

    /// Scratch words of the op.
    fn words(&self, per_task: usize, threads: usize) -> usize {
        let inputs: usize = (0..FUSED).map(|i| self.input_words(i)).sum();
        inputs + threads * self.thread_words(per_task)
    }

    /// Prepares the inputs and calls `go` with the sources of the matrices (`None` past the last)
    /// and the threads' scratch.
    fn prepare(
        &self,
        cpu: &Cpu,
        x: &[f32],
        per_task: usize,
        go: impl FnOnce(&[Option<Source<'_>>; FUSED], &ThreadScratch) -> Result<()>,
    ) -> Result<()> {
        let threads = cpu.pool().threads();
        cpu.scratch(self.words(per_task, threads), |scratch| {
            let mut rest = scratch;
            let mut inputs = [const { None }; FUSED];
            for (i, input) in inputs.iter_mut().enumerate() {
                let (mine, after) = std::mem::take(&mut rest).split_at_mut(self.input_words(i));
                rest = after;
                if let Some(q) = self.quant(i).filter(|_| !mine.is_empty()) {
                    let settings = (cpu.pool(), cpu.isa(), cpu.activations());
                    *input = Some(Input::new(Rows::all(x, self.inputs), q, mine, settings));
                }
            }
            let mut sources = [const { None }; FUSED];
            for (i, source) in sources.iter_mut().enumerate() {
                *source = match self.list[i] {
                    None => None,
                    Some(Matrix::Cuda(_)) => return Err(Error::not_on_host("linear")),
                    Some(Matrix::Dense(mem)) => Some(Source::Dense {
                        w: Dense::new(mem)?,
                        x,
                        inputs: self.inputs,
                    }),
                    Some(Matrix::Quant(matrix)) => inputs[self.input_of(i)].as_ref().map(|input| {
                        Source::Quant(Product {
                            matrix,
                            input,
                            isa: cpu.isa(),
                        })
                    }),
                };
            }
            let words = self.thread_words(per_task);
            let threads: &mut [f32] = bytemuck::cast_slice_mut(rest);
            let ptr = threads.as_mut_ptr();
            go(&sources, &ThreadScratch { ptr, words })
        })
    }
}

impl Source<'_> {
    /// Rows `rows` of the columns from `first` on into `acc` (`[rows, CHUNK]`).
    fn run(&self, (first, columns): (usize, usize), rows: Range<usize>, acc: &mut [f32], isa: Isa) {
        match self {
            Source::Quant(product) => {
                let panels = (first / PANEL, columns.div_ceil(PANEL));
                let size = product.tile_size();
                let tiles = rows.start / size..rows.end.div_ceil(size);
                product.run(panels, tiles, acc);
            }
            Source::Dense { w, x, inputs } => {
                let x = &x[rows.start * inputs..rows.end * inputs];
                dense::products(w, (first, columns), (x, *inputs), (acc, CHUNK), isa);
            }
        }
    }
}

/// Takes a block's rows, first column, number of columns, and an accumulator per source.
type Finish<'a> = dyn Fn(usize, Range<usize>, (usize, usize), &mut [f32]) + Sync + 'a;

/// Columns that the same sources compute.
struct Columns<'a> {
    sources: &'a [Option<Source<'a>>],
    outputs: usize,
    rows: usize,
}

impl Columns<'_> {
    /// Computes `count` columns from `first` on, block by block of the rows, and calls `finish(rows,
    /// accumulators)` for each. `scratch` is the thread's.
    fn run(
        &self,
        (first, count): (usize, usize),
        scratch: &mut [f32],
        isa: Isa,
        mut finish: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        let block = block_rows(self.rows);
        let accs = &mut scratch[..self.sources.len() * block * CHUNK];
        for start in (0..self.rows).step_by(block) {
            let end = (start + block).min(self.rows);
            for (i, source) in self.sources.iter().flatten().enumerate() {
                let acc = &mut accs[i * block * CHUNK..][..block * CHUNK];
                source.run((first, count), start..end, acc, isa);
            }
            finish(start..end, accs);
        }
    }
}

/// Splits the columns over the threads and the rows into blocks, and calls
/// `finish(index of the columns, rows, (first, count), accumulators)` for each.
fn sweep(cpu: &Cpu, all: &[Columns<'_>], scratch: &ThreadScratch, finish: &Finish<'_>) {
    let outputs = all.iter().map(|c| c.outputs).sum();
    let rows = all.iter().map(|c| c.rows).max().unwrap_or(0);
    let chunk = chunk_columns(outputs, cpu.pool().threads(), rows);
    let tasks = all.iter().map(|c| c.outputs.div_ceil(chunk)).sum();
    cpu.pool().run(tasks, &|task, thread| {
        let (mut index, mut task) = (0, task);
        while task >= all[index].outputs.div_ceil(chunk) {
            task -= all[index].outputs.div_ceil(chunk);
            index += 1;
        }
        let first = task * chunk;
        let columns = (first, chunk.min(all[index].outputs - first));
        // SAFETY: each thread index runs one task at a time and gets its own range.
        let mine = unsafe { scratch.of(thread) };
        all[index].run(columns, mine, cpu.isa(), |rows, accs| {
            finish(index, rows, columns, accs);
        });
    });
}

/// Columns of a task: whole chunks, but enough tasks that the last one does not leave threads
/// idle, in whole panels.
fn chunk_columns(outputs: usize, threads: usize, rows: usize) -> usize {
    let wanted = if rows <= FEW_ROWS {
        4 * threads
    } else {
        2 * threads
    };
    if threads > 1 && outputs < wanted * CHUNK {
        return outputs
            .div_ceil(wanted)
            .next_multiple_of(PANEL)
            .clamp(PANEL, CHUNK);
    }
    CHUNK
}

/// One range of scratch per thread.
struct ThreadScratch {
    ptr: *mut f32,
    words: usize,
}

// SAFETY: ranges of different threads are disjoint.
unsafe impl Sync for ThreadScratch {}

impl ThreadScratch {
    /// # Safety
    /// Only one task may hold a thread's range at a time.
    #[allow(clippy::mut_from_ref)] // disjoint by the caller's promise
    unsafe fn of(&self, thread: usize) -> &mut [f32] {
        // SAFETY: the scratch has `words` per thread; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(thread * self.words), self.words) }
    }
}

/// Scratch words of a linear op.
pub(super) fn words(op: &Linear<'_>, threads: usize) -> usize {
    let parts = op.parts.chunks(FUSED).map(|parts| {
        Matrices::new(parts.iter().map(|p| &p.matrix), (op.rows, op.inputs)).words(1, threads)
    });
    parts.max().unwrap_or(0)
}

pub(super) fn run(op: &mut Linear<'_>, cpu: &Cpu) -> Result<()> {
    let shape = (op.rows, op.inputs);
    if op.rows == 0 {
        return Ok(());
    }
    let x = op.x.slice::<f32>()?;
    op.parts
        .chunks_mut(FUSED)
        .try_for_each(|parts| run_parts(parts, x, shape, cpu))
}

/// Where the product of a part goes and what is added to it.
struct Target<'a> {
    out: Out,
    bias: Vector<'a>,
    residual: Residual,
}

impl<'a> Target<'a> {
    fn new(part: &mut LinearPart<'a>) -> Result<Self> {
        // The residual may be the output itself: each element is read before it is written.
        let residual = part.residual.as_ref();
        let residual = residual.map(|m| m.slice::<f32>().map(<[f32]>::as_ptr));
        Ok(Self {
            bias: Vector::new(&part.bias)?,
            residual: Residual(residual.transpose()?),
            out: Out::new(&mut part.out, part.outputs)?,
        })
    }
}

fn run_parts(
    parts: &mut [LinearPart<'_>],
    x: &[f32],
    (rows, inputs): (usize, usize),
    cpu: &Cpu,
) -> Result<()> {
    let mut targets = [const { None }; FUSED];
    for (target, part) in targets.iter_mut().zip(parts.iter_mut()) {
        *target = Some(Target::new(part)?);
    }
    let parts = &*parts;
    let matrices = Matrices::new(parts.iter().map(|p| &p.matrix), (rows, inputs));
    matrices.prepare(cpu, x, 1, |sources, threads| {
        let columns: [Columns<'_>; FUSED] = std::array::from_fn(|i| Columns {
            sources: &sources[i..=i],
            outputs: parts.get(i).map_or(0, |p| p.outputs),
            rows,
        });
        sweep(
            cpu,
            &columns[..parts.len()],
            threads,
            &|index, block, (first, n), accs| {
                let Some(target) = &targets[index] else {
                    return;
                };
                let outputs = parts[index].outputs;
                for (row, acc) in block.zip(accs.chunks_exact_mut(CHUNK)) {
                    let acc = &mut acc[..n];
                    target.bias.add_to(first, acc, cpu.isa());
                    target.residual.add_to(row * outputs + first, acc);
                    // SAFETY: tasks have disjoint columns, rows are below `rows`.
                    unsafe { target.out.row(row, first, n) }.copy_from_slice(acc);
                }
            },
        );
        Ok(())
    })
}

struct Residual(Option<*const f32>);

// SAFETY: tasks read only the elements they write themselves afterwards.
unsafe impl Sync for Residual {}

impl Residual {
    fn add_to(&self, at: usize, acc: &mut [f32]) {
        let Some(ptr) = self.0 else { return };
        for (i, a) in acc.iter_mut().enumerate() {
            // SAFETY: `check` gave the residual the output's size.
            *a += unsafe { ptr.add(at + i).read() };
        }
    }

    /// What sums begin with: the values from `at` on, or zeros.
    fn copy_to(&self, at: usize, to: &mut [f32]) {
        let Some(from) = self.0 else {
            return to.fill(0.0);
        };
        // SAFETY: `check` gave the residual the output's size; both may be the same memory.
        unsafe { std::ptr::copy(from.add(at), to.as_mut_ptr(), to.len()) };
    }
}

/// Scratch words of a gate-up op.
pub(super) fn gate_up_words(op: &GateUp<'_>, threads: usize) -> usize {
    Matrices::new([&op.gate, &op.up].into_iter(), (op.rows, op.inputs)).words(2, threads)
}

pub(super) fn gate_up(op: &mut GateUp<'_>, cpu: &Cpu) -> Result<()> {
    let (rows, outputs) = (op.rows, op.outputs);
    if rows == 0 {
        return Ok(());
    }
    let x = op.x.slice::<f32>()?;
    let biases = [Vector::new(&op.gate_bias)?, Vector::new(&op.up_bias)?];
    let (act, isa) = (op.act, cpu.isa());
    let out = Out::new(&mut op.out, outputs)?;
    let matrices = Matrices::new([&op.gate, &op.up].into_iter(), (rows, op.inputs));
    matrices.prepare(cpu, x, 2, |sources, threads| {
        let columns = Columns {
            sources: &sources[..2],
            outputs,
            rows,
        };
        sweep(cpu, &[columns], threads, &|_, block, (first, n), accs| {
            let (gate, up) = accs.split_at_mut(accs.len() / 2);
            let pairs = gate.chunks_exact_mut(CHUNK).zip(up.chunks_exact_mut(CHUNK));
            for (row, (gate, up)) in block.zip(pairs) {
                biases[0].add_to(first, &mut gate[..n], isa);
                biases[1].add_to(first, &mut up[..n], isa);
                // SAFETY: tasks have disjoint columns, rows are below `rows`.
                let out = unsafe { out.row(row, first, n) };
                super::math::gated(act, &gate[..n], &up[..n], out, isa);
            }
        });
        Ok(())
    })
}
