//! Mixture of experts: row slots are sorted by expert, and each expert multiplies its own.
//!
//! Slots are taken in batches of pieces, a piece being some slots of one expert: the inputs of a batch
//! are prepared in one parallel region and multiplied in another. A result depends neither on the
//! batches nor on the other rows.

use super::{Columns, Matrices, Out, Residual, Source, ThreadScratch, chunk_columns, sweep};
use crate::cpu::dense::Dense;
use crate::cpu::qgemm::{Blank, CHUNK, Input, Product, Rows, TILE_ROWS};
use crate::cpu::rows::check_index;
use crate::cpu::{Cpu, math};
use crate::ops::{Matrix, MoeDown, MoeGateUp};
use crate::{Error, Result};

/// Most pieces of a batch: with one row, all its experts.
const PIECES: usize = 32;
/// Most slots of a batch: enough that an expert's weights are seldom read twice, few enough that the
/// prepared inputs take little memory.
const SLOTS: usize = 512;
/// Most matrices of an expert that share an input.
const EACH: usize = 2;
/// Values of inputs below which preparing them on several threads costs more than it saves.
const SERIAL: usize = 32768;
/// Rows that a task gathers for unquantized matrices.
const GATHERED: usize = 16;

/// Some slots of one expert: places in [`Sorted::slots`].
#[derive(Clone, Copy, Default)]
struct Piece {
    expert: usize,
    first: usize,
    rows: usize,
}

/// Slots by expert, in each in their own order.
struct Sorted<'s> {
    /// Where each expert's begin, and where the last one's end.
    starts: &'s [i32],
    slots: &'s [i32],
}

/// Words for [`Sorted::new`] beside one per slot.
fn start_words(experts: usize) -> usize {
    (experts + 2).next_multiple_of(16)
}

impl<'s> Sorted<'s> {
    /// Of checked ids. `starts` has [`start_words`], `slots` as many as there are ids.
    fn new(ids: &[i32], starts: &'s mut [i32], slots: &'s mut [i32]) -> Self {
        starts.fill(0);
        for &id in ids {
            starts[id as usize + 2] += 1;
        }
        for e in 2..starts.len() {
            starts[e] += starts[e - 1];
        }
        // The entry behind an expert's is where its next slot goes, and so ends as its end.
        for (slot, &id) in ids.iter().enumerate() {
            let place = &mut starts[id as usize + 1];
            slots[*place as usize] = slot as i32;
            *place += 1;
        }
        Self { starts, slots }
    }

    /// The next pieces from slot `at` (a place) on; moves it behind them.
    fn batch<'p>(&self, at: &mut usize, pieces: &'p mut [Piece; PIECES]) -> &'p [Piece] {
        let (mut count, mut used) = (0, 0);
        let ends = self.starts[1..].iter().map(|&end| end as usize);
        for (expert, end) in ends.enumerate() {
            if end <= *at {
                continue;
            }
            let rows = (end - *at).min(SLOTS - used);
            if rows == 0 || count == PIECES {
                break;
            }
            pieces[count] = Piece {
                expert,
                first: *at,
                rows,
            };
            count += 1;
            used += rows;
            *at += rows;
        }
        &pieces[..count]
    }

    fn of(&self, piece: &Piece) -> &'s [i32] {
        &self.slots[piece.first..][..piece.rows]
    }
}

/// The matrices of every expert, and how many slots they multiply.
struct Layer<'m, 'a> {
    op: &'static str,
    experts: usize,
    slots: usize,
    inputs: usize,
    /// Those of an expert, with one input.
    of: &'m (dyn Fn(usize) -> [Option<&'m Matrix<'a>>; EACH] + Sync),
}

/// The prepared inputs of a piece.
type Blanks<'s> = [Option<Blank<'s>>; EACH];

impl<'m, 'a> Layer<'m, 'a> {
    fn matrices(&self, expert: usize, rows: usize) -> Matrices<'m, 'a> {
        let list = (self.of)(expert).into_iter().flatten();
        Matrices::new(list, (rows, self.inputs))
    }

    /// Words of gathered rows, which unquantized matrices read.
    fn gathered_words(&self, expert: usize, rows: usize) -> usize {
        let mut list = (self.of)(expert).into_iter().flatten();
        if list.any(|m| matches!(m, Matrix::Dense(_))) {
            return (rows * self.inputs).next_multiple_of(16);
        }
        0
    }

    fn piece_words(&self, expert: usize, rows: usize) -> usize {
        let matrices = self.matrices(expert, rows);
        let inputs: usize = (0..EACH).map(|i| matrices.input_words(i)).sum();
        inputs + self.gathered_words(expert, rows)
    }

