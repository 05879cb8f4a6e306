//! The recorded plan: a flat list of coarse ops over arena slots, for one concrete shape.

mod builder;
mod moe;
mod text;

pub use builder::{AttnArgs, GateUpArgs, Part, PlanAdapter, PlanBuilder, RopeArgs, Routing};

pub use moe::{MoeDownOp, MoeGateUpOp, MoeRouteOp};

use exl_kernels::DType;
use exl_kernels::ops::{Activation, RopeStyle};

use crate::StepField;
use crate::arena::ArenaLayout;

/// A region of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub(crate) u32);

/// A weight the plan reads, an index into [`Plan::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub(crate) u32);

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Several new tokens per sequence.
    Prefill,
    /// One new token per sequence.
    Decode,
    /// Hidden states in, tapped layer inputs and hidden states out.
    Calibrate,
}

/// The concrete shape a plan is recorded for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PlanKey {
    /// What it is for.
    pub phase: Phase,
    /// Token rows over all sequences.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Width of the block table: pages a sequence can have.
    pub pages_per_seq: usize,
    /// Rows that get logits.
    pub out_rows: usize,
    /// Set when the plan also chooses the next token of every row that gets logits.
    pub sample: Option<SampleShape>,
    /// What only some steps have.
    pub extras: PlanExtras,
}

/// What a step has beyond tokens in and logits out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PlanExtras {
    /// Adapters that some of its rows use, as numbers of whoever records plans, rising.
    pub adapters: Vec<u32>,
    /// Some of its rows have vectors in place of tokens.
    pub vectors: bool,
    /// Rows whose last hidden state is wanted.
    pub hidden_rows: usize,
    /// Sliding layers have pages of their own ([`crate::KvPages::window`]).
    pub window_pages: bool,
    /// Some of its rows have positions on axes ([`RopeArgs::sections`]).
    pub axes: bool,
}

impl PlanExtras {
    /// Scales of a row ([`PlanOp::ScaleRows`]): one of each adapter, and with vectors the share of its
    /// token's embedding.
    pub fn scales(&self) -> usize {
        self.adapters.len() + usize::from(self.vectors)
    }
}

/// Rows of a step that an op works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RowSet {
    /// All of them.
    #[default]
    All,
    /// Those that get logits.
    Out,
    /// Those whose last hidden state is wanted.
    Hidden,
}

impl RowSet {
    /// The step's array of their scales.
    pub(crate) fn scales(self) -> StepField {
        match self {
            Self::All => StepField::RowScales,
            Self::Out => StepField::OutRowScales,
            Self::Hidden => StepField::HiddenRowScales,
        }
    }
}

/// What [`PlanOp::ScaleRows`] multiplies rows by, besides its factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowScales {
    /// Nothing: the factor is that of all rows.
    None,
    /// A column of the step's array for these rows ([`PlanExtras::scales`]).
    Step(RowSet, usize),
    /// F32 `[rows, 1]`.
    Slot(Slot),
}

impl RowScales {
    fn slot(self) -> Option<Slot> {
        match self {
            Self::Slot(slot) => Some(slot),
            Self::None | Self::Step(..) => None,
        }
    }
}

/// Sizes of the choice of tokens: widths of the step's arrays that [`PlanOp::Sample`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleShape {
    /// Tokens that exist, at least 1 and at most the logits of a row; those beyond are padding.
    pub tokens: usize,
    /// Tokens seen that a row can hold for its penalties.
    pub window: usize,
    /// Ids that a row can exclude.
    pub blocked: usize,
}

/// A slot's name, element type, size and life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Where it comes from, for people.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Elements per row.
    pub dim: usize,
    /// First op that touches it; inputs live from op 0.
    pub first: usize,
    /// Last op that touches it; outputs and taps live to the end.
    pub last: usize,
}

impl SlotInfo {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.rows * self.dim * self.dtype.bytes()
    }
}

/// A weight as the plan expects it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightInfo {
    /// Name in [`crate::Weights`].
    pub name: String,
    /// `[outputs, inputs]` for matrices, `[n]` for vectors.
    pub shape: Vec<usize>,
}

/// One product of [`PlanOp::Linear`].
#[derive(Clone, Debug, PartialEq)]
pub struct PlanPart {
    /// The matrix.
    pub weight: WeightId,
    /// Added to every row.
    pub bias: Option<WeightId>,
    /// Added to the product; equals `out` for an in-place residual.
    pub residual: Option<Slot>,
    /// Where the product goes.
    pub out: Slot,
    /// Output features.
    pub outputs: usize,
}

