//! Interprets a plan on the host: SIMD kernels, or the f64 reference.

use exl_kernels::cpu::Cpu;
use exl_kernels::ops::{self, LinearPart, Op};
use exl_kernels::{Mem, MemMut, reference};

use super::{Bound, Executor};
use crate::plan::{AttnOp, GateUpOp, PlanOp, PlanPart, RopeOp};
use crate::{Error, HostMemory, KvBuffers, Result, Slot, StepBlock, StepField, WeightId};

#[derive(Debug)]
enum Kernels {
    Cpu(Box<Cpu>),
    Reference,
}

/// Runs plans in host memory.
#[derive(Debug)]
pub struct HostExecutor {
    kernels: Kernels,
    arena: HostMemory,
}

impl HostExecutor {
    /// With the SIMD kernels.
    ///
    /// # Errors
    /// Out of memory.
    pub fn cpu(cpu: Cpu) -> Result<Self> {
        Self::new(Kernels::Cpu(Box::new(cpu)))
    }

    /// With the f64 reference kernels: slow, for checking.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reference() -> Result<Self> {
        Self::new(Kernels::Reference)
    }

    fn new(kernels: Kernels) -> Result<Self> {
        Ok(Self {
            kernels,
            arena: HostMemory::zeroed(0, "the arena")?,
        })
    }

    /// The CPU kernels, if it runs them.
    pub fn kernels(&self) -> Option<&Cpu> {
        match &self.kernels {
            Kernels::Cpu(cpu) => Some(cpu),
            Kernels::Reference => None,
        }
    }

    /// Bytes of the arena at present.
    pub fn arena_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// A slot's values, F32 `[rows, dim]`, until the next run.
    pub fn slot(&self, bound: &Bound, slot: Slot) -> &[f32] {
        let info = bound.plan().slot(slot);
        let region = self
            .arena
            .mem(bound.plan().arena().offset(slot), info.bytes(), info.dtype);
        region.slice().expect("slots are F32 in host memory")
    }

    /// A slot's values for writing.
    pub fn slot_mut(&mut self, bound: &Bound, slot: Slot) -> &mut [f32] {
        let info = bound.plan().slot(slot);
        let offset = bound.plan().arena().offset(slot);
        // SAFETY: `&mut self` excludes every other region of the arena.
        let mut region = unsafe { self.arena.mem_mut(offset, info.bytes(), info.dtype) };
        let view = region
            .slice_mut::<f32>()
            .expect("slots are F32 in host memory");
        // SAFETY: the region borrows the arena, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(view.as_mut_ptr(), info.rows * info.dim) }
    }
}

impl Executor for HostExecutor {
    fn name(&self) -> String {
        match &self.kernels {
            Kernels::Cpu(cpu) => format!("cpu ({:?})", cpu.isa()),
            Kernels::Reference => "reference".to_owned(),
        }
    }

    fn prepare(&mut self, bound: &Bound) -> Result<()> {
        let bytes = bound.plan().arena().bytes();
        if bytes > self.arena.bytes() {
            self.arena = HostMemory::zeroed(bytes, "the arena")?;
        }
        Ok(())
    }

    fn run_op(
        &mut self,
        bound: &Bound,
        index: usize,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<()> {
        let plan_op = &bound.plan().ops()[index];
        let regions = Regions {
            bound,
            arena: &self.arena,
        };
        let mut op = regions.op(plan_op, step, kv);
        let done = match &self.kernels {
            Kernels::Cpu(cpu) => cpu.run(&mut op),
            Kernels::Reference => reference::run(&mut op),
        };
        done.map_err(|source| Error::Op {
            index,
            op: plan_op.name(),
            source,
        })
    }

    fn read(&self, bound: &Bound, slot: Slot) -> Vec<f32> {
        self.slot(bound, slot).to_vec()
    }

    fn write(&mut self, bound: &Bound, slot: Slot, values: &[f32]) -> Result<()> {
        let view = self.slot_mut(bound, slot);
        if view.len() != values.len() {
            let what = &bound.plan().slot(slot).name;
            let (want, have) = (view.len(), values.len());
            return Err(Error::Step(format!(
                "input {what} takes {want} values, got {have}"
            )));
        }
        view.copy_from_slice(values);
        Ok(())
    }
}

/// Turns plan operands into memory regions.
struct Regions<'a> {
    bound: &'a Bound,
    arena: &'a HostMemory,
}

