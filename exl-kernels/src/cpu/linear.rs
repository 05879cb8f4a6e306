//! `Linear` and `GateUp`: columns in chunks over the threads, rows in blocks that fit L2.

use super::dense::{self, Dense};
use super::qgemm::{self, CHUNK, Input, Product};
use super::{Cpu, Isa};
use crate::ops::{GateUp, Linear, LinearPart, Matrix};
use crate::quant::PANEL;
use crate::{Mem, Result};

/// Tiles of a block of rows: their activations and the accumulator stay in L2 while columns go by.
const BLOCK_TILES: usize = 32;
/// Rows up to which dense matrices are read in their storage type.
const STREAM_ROWS: usize = 4;

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

/// Scratch words a quantized matrix needs for its input.
fn input_words(matrix: &Matrix<'_>, rows: usize) -> usize {
    match matrix {
        Matrix::Dense(_) => 0,
        Matrix::Quant(q) => qgemm::scratch_words(q, rows),
    }
}

/// Rows of a block, whole tiles of the quantized input.
fn block_rows(rows: usize) -> usize {
    (BLOCK_TILES * qgemm::tile_rows(rows)).min(rows)
}

/// Scratch words of one thread: two accumulators, and a tile of f32 columns per matrix when one
/// is dense and has more rows than are streamed.
fn thread_words(rows: usize, inputs: usize, matrices: &[&Matrix<'_>]) -> usize {
    let dense = matrices.iter().any(|m| matches!(m, Matrix::Dense(_)));
    let tile = if dense && rows > STREAM_ROWS {
        CHUNK * inputs
    } else {
        0
    };
    2 * block_rows(rows) * CHUNK + matrices.len() * tile
}

fn source<'a>(
    cpu: &Cpu,
    matrix: &Matrix<'a>,
    x: &'a [f32],
    inputs: usize,
    input: &'a mut Option<Input<'a>>,
    words: &'a mut [i32],
) -> Result<Source<'a>> {
    Ok(match matrix {
        Matrix::Dense(mem) => Source::Dense {
            w: Dense::new(mem)?,
            x,
            inputs,
        },
        Matrix::Quant(q) => {
            let settings = (cpu.pool(), cpu.isa(), cpu.activations());
            let input = input.insert(Input::new(x, q, words, settings));
            Source::Quant(Product {
                matrix: q,
                input,
                isa: cpu.isa(),
            })
        }
    })
}

impl Source<'_> {
    /// Rows `rows` of the columns from `first` on into `acc` (`[rows, CHUNK]`).
    fn run(
        &self,
        (first, columns): (usize, usize),
        rows: std::ops::Range<usize>,
        acc: &mut [f32],
        (tile, isa): (&mut [f32], Isa),
    ) {
        match self {
            Source::Quant(product) => {
                let panels = (first / PANEL, columns.div_ceil(PANEL));
                let size = product.tile_size();
                let tiles = rows.start / size..rows.end.div_ceil(size);
                product.run(panels, tiles, acc);
            }
            Source::Dense { w, x, inputs } => {
                let (k, n) = (*inputs, rows.len());
                let x = &x[rows.start * k..rows.end * k];
                if tile.is_empty() {
                    for (row, acc) in x.chunks_exact(k).zip(acc.chunks_exact_mut(CHUNK)) {
                        dense::dots(w, first, row, &mut acc[..columns], isa);
                    }
                    return;
                }
                let tile = &mut tile[..columns * k];
                if rows.start == 0 {
                    // Later blocks of rows find the columns already widened.
                    w.copy_to(first * k, tile, isa);
                }
                dense::columns(x, tile, acc, (n, k, CHUNK));
            }
        }
    }
}

/// Takes a block's rows, first column, number of columns, and an accumulator per source.
type Finish<'a> = dyn Fn(std::ops::Range<usize>, (usize, usize), &mut [&mut [f32]]) + Sync + 'a;