/// One op of a plan. Operands are slots, weights and arrays of the step block; the arguments'
/// meaning is that of the structs in [`exl_kernels::ops`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)] // fields mirror exl_kernels::ops
pub enum PlanOp {
    /// The rows of the table that `ids` names: tokens, or positions.
    Embed {
        table: WeightId,
        ids: StepField,
        add: Option<Slot>,
        out: Slot,
        vocab: usize,
        dim: usize,
        scale: f32,
    },
    RmsNorm {
        x: Slot,
        weight: WeightId,
        residual: Option<Slot>,
        out: Slot,
        rows: usize,
        dim: usize,
        eps: f32,
        offset: f32,
    },
    LayerNorm {
        x: Slot,
        out: Slot,
        args: LayerNormOp,
    },
    Linear {
        x: Slot,
        rows: usize,
        inputs: usize,
        parts: Vec<PlanPart>,
    },
    GateUp {
        x: Slot,
        out: Slot,
        rows: usize,
        inputs: usize,
        args: GateUpOp,
    },
    RopeAppend {
        q: Slot,
        k: Slot,
        v: Slot,
        layer: usize,
        args: RopeOp,
    },
    PagedAttn {
        q: Slot,
        out: Slot,
        layer: usize,
        args: AttnOp,
    },
    GatherRows {
        x: Slot,
        out: Slot,
        rows: usize,
        dim: usize,
        set: RowSet,
    },
    ScaleRows {
        x: Slot,
        scales: RowScales,
        factor: f32,
        add: Option<Slot>,
        out: Slot,
    },
    Clamp {
        x: Slot,
        limit: f32,
    },
    Gated {
        gate: Slot,
        up: Option<Slot>,
        out: Slot,
        act: Activation,
    },
    MoeRoute {
        logits: Slot,
        ids: Slot,
        weights: Slot,
        args: MoeRouteOp,
    },
    MoeGateUp {
        x: Slot,
        ids: Slot,
        out: Slot,
        args: MoeGateUpOp,
    },
    MoeDown {
        x: Slot,
        routing: Routing,
        residual: Option<Slot>,
        out: Slot,
        args: MoeDownOp,
    },
    ScaleLogits {
        x: Slot,
        rows: usize,
        dim: usize,
        scale: f32,
        softcap: f32,
    },
    Sample {
        logits: Slot,
        out: Slot,
        rows: usize,
        vocab: usize,
        shape: SampleShape,
    },
}

/// Arguments of [`PlanOp::LayerNorm`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::LayerNorm
pub struct LayerNormOp {
    pub weight: Option<WeightId>,
    pub bias: Option<WeightId>,
    pub rows: usize,
    pub dim: usize,
    pub groups: usize,
    pub eps: f32,
}

/// Arguments of [`PlanOp::GateUp`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::GateUp
pub struct GateUpOp {
    pub gate: WeightId,
    pub up: WeightId,
    pub gate_bias: Option<WeightId>,
    pub up_bias: Option<WeightId>,
    pub outputs: usize,
    pub act: Activation,
}

/// Arguments of [`PlanOp::RopeAppend`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::RopeAppend
pub struct RopeOp {
    pub inv_freq: Option<WeightId>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub style: RopeStyle,
    pub attention_factor: f32,
    pub sections: Option<[usize; 3]>,
}

/// Arguments of [`PlanOp::PagedAttn`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::PagedAttn
pub struct AttnOp {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub softcap: f32,
    pub window: usize,
}