    /// Scratch words of one thread.
    fn thread_words(&self, per_task: usize) -> usize {
        let rows = (super::BLOCK_TILES * TILE_ROWS).min(self.slots).min(SLOTS);
        (per_task * rows * CHUNK).next_multiple_of(16)
    }

    /// Scratch words for the inputs of any batch.
    fn input_words(&self) -> usize {
        let most = (0..self.experts).map(|e| self.piece_words(e, 1)).max();
        // A row alone has no less than its share, and each input is padded.
        self.slots.min(SLOTS) * most.unwrap_or(0)
    }

    /// Scratch words of the op.
    fn words(&self, per_task: usize, threads: usize) -> usize {
        let sorted = start_words(self.experts) + self.slots.next_multiple_of(16);
        sorted + self.input_words() + threads * self.thread_words(per_task)
    }

    /// Sorts the slots and calls `go(pieces, their slots, sources by piece, threads' scratch)` for each
    /// batch. The row of slot `s` is row `s / by` of `x`.
    fn each_batch(
        &self,
        cpu: &Cpu,
        ids: &[i32],
        (x, by): (Rows<'_>, usize),
        per_task: usize,
        mut go: impl FnMut(&[Piece], &Sorted<'_>, &[[Option<Source<'_>>; EACH]], &ThreadScratch),
    ) -> Result<()> {
        let threads = cpu.pool().threads();
        cpu.scratch(self.words(per_task, threads), |scratch| {
            let (starts, rest) = scratch.split_at_mut(start_words(self.experts));
            let (slots, rest) = rest.split_at_mut(self.slots.next_multiple_of(16));
            let (inputs, threads) = rest.split_at_mut(self.input_words());
            let sorted = Sorted::new(ids, starts, &mut slots[..self.slots]);
            let scratch = ThreadScratch {
                ptr: bytemuck::cast_slice_mut::<i32, f32>(threads).as_mut_ptr(),
                words: self.thread_words(per_task),
            };
            let (mut at, mut pieces) = (0, [Piece::default(); PIECES]);
            while at < self.slots {
                let pieces = sorted.batch(&mut at, &mut pieces);
                self.prepare(cpu, pieces, &sorted, (x, by, inputs), |sources| {
                    go(pieces, &sorted, sources, &scratch);
                })?;
            }
            Ok(())
        })
    }

    /// Prepares the inputs of a batch and calls `go` with the sources of its pieces.
    fn prepare(
        &self,
        cpu: &Cpu,
        pieces: &[Piece],
        sorted: &Sorted<'_>,
        (x, by, mut rest): (Rows<'_>, usize, &mut [i32]),
        go: impl FnOnce(&[[Option<Source<'_>>; EACH]]),
    ) -> Result<()> {
        let settings = (cpu.isa(), cpu.activations());
        let mut blanks: [Blanks<'_>; PIECES] = [const { [const { None }; EACH] }; PIECES];
        let mut gathered: [Option<Out>; PIECES] = [const { None }; PIECES];
        for (piece, (blanks, gathered)) in pieces.iter().zip(blanks.iter_mut().zip(&mut gathered)) {
            let matrices = self.matrices(piece.expert, piece.rows);
            for (i, blank) in blanks.iter_mut().enumerate() {
                let (mine, after) = rest.split_at_mut(matrices.input_words(i));
                rest = after;
                let quant = matrices.quant(i).filter(|_| !mine.is_empty());
                *blank = quant.map(|q| Blank::new(piece.rows, q, mine, settings));
            }
            let (mine, after) = rest.split_at_mut(self.gathered_words(piece.expert, piece.rows));
            rest = after;
            let ptr = bytemuck::cast_slice_mut::<i32, f32>(mine).as_mut_ptr();
            *gathered = (!mine.is_empty()).then_some(Out {
                ptr,
                columns: self.inputs,
            });
        }
        let fill = Fill {
            layer: self,
            pieces,
            blanks: &blanks,
            gathered: &gathered,
        };
        fill.run(cpu, |piece| x.picked(sorted.of(piece), by));
        let inputs = blanks.map(|pair| pair.map(|blank| blank.map(Blank::filled)));
        let mut sources = [const { [const { None }; EACH] }; PIECES];
        for (p, piece) in pieces.iter().enumerate() {
            sources[p] = self.sources(piece, &inputs[p], &gathered[p], cpu)?;
        }
        go(&sources[..pieces.len()]);
        Ok(())
    }

    /// What multiplies the prepared inputs of a piece.
    fn sources<'s>(
        &self,
        piece: &Piece,
        inputs: &'s [Option<Input<'s>>; EACH],
        gathered: &Option<Out>,
        cpu: &Cpu,
    ) -> Result<[Option<Source<'s>>; EACH]>
    where
        'a: 's,
    {
        let matrices = self.matrices(piece.expert, piece.rows);
        let mut sources = [const { None }; EACH];
        for (i, source) in sources.iter_mut().enumerate() {
            *source = match matrices.list[i] {
                None => None,
                Some(Matrix::Cuda(_)) => return Err(Error::not_on_host(self.op)),
                Some(Matrix::Dense(mem)) => gathered
                    .as_ref()
                    .map(|rows| {
                        Ok::<_, Error>(Source::Dense {
                            w: Dense::new(mem)?,
                            // SAFETY: `prepare` made room for the piece's rows and filled them; nobody
                            // writes them while the sources are used.
                            x: unsafe {
                                let values = piece.rows * self.inputs;
                                std::slice::from_raw_parts(rows.ptr, values)
                            },
                            inputs: self.inputs,
                        })
                    })
                    .transpose()?,
                Some(Matrix::Quant(matrix)) => inputs[matrices.input_of(i)].as_ref().map(|input| {
                    Source::Quant(Product {
                        matrix,
                        input,
                        isa: cpu.isa(),
                    })
                }),
            };
        }
        Ok(sources)
    }
}

/// The tasks that fill the inputs of a batch: tiles of quantized inputs, and stretches of gathered rows.
struct Fill<'f, 'm, 'a> {
    layer: &'f Layer<'m, 'a>,
    pieces: &'f [Piece],
    blanks: &'f [Blanks<'f>; PIECES],
    gathered: &'f [Option<Out>; PIECES],
}

impl Fill<'_, '_, '_> {
    /// Tasks of a piece: of each of its blanks, and of the rows that are gathered.
    fn tasks(&self, p: usize) -> [usize; EACH + 1] {
        let mut tasks = [0; EACH + 1];
        for (tasks, blank) in tasks.iter_mut().zip(&self.blanks[p]) {
            *tasks = blank.as_ref().map_or(0, Blank::tiles);
        }
        if self.gathered[p].is_some() {
            tasks[EACH] = self.pieces[p].rows.div_ceil(GATHERED);
        }
        tasks
    }

    /// Runs all tasks; `rows` tells the rows of a piece.
    fn run<'x>(&self, cpu: &Cpu, rows: impl Fn(&Piece) -> Rows<'x> + Sync) {
        let counts = (0..self.pieces.len()).flat_map(|p| self.tasks(p));
        let all = counts.sum();
        let task = |mut task: usize| {
            for (p, piece) in self.pieces.iter().enumerate() {
                for (i, count) in self.tasks(p).into_iter().enumerate() {
                    if task < count {
                        return self.fill((p, i), task, rows(piece));
                    }
                    task -= count;
                }
            }
        };
        let slots: usize = self.pieces.iter().map(|p| p.rows).sum();
        if slots * self.layer.inputs < SERIAL {
            (0..all).for_each(task);
        } else {
            cpu.pool().run(all, &|i, _| task(i));
        }
    }

    /// One task: tile or stretch `index` of what piece `p` has at `i`.
    fn fill(&self, (p, i): (usize, usize), index: usize, x: Rows<'_>) {
        if let Some(blank) = self.blanks[p].get(i) {
            let matrices = self
                .layer
                .matrices(self.pieces[p].expert, self.pieces[p].rows);
            if let (Some(blank), Some(matrix)) = (blank, matrices.quant(i)) {
                // SAFETY: `run` gives every task out once.
                unsafe { blank.fill(index, x, matrix) };
            }
            return;
        }
        let Some(to) = &self.gathered[p] else { return };
        for r in (0..x.len()).skip(index * GATHERED).take(GATHERED) {
            // SAFETY: a task has rows of its own, and there is room for the piece's rows.
            unsafe { to.row(r, 0, self.layer.inputs) }.copy_from_slice(x.row(r));
        }
    }
}