/// Splits the columns over the threads and the rows into blocks, and calls
/// `finish(rows, first, columns, acc_a, acc_b)` for each.
fn sweep(
    cpu: &Cpu,
    (rows, outputs): (usize, usize),
    sources: &[Source<'_>],
    scratch: &ThreadScratch,
    finish: &Finish<'_>,
) {
    let chunk = chunk_columns(outputs, cpu.pool().threads(), rows);
    let isa = cpu.isa();
    cpu.pool().run(outputs.div_ceil(chunk), &|task, thread| {
        let first = task * chunk;
        let columns = chunk.min(outputs - first);
        // SAFETY: each thread index runs one task at a time and gets its own range.
        let mine = unsafe { scratch.of(thread) };
        let block = block_rows(rows);
        let half = block * CHUNK;
        let (acc_a, rest) = mine.split_at_mut(half);
        let (acc_b, tile) = rest.split_at_mut(half);
        let mut accs = [acc_a, acc_b];
        let tile_words = tile.len() / sources.len();
        let mut start = 0;
        while start < rows {
            let end = (start + block).min(rows);
            for (i, source) in sources.iter().enumerate() {
                let tile = &mut tile[i * tile_words..][..tile_words];
                source.run((first, columns), start..end, accs[i], (tile, isa));
            }
            finish(start..end, (first, columns), &mut accs);
            start = end;
        }
    });
}

/// Columns of a task: whole chunks, but enough tasks that the last one does not leave threads
/// idle, in whole panels.
fn chunk_columns(outputs: usize, threads: usize, rows: usize) -> usize {
    let wanted = if rows <= STREAM_ROWS {
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

pub(super) fn run(op: &mut Linear<'_>, cpu: &Cpu) -> Result<()> {
    let (rows, inputs) = (op.rows, op.inputs);
    let x = op.x.slice::<f32>()?;
    if rows == 0 {
        return Ok(());
    }
    for part in &mut op.parts {
        run_part(part, x, (rows, inputs), cpu)?;
    }
    Ok(())
}

fn run_part(
    part: &mut LinearPart<'_>,
    x: &[f32],
    (rows, inputs): (usize, usize),
    cpu: &Cpu,
) -> Result<()> {
    let outputs = part.outputs;
    let words = input_words(&part.matrix, rows);
    let per_thread = thread_words(rows, inputs, &[&part.matrix]);
    cpu.scratch(words + per_thread * cpu.pool().threads(), |scratch| {
        let (input_words, threads) = scratch.split_at_mut(words);
        let threads: &mut [f32] = bytemuck::cast_slice_mut(threads);
        let threads = ThreadScratch {
            ptr: threads.as_mut_ptr(),
            words: per_thread,
        };
        let mut input = None;
        let source = source(cpu, &part.matrix, x, inputs, &mut input, input_words)?;
        let bias = Vector::new(&part.bias)?;
        // The residual may be the output itself: each element is read before it is written.
        let residual = part
            .residual
            .as_ref()
            .map(|m| m.slice::<f32>().map(<[f32]>::as_ptr));
        let residual = Residual(residual.transpose()?);
        let out = Out::new(&mut part.out, outputs)?;
        sweep(
            cpu,
            (rows, outputs),
            &[source],
            &threads,
            &|block, (first, n), accs| {
                for (row, acc) in block.zip(accs[0].chunks_exact_mut(CHUNK)) {
                    let acc = &mut acc[..n];
                    bias.add_to(first, acc, cpu.isa());
                    residual.add_to(row * outputs + first, acc);
                    // SAFETY: tasks have disjoint columns, rows are below `rows`.
                    unsafe { out.row(row, first, n) }.copy_from_slice(acc);
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
}

pub(super) fn gate_up(op: &mut GateUp<'_>, cpu: &Cpu) -> Result<()> {
    let (rows, inputs, outputs) = (op.rows, op.inputs, op.outputs);
    if rows == 0 {
        return Ok(());
    }
    let x = op.x.slice::<f32>()?;
    let (gate_words, up_words) = (input_words(&op.gate, rows), input_words(&op.up, rows));
    let per_thread = thread_words(rows, inputs, &[&op.gate, &op.up]);
    cpu.scratch(
        gate_words + up_words + per_thread * cpu.pool().threads(),
        |scratch| {
            let (gate_scratch, rest) = scratch.split_at_mut(gate_words);
            let (up_scratch, threads) = rest.split_at_mut(up_words);
            let threads: &mut [f32] = bytemuck::cast_slice_mut(threads);
            let threads = ThreadScratch {
                ptr: threads.as_mut_ptr(),
                words: per_thread,
            };
            let (mut gate_input, mut up_input) = (None, None);
            let sources = [
                source(cpu, &op.gate, x, inputs, &mut gate_input, gate_scratch)?,
                source(cpu, &op.up, x, inputs, &mut up_input, up_scratch)?,
            ];
            let biases = [Vector::new(&op.gate_bias)?, Vector::new(&op.up_bias)?];
            let (act, isa) = (op.act, cpu.isa());
            let out = Out::new(&mut op.out, outputs)?;
            sweep(
                cpu,
                (rows, outputs),
                &sources,
                &threads,
                &|block, (first, n), accs| {
                    let [gate, up] = accs else { return };
                    let pairs = gate.chunks_exact_mut(CHUNK).zip(up.chunks_exact_mut(CHUNK));
                    for (row, (gate, up)) in block.zip(pairs) {
                        biases[0].add_to(first, &mut gate[..n], isa);
                        biases[1].add_to(first, &mut up[..n], isa);
                        // SAFETY: tasks have disjoint columns, rows are below `rows`.
                        let out = unsafe { out.row(row, first, n) };
                        super::math::gated(act, &gate[..n], &up[..n], out, isa);
                    }
                },
            );
            Ok(())
        },
    )
}
