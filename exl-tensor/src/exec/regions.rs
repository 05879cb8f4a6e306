//! From plan operands to the memory regions of an op's arguments, wherever the memory is.

use exl_kernels::ops::{self, LinearPart, Op};
use exl_kernels::{DType, KvType, Mem, MemMut};

use super::Bound;
use crate::plan::{
    AttnOp, GateUpOp, MoeDownOp, MoeGateUpOp, PlanOp, PlanPart, RopeOp, Routing, RowScales, RowSet,
};
use crate::{KvBuffers, Slot, StepBlock, StepField, WeightId};

/// Memory that holds the slots of a plan.
pub(super) trait Arena {
    /// A range for reading.
    fn region(&self, offset: usize, bytes: usize, dtype: DType) -> Mem<'_>;

    /// A range for writing.
    ///
    /// # Safety
    /// No other region made from this arena may overlap the range while the result is used, except
    /// where the op it is passed to allows its arguments to coincide.
    unsafe fn region_mut(&self, offset: usize, bytes: usize, dtype: DType) -> MemMut<'_>;

    /// An array of the step block where the kernels read it.
    fn step<'a>(&'a self, step: &'a StepBlock, field: StepField) -> Mem<'a>;
}

/// Turns plan operands into memory regions.
pub(super) struct Regions<'a> {
    bound: &'a Bound,
    arena: &'a dyn Arena,
}

impl<'a> Regions<'a> {
    pub(super) fn new(bound: &'a Bound, arena: &'a dyn Arena) -> Self {
        Self { bound, arena }
    }

