//! Records a plan: what architecture code talks to.

mod adapters;
mod moe;
mod rows;

use std::collections::HashMap;

use exl_kernels::DType;
use exl_kernels::ops::{Activation, RopeStyle};

use super::{
    AttnOp, GateUpOp, Plan, PlanKey, PlanOp, PlanPart, RopeOp, RowSet, Slot, SlotInfo, WeightId,
    WeightInfo,
};
use crate::StepField;
use crate::arena::ArenaLayout;
pub use adapters::PlanAdapter;
pub use moe::Routing;

/// One product of [`PlanBuilder::linear`].
#[derive(Clone, Debug)]
pub struct Part {
    /// The matrix, `[outputs, inputs]`.
    pub weight: WeightId,
    /// Its bias.
    pub bias: Option<WeightId>,
}

/// Arguments of [`PlanBuilder::gate_up`].
#[derive(Clone, Debug)]
pub struct GateUpArgs {
    /// Activated branch.
    pub gate: Part,
    /// Multiplied branch.
    pub up: Part,
    /// Activation of the gate.
    pub act: Activation,
}

/// Arguments of [`PlanBuilder::rope_append`].
#[derive(Clone, Debug)]
pub struct RopeArgs {
    /// Angles per position, F32 `[rotary_dim / 2]`; `None` for no rotation.
    pub inv_freq: Option<WeightId>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Pairing.
    pub style: RopeStyle,
    /// Multiplies sine and cosine.
    pub attention_factor: f32,
    /// Frequencies of each position axis (time, height, width), as many together as `inv_freq` has. They
    /// count in plans whose key has axes; in others every row has one position.
    pub sections: Option<[usize; 3]>,
}

/// Arguments of [`PlanBuilder::attention`].
#[derive(Clone, Debug)]
pub struct AttnArgs {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Score multiplier.
    pub scale: f32,
    /// Score soft-cap, 0 for none.
    pub softcap: f32,
    /// Sliding window in tokens, 0 for none.
    pub window: usize,
}

/// Records ops in order. Methods return the slot they write; the shapes of slots are the
/// builder's knowledge, so that arch code only names weights.
#[derive(Debug)]
pub struct PlanBuilder {
    key: PlanKey,
    ops: Vec<PlanOp>,
    slots: Vec<SlotInfo>,
    weights: Vec<WeightInfo>,
    weight_ids: HashMap<String, WeightId>,
    inputs: Vec<(String, Slot)>,
    outputs: Vec<(String, Slot)>,
    taps: Vec<(String, Slot)>,
    tapping: bool,
    /// Those of the key, in its order.
    adapters: Vec<PlanAdapter>,
    /// Rows that the ops being recorded work on.
    set: RowSet,
}

impl PlanBuilder {
    /// A recorder for one shape. `tapping` keeps the slots passed to [`Self::tap`].
    pub fn new(key: PlanKey, tapping: bool) -> Self {
        Self {
            key,
            ops: Vec::new(),
            slots: Vec::new(),
            weights: Vec::new(),
            weight_ids: HashMap::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            taps: Vec::new(),
            tapping,
            adapters: Vec::new(),
            set: RowSet::All,
        }
    }

    /// The shape being recorded.
    pub fn key(&self) -> &PlanKey {
        &self.key
    }