fn gate_up_layer<'m, 'a>(
    op: &MoeGateUp<'_>,
    of: &'m (dyn Fn(usize) -> [Option<&'m Matrix<'a>>; EACH] + Sync),
) -> Layer<'m, 'a> {
    Layer {
        op: "moe_gate_up",
        experts: op.experts.len(),
        slots: op.rows * op.top_k,
        inputs: op.inputs,
        of,
    }
}

/// Scratch words of gate and up.
pub(in crate::cpu) fn gate_up_words(op: &MoeGateUp<'_>, threads: usize) -> usize {
    let of = |e: usize| {
        let (gate, up) = &op.experts[e];
        [Some(gate), Some(up)]
    };
    gate_up_layer(op, &of).words(2, threads)
}

pub(in crate::cpu) fn gate_up(op: &mut MoeGateUp<'_>, cpu: &Cpu) -> Result<()> {
    let (outputs, act, isa) = (op.outputs, op.act, cpu.isa());
    let ids = op.ids.slice::<i32>()?;
    check_index(ids, op.experts.len(), "moe_gate_up.ids")?;
    let x = Rows::all(op.x.slice::<f32>()?, op.inputs);
    let out = Out::new(&mut op.out, outputs)?;
    let op = &*op;
    let of = |e: usize| {
        let (gate, up) = &op.experts[e];
        [Some(gate), Some(up)]
    };
    let layer = gate_up_layer(op, &of);
    layer.each_batch(
        cpu,
        ids,
        (x, op.top_k),
        2,
        |pieces, sorted, sources, scratch| {
            let columns: [Columns<'_>; PIECES] = std::array::from_fn(|p| Columns {
                sources: sources.get(p).map_or(&[], |s| s.as_slice()),
                outputs,
                rows: pieces.get(p).map_or(0, |p| p.rows),
            });
            sweep(
                cpu,
                &columns[..pieces.len()],
                scratch,
                &|p, block, (first, n), accs| {
                    let (gate, up) = accs.split_at_mut(accs.len() / 2);
                    let pairs = gate.chunks_exact(CHUNK).zip(up.chunks_exact(CHUNK));
                    for (slot, (gate, up)) in sorted.of(&pieces[p])[block].iter().zip(pairs) {
                        // SAFETY: tasks have disjoint columns or slots, slots are rows of the output.
                        let out = unsafe { out.row(*slot as usize, first, n) };
                        math::gated(act, &gate[..n], &up[..n], out, isa);
                    }
                },
            );
        },
    )
}