    fn mem(&self, slot: Slot) -> Mem<'a> {
        let plan = self.bound.plan();
        let info = plan.slot(slot);
        self.arena
            .region(plan.arena().offset(slot), info.bytes(), info.dtype)
    }

    fn mem_mut(&self, slot: Slot) -> MemMut<'a> {
        let plan = self.bound.plan();
        let info = plan.slot(slot);
        // SAFETY: the planner proved slots that are alive together disjoint; operands that name
        // the same slot (in-place norm, residual) are those their op allows to coincide. One op
        // runs at a time and its regions do not outlive it.
        unsafe {
            self.arena
                .region_mut(plan.arena().offset(slot), info.bytes(), info.dtype)
        }
    }

    fn dense(&self, id: WeightId) -> Mem<'a> {
        // A quantized weight here is refused by the op's own check: an empty region fits nothing.
        self.bound.weight(id).mem().unwrap_or(Mem::host::<f32>(&[]))
    }

    pub(super) fn op<'s: 'a>(
        &self,
        op: &PlanOp,
        step: &'s StepBlock,
        kv: &'s mut KvBuffers,
    ) -> Op<'a> {
        match op {
            PlanOp::Embed {
                table,
                ids,
                add,
                out,
                vocab,
                dim,
                scale,
            } => Op::Embed(ops::Embed {
                ids: self.arena.step(step, *ids),
                table: self.dense(*table),
                add: add.map(|add| self.mem(add)),
                out: self.mem_mut(*out),
                rows: step.key().rows,
                vocab: *vocab,
                dim: *dim,
                scale: *scale,
            }),
            PlanOp::RmsNorm {
                x,
                weight,
                residual,
                out,
                rows,
                dim,
                eps,
                offset,
            } => Op::RmsNorm(ops::RmsNorm {
                x: self.mem(*x),
                weight: self.dense(*weight),
                residual: residual.map(|r| self.mem(r)),
                out: self.mem_mut(*out),
                rows: *rows,
                dim: *dim,
                eps: *eps,
                offset: *offset,
            }),
            PlanOp::LayerNorm { x, out, args } => Op::LayerNorm(ops::LayerNorm {
                x: self.mem(*x),
                weight: args.weight.map(|w| self.dense(w)),
                bias: args.bias.map(|b| self.dense(b)),
                out: self.mem_mut(*out),
                rows: args.rows,
                dim: args.dim,
                groups: args.groups,
                eps: args.eps,
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
            } => {
                let (kind, slots) = (kv.shape().kv, fields(kv, *layer).0);
                let slots = self.arena.step(step, slots);
                self.rope_append([*q, *k, *v], (step, slots), (kv.write(*layer), kind), args)
            }
            PlanOp::PagedAttn {
                q,
                out,
                layer,
                args,
            } => {
                let (kind, table) = (kv.shape().kv, fields(kv, *layer).1);
                let table = self.arena.step(step, table);
                self.attention((*q, *out), (step, table), (kv.read(*layer), kind), args)
            }
            PlanOp::GatherRows {
                x,
                out,
                rows,
                dim,
                set,
            } => Op::GatherRows(ops::GatherRows {
                x: self.mem(*x),
                index: self.arena.step(
                    step,
                    match set {
                        RowSet::Hidden => StepField::HiddenRows,
                        RowSet::All | RowSet::Out => StepField::OutRows,
                    },
                ),
                out: self.mem_mut(*out),
                x_rows: self.bound.plan().slot(*x).rows,
                rows: *rows,
                dim: *dim,
            }),
            PlanOp::ScaleRows {
                x,
                scales,
                factor,
                add,
                out,
            } => {
                let (scales, columns, column) = self.row_scales(*scales, step);
                Op::ScaleRows(ops::ScaleRows {
                    x: self.mem(*x),
                    scales,
                    add: add.map(|add| self.mem(add)),
                    out: self.mem_mut(*out),
                    rows: self.bound.plan().slot(*out).rows,
                    dim: self.bound.plan().slot(*out).dim,
                    columns,
                    column,
                    factor: *factor,
                })
            }
            PlanOp::Clamp { x, limit } => Op::Clamp(ops::Clamp {
                x: self.mem_mut(*x),
                rows: self.bound.plan().slot(*x).rows,
                dim: self.bound.plan().slot(*x).dim,
                limit: *limit,
            }),
            PlanOp::Gated { gate, up, out, act } => Op::Gated(ops::Gated {
                gate: self.mem(*gate),
                up: up.map(|up| self.mem(up)),
                out: self.mem_mut(*out),
                rows: self.bound.plan().slot(*out).rows,
                dim: self.bound.plan().slot(*out).dim,
                act: *act,
            }),
            PlanOp::MoeRoute {
                logits,
                ids,
                weights,
                args,
            } => Op::MoeRoute(ops::MoeRoute {
                logits: self.mem(*logits),
                ids: self.mem_mut(*ids),
                weights: self.mem_mut(*weights),
                rows: args.rows,
                experts: args.experts,
                top_k: args.top_k,
                norm: args.norm,
            }),
            PlanOp::MoeGateUp { x, ids, out, args } => self.moe_gate_up([*x, *ids, *out], args),
            PlanOp::MoeDown {
                x,
                routing,
                residual,
                out,
                args,
            } => self.moe_down((*x, *residual, *out), routing, args),
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
            PlanOp::Sample {
                logits,
                out,
                rows,
                vocab,
                shape,
            } => Op::Sample(ops::Sample {
                logits: self.mem_mut(*logits),
                params: self.arena.step(step, StepField::SampleParams),
                recent: self.arena.step(step, StepField::Recent),
                blocked: self.arena.step(step, StepField::Blocked),
                out: self.mem_mut(*out),
                rows: *rows,
                vocab: *vocab,
                tokens: shape.tokens,
                window: shape.window,
                blocked_width: shape.blocked,
            }),
        }
    }

    /// The array of scales, how many a row has, and which of them counts.
    fn row_scales<'s: 'a>(
        &self,
        scales: RowScales,
        step: &'s StepBlock,
    ) -> (Option<Mem<'a>>, usize, usize) {
        match scales {
            RowScales::None => (None, 0, 0),
            RowScales::Slot(slot) => (Some(self.mem(slot)), 1, 0),
            RowScales::Step(set, column) => {
                let columns = step.key().extras.scales();
                (Some(self.arena.step(step, set.scales())), columns, column)
            }
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

    fn moe_gate_up(&self, [x, ids, out]: [Slot; 3], args: &MoeGateUpOp) -> Op<'a> {
        let matrix = |id: WeightId| self.bound.weight(id).matrix();
        let pair = |&(gate, up): &(WeightId, WeightId)| (matrix(gate), matrix(up));
        Op::MoeGateUp(ops::MoeGateUp {
            x: self.mem(x),
            ids: self.mem(ids),
            experts: args.experts.iter().map(pair).collect(),
            out: self.mem_mut(out),
            rows: args.rows,
            top_k: args.top_k,
            inputs: args.inputs,
            outputs: args.outputs,
            act: args.act,
        })
    }

    fn moe_down(
        &self,
        (x, residual, out): (Slot, Option<Slot>, Slot),
        routing: &Routing,
        args: &MoeDownOp,
    ) -> Op<'a> {
        let experts = args.experts.iter();
        let experts = experts.map(|&id| self.bound.weight(id).matrix());
        Op::MoeDown(ops::MoeDown {
            x: self.mem(x),
            ids: self.mem(routing.ids),
            weights: self.mem(routing.weights),
            experts: experts.collect(),
            residual: residual.map(|r| self.mem(r)),
            out: self.mem_mut(out),
            rows: args.rows,
            top_k: args.top_k,
            inputs: args.inputs,
            outputs: args.outputs,
        })
    }

    fn rope_append<'s: 'a>(
        &self,
        [q, k, v]: [Slot; 3],
        (step, slots): (&'s StepBlock, Mem<'a>),
        ((k_cache, v_cache, k_centers), kv): ((MemMut<'s>, MemMut<'s>, Mem<'s>), KvType),
        args: &RopeOp,
    ) -> Op<'a> {
        let positions = match args.sections {
            Some(_) => StepField::AxisPositions,
            None => StepField::Positions,
        };
        Op::RopeAppend(ops::RopeAppend {
            q: self.mem_mut(q),
            k: self.mem(k),
            v: self.mem(v),
            positions: self.arena.step(step, positions),
            slots,
            inv_freq: args
                .inv_freq
                .map_or(Mem::host::<f32>(&[]), |w| self.dense(w)),
            k_centers: match args.sections {
                // Positions on axes do not say which page a token is in.
                Some(_) => Mem::host::<half::f16>(&[]),
                None => k_centers,
            },
            k_cache,
            v_cache,
            kv,
            rows: step.key().rows,
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            style: args.style,
            attention_factor: args.attention_factor,
            sections: args.sections,
        })
    }

    fn attention<'s: 'a>(
        &self,
        (q, out): (Slot, Slot),
        (step, block_table): (&'s StepBlock, Mem<'a>),
        ((k_cache, v_cache), kv): ((Mem<'s>, Mem<'s>), KvType),
        args: &AttnOp,
    ) -> Op<'a> {
        let key = step.key();
        Op::PagedAttn(ops::PagedAttn {
            q: self.mem(q),
            k_cache,
            v_cache,
            kv,
            block_table,
            q_start: self.arena.step(step, StepField::QStart),
            kv_len: self.arena.step(step, StepField::KvLen),
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

/// The step's slots and block table for a layer of the cache. A plan whose key has no window pages has
/// no such arrays; ops over a cache with them are then refused by their size.
fn fields(kv: &KvBuffers, layer: usize) -> (StepField, StepField) {
    match kv.has_window_pages(layer) {
        true => (StepField::WindowSlots, StepField::WindowTable),
        false => (StepField::Slots, StepField::BlockTable),
    }
}