impl PlanOp {
    /// The op's name, as in [`exl_kernels::ops::Op::name`].
    pub fn name(&self) -> &'static str {
        match self {
            PlanOp::Embed { .. } => "embed",
            PlanOp::RmsNorm { .. } => "rms_norm",
            PlanOp::LayerNorm { .. } => "layer_norm",
            PlanOp::Linear { .. } => "linear",
            PlanOp::GateUp { .. } => "gate_up",
            PlanOp::RopeAppend { .. } => "rope_append",
            PlanOp::PagedAttn { .. } => "paged_attn",
            PlanOp::GatherRows { .. } => "gather_rows",
            PlanOp::ScaleRows { .. } => "scale_rows",
            PlanOp::Clamp { .. } => "clamp",
            PlanOp::Gated { .. } => "gated",
            PlanOp::MoeRoute { .. } => "moe_route",
            PlanOp::MoeGateUp { .. } => "moe_gate_up",
            PlanOp::MoeDown { .. } => "moe_down",
            PlanOp::ScaleLogits { .. } => "scale_logits",
            PlanOp::Sample { .. } => "sample",
        }
    }

    /// Slots the op reads.
    pub fn reads(&self) -> Vec<Slot> {
        match self {
            PlanOp::Embed { add, .. } => add.iter().copied().collect(),
            PlanOp::RmsNorm { x, residual, .. } => std::iter::once(*x).chain(*residual).collect(),
            PlanOp::LayerNorm { x, .. }
            | PlanOp::GateUp { x, .. }
            | PlanOp::GatherRows { x, .. }
            | PlanOp::Clamp { x, .. }
            | PlanOp::ScaleLogits { x, .. } => vec![*x],
            PlanOp::Linear { x, parts, .. } => std::iter::once(*x)
                .chain(parts.iter().filter_map(|p| p.residual))
                .collect(),
            PlanOp::ScaleRows { x, scales, add, .. } => {
                let slots = [Some(*x), scales.slot(), *add];
                slots.into_iter().flatten().collect()
            }
            PlanOp::Gated { gate, up, .. } => std::iter::once(*gate).chain(*up).collect(),
            PlanOp::MoeRoute { logits, .. } => vec![*logits],
            PlanOp::MoeGateUp { x, ids, .. } => vec![*x, *ids],
            PlanOp::MoeDown {
                x,
                routing,
                residual,
                ..
            } => {
                let read = [*x, routing.ids, routing.weights];
                read.into_iter().chain(*residual).collect()
            }
            PlanOp::RopeAppend { q, k, v, .. } => vec![*q, *k, *v],
            PlanOp::PagedAttn { q, .. } => vec![*q],
            PlanOp::Sample { logits, .. } => vec![*logits],
        }
    }

    /// Slots the op writes.
    pub fn writes(&self) -> Vec<Slot> {
        match self {
            PlanOp::Embed { out, .. }
            | PlanOp::RmsNorm { out, .. }
            | PlanOp::LayerNorm { out, .. }
            | PlanOp::GateUp { out, .. }
            | PlanOp::PagedAttn { out, .. }
            | PlanOp::GatherRows { out, .. }
            | PlanOp::ScaleRows { out, .. }
            | PlanOp::Gated { out, .. }
            | PlanOp::MoeGateUp { out, .. }
            | PlanOp::MoeDown { out, .. } => vec![*out],
            PlanOp::MoeRoute { ids, weights, .. } => vec![*ids, *weights],
            PlanOp::Linear { parts, .. } => parts.iter().map(|p| p.out).collect(),
            PlanOp::RopeAppend { q, .. } => vec![*q],
            PlanOp::Clamp { x, .. } | PlanOp::ScaleLogits { x, .. } => vec![*x],
            PlanOp::Sample { logits, out, .. } => vec![*logits, *out],
        }
    }
}

/// A recorded forward pass. Immutable data: printable ([`std::fmt::Display`]), comparable,
/// countable; it points at nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub(crate) key: PlanKey,
    pub(crate) ops: Vec<PlanOp>,
    pub(crate) slots: Vec<SlotInfo>,
    pub(crate) weights: Vec<WeightInfo>,
    pub(crate) inputs: Vec<(String, Slot)>,
    pub(crate) outputs: Vec<(String, Slot)>,
    pub(crate) taps: Vec<(String, Slot)>,
    pub(crate) arena: ArenaLayout,
}

impl Plan {
    /// The shape it was recorded for.
    pub fn key(&self) -> &PlanKey {
        &self.key
    }

    /// The ops in order.
    pub fn ops(&self) -> &[PlanOp] {
        &self.ops
    }

    /// The slots.
    pub fn slots(&self) -> &[SlotInfo] {
        &self.slots
    }

    /// A slot's description.
    pub fn slot(&self, slot: Slot) -> &SlotInfo {
        &self.slots[slot.0 as usize]
    }

    /// The weights it reads.
    pub fn weights(&self) -> &[WeightInfo] {
        &self.weights
    }

    /// Name and shape of a weight.
    pub fn weight(&self, id: WeightId) -> &WeightInfo {
        &self.weights[id.0 as usize]
    }

    /// Where the slots lie in the arena.
    pub fn arena(&self) -> &ArenaLayout {
        &self.arena
    }

    /// Where the positions of its steps must end: the rows of the smallest table of positions.
    pub fn position_limit(&self) -> Option<usize> {
        let tables = self.ops.iter().filter_map(|op| match op {
            PlanOp::Embed { ids, vocab, .. } => (*ids == StepField::Positions).then_some(*vocab),
            _ => None,
        });
        tables.min()
    }

    /// Slots the host writes before a run.
    pub fn input(&self, name: &str) -> Option<Slot> {
        find(&self.inputs, name)
    }

    /// Slots the host reads after a run.
    pub fn output(&self, name: &str) -> Option<Slot> {
        find(&self.outputs, name)
    }

    /// Slots kept for the host to look at: layer inputs for calibration.
    pub fn taps(&self) -> &[(String, Slot)] {
        &self.taps
    }
}

fn find(list: &[(String, Slot)], name: &str) -> Option<Slot> {
    list.iter().find(|(n, _)| n == name).map(|&(_, s)| s)
}