    /// Refers to a weight by name; `shape` is `[outputs, inputs]` or `[n]`.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> WeightId {
        if let Some(&id) = self.weight_ids.get(name) {
            return id;
        }
        let id = WeightId(self.weights.len() as u32);
        self.weights.push(WeightInfo {
            name: name.to_owned(),
            shape: shape.to_vec(),
        });
        self.weight_ids.insert(name.to_owned(), id);
        id
    }

    /// A slot the host fills before each run: F32 `[rows, dim]`.
    pub fn input(&mut self, name: &str, rows: usize, dim: usize) -> Slot {
        let slot = self.new_slot(name, rows, dim);
        self.slots[slot.0 as usize].first = 0;
        self.inputs.push((name.to_owned(), slot));
        slot
    }

    /// Names a slot the host reads after each run.
    pub fn output(&mut self, name: &str, slot: Slot) {
        self.outputs.push((name.to_owned(), slot));
    }

    /// Keeps the value of a slot for calibration, when taps are on. The slot must not be written
    /// again afterwards.
    pub fn tap(&mut self, name: &str, slot: Slot) {
        if self.tapping {
            self.taps.push((name.to_owned(), slot));
        }
    }

    /// Elements per row of a slot.
    pub fn dim(&self, slot: Slot) -> usize {
        self.slots[slot.0 as usize].dim
    }

    /// Rows of a slot.
    pub fn rows(&self, slot: Slot) -> usize {
        self.slots[slot.0 as usize].rows
    }

    /// Token embedding: `[rows, dim]`.
    pub fn embed(&mut self, table: WeightId, scale: f32) -> Slot {
        let (vocab, dim) = self.matrix_shape(table);
        let out = self.new_slot("embed", self.key.rows, dim);
        self.push(PlanOp::Embed {
            table,
            ids: StepField::Tokens,
            add: None,
            out,
            vocab,
            dim,
            scale,
        });
        out
    }

    /// RMS norm over a slot's rows.
    pub fn rms_norm(&mut self, x: Slot, weight: WeightId, eps: f32, offset: f32) -> Slot {
        let (rows, dim) = (self.rows(x), self.dim(x));
        let out = self.new_slot("norm", rows, dim);
        self.push(PlanOp::RmsNorm {
            x,
            weight,
            residual: None,
            out,
            rows,
            dim,
            eps,
            offset,
        });
        out
    }

    /// RMS norm over each head of a slot `[rows, heads * head_dim]`, in place.
    pub fn head_norm(&mut self, x: Slot, weight: WeightId, head_dim: usize, eps: f32, offset: f32) {
        let rows = self.rows(x) * self.dim(x) / head_dim;
        self.push(PlanOp::RmsNorm {
            x,
            weight,
            residual: None,
            out: x,
            rows,
            dim: head_dim,
            eps,
            offset,
        });
    }

    /// Products of one input with several matrices, and what adapters add to them; one output slot
    /// each.
    pub fn linear(&mut self, x: Slot, parts: &[Part]) -> Vec<Slot> {
        let outs = self.products(x, parts);
        let targets: Vec<(WeightId, Slot)> = parts
            .iter()
            .map(|p| p.weight)
            .zip(outs.iter().copied())
            .collect();
        self.adapt(x, &targets);
        outs
    }

    fn products(&mut self, x: Slot, parts: &[Part]) -> Vec<Slot> {
        let rows = self.rows(x);
        let plan_parts: Vec<PlanPart> = parts
            .iter()
            .map(|p| {
                let (outputs, _) = self.matrix_shape(p.weight);
                let name = self.short_name(p.weight);
                let out = self.new_slot(&name, rows, outputs);
                PlanPart {
                    weight: p.weight,
                    bias: p.bias,
                    residual: None,
                    out,
                    outputs,
                }
            })
            .collect();
        let outs = plan_parts.iter().map(|p| p.out).collect();
        self.push(PlanOp::Linear {
            x,
            rows,
            inputs: self.dim(x),
            parts: plan_parts,
        });
        outs
    }

    /// `residual += x W^T + bias`, and what adapters add, in place; returns `residual`.
    pub fn linear_add(&mut self, x: Slot, part: &Part, residual: Slot) -> Slot {
        self.product_add(x, part, residual);
        self.adapt(x, &[(part.weight, residual)]);
        residual
    }

    fn product_add(&mut self, x: Slot, part: &Part, residual: Slot) -> Slot {
        let (outputs, _) = self.matrix_shape(part.weight);
        let part = PlanPart {
            weight: part.weight,
            bias: part.bias,
            residual: Some(residual),
            out: residual,
            outputs,
        };
        self.push(PlanOp::Linear {
            x,
            rows: self.rows(x),
            inputs: self.dim(x),
            parts: vec![part],
        });
        residual
    }

    /// Gated half of an MLP. What an adapter adds comes before the activation, so then the two products
    /// stand alone.
    pub fn gate_up(&mut self, x: Slot, args: &GateUpArgs) -> Slot {
        if self.is_adapted(args.gate.weight) || self.is_adapted(args.up.weight) {
            let both = self.linear(x, &[args.gate.clone(), args.up.clone()]);
            let (gate, up, act) = (both[0], Some(both[1]), args.act);
            let out = gate;
            self.push(PlanOp::Gated { gate, up, out, act });
            return out;
        }
        let (outputs, _) = self.matrix_shape(args.up.weight);
        let (rows, inputs) = (self.rows(x), self.dim(x));
        let out = self.new_slot("gate_up", rows, outputs);
        let args = GateUpOp {
            gate: args.gate.weight,
            up: args.up.weight,
            gate_bias: args.gate.bias,
            up_bias: args.up.bias,
            outputs,
            act: args.act,
        };
        self.push(PlanOp::GateUp {
            x,
            out,
            rows,
            inputs,
            args,
        });
        out
    }

    /// Rotates q (in place) and k and appends k and v to the layer's cache. What is rotated is for
    /// [`Self::attention`] alone, and need not be left in memory.
    pub fn rope_append(&mut self, qkv: [Slot; 3], layer: usize, args: &RopeArgs) {
        let [q, k, v] = qkv;
        let args = RopeOp {
            inv_freq: args.inv_freq,
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            style: args.style,
            attention_factor: args.attention_factor,
            sections: args.sections.filter(|_| self.key.extras.axes),
        };
        self.push(PlanOp::RopeAppend {
            q,
            k,
            v,
            layer,
            args,
        });
    }

    /// Attention over the layer's cache.
    pub fn attention(&mut self, q: Slot, layer: usize, args: &AttnArgs) -> Slot {
        let out = self.new_slot("attn", self.rows(q), self.dim(q));
        let args = AttnOp {
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            scale: args.scale,
            softcap: args.softcap,
            window: args.window,
        };
        // Where each sequence has one row, a GPU does both ops at once: other blocks may still read k and v when one
        // writes its outputs.
        if let Some(&PlanOp::RopeAppend { q: own, k, v, .. }) = self.ops.last()
            && own == q
            && self.key.rows == self.key.seqs
        {
            self.keep_for_next(&[k, v]);
        }
        self.push(PlanOp::PagedAttn {
            q,
            out,
            layer,
            args,
        });
        out
    }

    /// The rows that get logits.
    pub fn gather_out_rows(&mut self, x: Slot) -> Slot {
        self.gather(x, (RowSet::Out, self.key.out_rows), "out_rows")
    }

    /// The rows whose last hidden state is wanted.
    pub fn gather_hidden_rows(&mut self, x: Slot) -> Slot {
        let rows = self.key.extras.hidden_rows;
        self.gather(x, (RowSet::Hidden, rows), "hidden_rows")
    }

    /// What is recorded from here on works on the rows that were gathered. One of one row is that row itself, if nobody
    /// else wants it: it is changed in place.
    fn gather(&mut self, x: Slot, (set, rows): (RowSet, usize), name: &str) -> Slot {
        if self.rows(x) == 1 && self.key.out_rows + self.key.extras.hidden_rows == 1 {
            self.set = set;
            return x;
        }
        let dim = self.dim(x);
        let out = self.new_slot(name, rows, dim);
        self.push(PlanOp::GatherRows {
            x,
            out,
            rows,
            dim,
            set,
        });
        self.set = set;
        out
    }

    /// Logit multiplier and final soft-cap, in place; records nothing when both are neutral.
    pub fn scale_logits(&mut self, x: Slot, scale: f32, softcap: f32) {
        if scale != 1.0 || softcap > 0.0 {
            let (rows, dim) = (self.rows(x), self.dim(x));
            self.push(PlanOp::ScaleLogits {
                x,
                rows,
                dim,
                scale,
                softcap,
            });
        }
    }

    /// Chooses the next token of each row of logits, when the key asks for it: I32 `[rows, 1]`.
    /// The logits are changed in place by penalties and excluded ids.
    pub fn sample(&mut self, logits: Slot) -> Option<Slot> {
        let shape = self.key.sample?;
        let (rows, vocab) = (self.rows(logits), self.dim(logits));
        let out = self.new_slot("tokens", rows, 1);
        self.slots[out.0 as usize].dtype = DType::I32;
        self.push(PlanOp::Sample {
            logits,
            out,
            rows,
            vocab,
            shape,
        });
        Some(out)
    }

    /// Ends recording and lays out the arena.
    pub fn finish(mut self) -> Plan {
        let end = self.ops.len();
        for (_, slot) in self.outputs.iter().chain(&self.taps) {
            self.slots[slot.0 as usize].last = end;
        }
        let arena = ArenaLayout::plan(&self.slots);
        Plan {
            key: self.key,
            ops: self.ops,
            slots: self.slots,
            weights: self.weights,
            inputs: self.inputs,
            outputs: self.outputs,
            taps: self.taps,
            arena,
        }
    }

    /// Outputs and inputs of a matrix, or rows and width of a table.
    fn matrix_shape(&self, id: WeightId) -> (usize, usize) {
        let shape = &self.weights[id.0 as usize].shape;
        (shape[0], shape.get(1).copied().unwrap_or(1))
    }

    /// `q_proj` of `model.layers.0.self_attn.q_proj`.
    fn short_name(&self, id: WeightId) -> String {
        let name = &self.weights[id.0 as usize].name;
        name.rsplit('.').next().unwrap_or(name).to_owned()
    }

    fn new_slot(&mut self, name: &str, rows: usize, dim: usize) -> Slot {
        let slot = Slot(self.slots.len() as u32);
        let at = self.ops.len();
        self.slots.push(SlotInfo {
            name: name.to_owned(),
            dtype: DType::F32,
            rows,
            dim,
            first: at,
            last: at,
        });
        slot
    }

    /// Keeps what the last op read or wrote through the next one as well.
    fn keep_for_next(&mut self, slots: &[Slot]) {
        let at = self.ops.len();
        for slot in slots {
            self.slots[slot.0 as usize].last = at;
        }
    }

    fn push(&mut self, op: PlanOp) {
        let at = self.ops.len();
        for slot in op.reads().into_iter().chain(op.writes()) {
            let info = &mut self.slots[slot.0 as usize];
            info.last = info.last.max(at);
        }
        self.ops.push(op);
    }
}