impl<'a> Regions<'a> {
    fn mem(&self, slot: Slot) -> Mem<'a> {
        let plan = self.bound.plan();
        let info = plan.slot(slot);
        self.arena
            .mem(plan.arena().offset(slot), info.bytes(), info.dtype)
    }

    fn mem_mut(&self, slot: Slot) -> MemMut<'a> {
        let plan = self.bound.plan();
        let info = plan.slot(slot);
        // SAFETY: the planner proved slots that are alive together disjoint; operands that name
        // the same slot (in-place norm, residual) are those their op allows to coincide. One op
        // runs at a time and its regions do not outlive it.
        unsafe {
            self.arena
                .mem_mut(plan.arena().offset(slot), info.bytes(), info.dtype)
        }
    }

    fn dense(&self, id: WeightId) -> Mem<'a> {
        // A quantized weight here is refused by the op's own check: an empty region fits nothing.
        self.bound.weight(id).mem().unwrap_or(Mem::host::<f32>(&[]))
    }

    fn op<'s: 'a>(&self, op: &PlanOp, step: &'s StepBlock, kv: &'s mut KvBuffers) -> Op<'a> {
        match op {
            PlanOp::Embed {
                table,
                out,
                vocab,
                dim,
                scale,
            } => Op::Embed(ops::Embed {
                ids: step.mem(StepField::Tokens),
                table: self.dense(*table),
                out: self.mem_mut(*out),
                rows: step.key().rows,
                vocab: *vocab,
                dim: *dim,
                scale: *scale,
            }),
            PlanOp::RmsNorm {
                x,
                weight,
                out,
                rows,
                dim,
                eps,
                offset,
            } => Op::RmsNorm(ops::RmsNorm {
                x: self.mem(*x),
                weight: self.dense(*weight),
                out: self.mem_mut(*out),
                rows: *rows,
                dim: *dim,
                eps: *eps,
                offset: *offset,
            }),
            PlanOp::Linear {
                x,
                rows,
                inputs,
                parts,
            } => Op::Linear(ops::Linear {
                x: self.mem(*x),
                rows: *rows,
                inputs: *inputs,
                parts: parts.iter().map(|p| self.part(p)).collect(),
            }),
            PlanOp::GateUp {
                x,
                out,
                rows,
                inputs,
                args,
            } => self.gate_up((*x, *out), (*rows, *inputs), args),
            PlanOp::RopeAppend {
                q,
                k,
                v,
                layer,
                args,
            } => self.rope_append([*q, *k, *v], step, kv.write(*layer), args),
            PlanOp::PagedAttn {
                q,
                out,
                layer,
                args,
            } => self.attention((*q, *out), step, kv.read(*layer), args),
            PlanOp::GatherRows { x, out, rows, dim } => Op::GatherRows(ops::GatherRows {
                x: self.mem(*x),
                index: step.mem(StepField::OutRows),
                out: self.mem_mut(*out),
                x_rows: self.bound.plan().slot(*x).rows,
                rows: *rows,
                dim: *dim,
            }),
            PlanOp::ScaleLogits {
                x,
                rows,
                dim,
                scale,
                softcap,
            } => Op::ScaleLogits(ops::ScaleLogits {
                x: self.mem_mut(*x),
                rows: *rows,
                dim: *dim,
                scale: *scale,
                softcap: *softcap,
            }),
        }
    }

    fn part(&self, part: &PlanPart) -> LinearPart<'a> {
        LinearPart {
            matrix: self.bound.weight(part.weight).matrix(),
            bias: part.bias.map(|b| self.dense(b)),
            residual: part.residual.map(|r| self.mem(r)),
            out: self.mem_mut(part.out),
            outputs: part.outputs,
        }
    }

    fn gate_up(
        &self,
        (x, out): (Slot, Slot),
        (rows, inputs): (usize, usize),
        args: &GateUpOp,
    ) -> Op<'a> {
        Op::GateUp(ops::GateUp {
            x: self.mem(x),
            gate: self.bound.weight(args.gate).matrix(),
            up: self.bound.weight(args.up).matrix(),
            gate_bias: args.gate_bias.map(|b| self.dense(b)),
            up_bias: args.up_bias.map(|b| self.dense(b)),
            out: self.mem_mut(out),
            rows,
            inputs,
            outputs: args.outputs,
            act: args.act,
        })
    }

    fn rope_append<'s: 'a>(
        &self,
        [q, k, v]: [Slot; 3],
        step: &'s StepBlock,
        (k_cache, v_cache): (MemMut<'s>, MemMut<'s>),
        args: &RopeOp,
    ) -> Op<'a> {
        Op::RopeAppend(ops::RopeAppend {
            q: self.mem_mut(q),
            k: self.mem(k),
            v: self.mem(v),
            positions: step.mem(StepField::Positions),
            slots: step.mem(StepField::Slots),
            inv_freq: args
                .inv_freq
                .map_or(Mem::host::<f32>(&[]), |w| self.dense(w)),
            k_cache,
            v_cache,
            rows: step.key().rows,
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            style: args.style,
            attention_factor: args.attention_factor,
        })
    }

    fn attention<'s: 'a>(
        &self,
        (q, out): (Slot, Slot),
        step: &'s StepBlock,
        (k_cache, v_cache): (Mem<'s>, Mem<'s>),
        args: &AttnOp,
    ) -> Op<'a> {
        let key = step.key();
        Op::PagedAttn(ops::PagedAttn {
            q: self.mem(q),
            k_cache,
            v_cache,
            block_table: step.mem(StepField::BlockTable),
            q_start: step.mem(StepField::QStart),
            kv_len: step.mem(StepField::KvLen),
            out: self.mem_mut(out),
            rows: key.rows,
            seqs: key.seqs,
            pages_per_seq: key.pages_per_seq,
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            scale: args.scale,
            softcap: args.softcap,
            window: args.window,
        })
    }
}