fn down_layer<'m, 'a>(
    op: &MoeDown<'_>,
    of: &'m (dyn Fn(usize) -> [Option<&'m Matrix<'a>>; EACH] + Sync),
) -> Layer<'m, 'a> {
    Layer {
        op: "moe_down",
        experts: op.experts.len(),
        slots: op.rows * op.top_k,
        inputs: op.inputs,
        of,
    }
}

/// Scratch words of the products of the experts' outputs.
pub(in crate::cpu) fn down_words(op: &MoeDown<'_>, threads: usize) -> usize {
    let of = |e: usize| [Some(&op.experts[e]), None];
    down_layer(op, &of).words(1, threads)
}

/// Each task adds the outputs of all pieces in some columns, in the order of the experts.
pub(in crate::cpu) fn down(op: &mut MoeDown<'_>, cpu: &Cpu) -> Result<()> {
    let (outputs, top_k) = (op.outputs, op.top_k);
    let (ids, weights) = (op.ids.slice::<i32>()?, op.weights.slice::<f32>()?);
    check_index(ids, op.experts.len(), "moe_down.ids")?;
    let x = Rows::all(op.x.slice::<f32>()?, op.inputs);
    // The residual may be the output itself: each element is read before it is written.
    let residual = op.residual.as_ref();
    let residual = residual.map(|m| m.slice::<f32>().map(<[f32]>::as_ptr));
    let residual = Residual(residual.transpose()?);
    let out = Out::new(&mut op.out, outputs)?;
    let op = &*op;
    let of = |e: usize| [Some(&op.experts[e]), None];
    let layer = down_layer(op, &of);
    let mut begun = false;
    layer.each_batch(cpu, ids, (x, 1), 1, |pieces, sorted, sources, scratch| {
        let rows = pieces.iter().map(|p| p.rows).max().unwrap_or(0);
        let chunk = chunk_columns(outputs, cpu.pool().threads(), rows);
        cpu.pool().run(outputs.div_ceil(chunk), &|task, thread| {
            let first = task * chunk;
            let n = chunk.min(outputs - first);
            // SAFETY: tasks have disjoint columns, rows are below `op.rows`.
            let own = |row: usize| unsafe { out.row(row, first, n) };
            for row in (0..op.rows).filter(|_| !begun) {
                residual.copy_to(row * outputs + first, own(row));
            }
            // SAFETY: each thread index runs one task at a time and gets its own range.
            let mine = unsafe { scratch.of(thread) };
            for (piece, sources) in pieces.iter().zip(sources) {
                let columns = Columns {
                    sources: &sources[..1],
                    outputs,
                    rows: piece.rows,
                };
                let slots = sorted.of(piece);
                columns.run((first, n), mine, cpu.isa(), |block, accs| {
                    for (&slot, acc) in slots[block].iter().zip(accs.chunks_exact(CHUNK)) {
                        let weight = weights[slot as usize];
                        let to = own(slot as usize / top_k);
                        to.iter_mut().zip(acc).for_each(|(to, y)| *to += weight * y);
                    }
                });
            }
        });
        begun = true;
    })
}
