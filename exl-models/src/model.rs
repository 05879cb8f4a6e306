//! A loaded model and the plans it runs by.

use std::path::Path;
use std::sync::Arc;

use exl_tensor::{
    CostReport, DType, KvShape, Phase, Plan, PlanBuilder, PlanKey, StepBlock, Weights,
};

use crate::load::{LoadOptions, ModelSource, Progress};
use crate::{Result, Spec, blocks};

/// A specification with all of its weights.
#[derive(Clone, Debug)]
pub struct Model {
    spec: Arc<Spec>,
    weights: Weights,
}

/// A part of a model that calibration runs by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockPart {
    /// Tokens of the step in, `hidden` out. Needs no layer.
    Embed,
    /// Attention half of a layer with its norm and residual: `hidden` in and out.
    Attention(usize),
    /// MLP half of a layer with its norm and residual: `hidden` in and out.
    Mlp(usize),
    /// A whole layer: `hidden` in and out.
    Layer(usize),
    /// Final norm and head over every row: `hidden` in, `logits` out.
    Head,
}

/// What running a model takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Weights.
    pub weights: u64,
    /// KV cache.
    pub cache: u64,
    /// Activations of the largest step.
    pub arena: u64,
    /// The step's own arrays: tokens, positions, block tables.
    pub step: u64,
}

/// The setting for which memory is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Tokens per sequence.
    pub context: usize,
    /// Sequences at once, each with its own cache.
    pub seqs: usize,
    /// Storage of the cache.
    pub kv_dtype: DType,
    /// Token rows of the largest prefill step.
    pub rows: usize,
}

impl Model {
    /// Opens a model directory and loads everything.
    ///
    /// # Errors
    /// Damaged or missing files, an unknown architecture, tensors that do not fit it.
    pub fn open(dir: &Path, options: &LoadOptions) -> Result<Self> {
        Self::open_with(dir, options, &|_| ())
    }

    /// As [`Model::open`], telling `progress` how far it is (from any thread).
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_with(
        dir: &Path,
        options: &LoadOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self> {
        ModelSource::open(dir, options)?.load(progress)
    }

    /// From parts made elsewhere; plans check names and shapes when they are bound.
    pub fn from_parts(spec: Arc<Spec>, weights: Weights) -> Self {
        Self { spec, weights }
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// Its weights, the constant rope tables included.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Shape of its KV cache.
    pub fn kv_shape(&self, dtype: DType) -> KvShape {
        self.spec.kv_shape(dtype)
    }

    /// The forward pass for one shape. Output `logits` `[out_rows, vocab]`, absent when no row
    /// wants any; with [`PlanKey::sample`] also `tokens` I32 `[out_rows, 1]`, for which penalties
    /// and blocked ids are applied to the logits.
    pub fn plan(&self, key: &PlanKey) -> Plan {
        plan(&self.spec, key)
    }

    /// Bytes, operations and launches of one step with `context` tokens in each sequence.
    pub fn cost(&self, key: &PlanKey, kv_dtype: DType, context: usize) -> CostReport {
        let bytes = |name: &str| self.weights.get(name).map_or(0, |w| w.bytes() as u64);
        CostReport::new(&self.plan(key), &self.kv_shape(kv_dtype), context, bytes)
    }

    /// Memory needed to run, exact for everything but allocator slack.
    pub fn memory_for(&self, request: &MemoryRequest) -> MemoryUse {
        memory_for(&self.spec, self.weights.bytes() as u64, request)
    }
}

/// The forward pass of a spec for one shape. It has no taps: those are in [`block_plan`]s.
pub fn plan(spec: &Spec, key: &PlanKey) -> Plan {
    let mut b = PlanBuilder::new(key.clone(), false);
    blocks::decoder(&mut b, spec);
    b.finish()
}

/// A part of the model by itself, for calibration.
///
/// Input slot `hidden` `[rows, hidden]` (except for [`BlockPart::Embed`]), output slot `hidden` or
/// `logits` over all rows; with phase [`Phase::Calibrate`] the input of every linear is tapped
/// under its site's name ([`crate::sites`]). Attention uses the cache's layer 0
/// ([`Spec::block_kv_shape`]). `key.out_rows` is not used.
///
/// # Panics
/// When the layer's index is out of range.
pub fn block_plan(spec: &Spec, part: BlockPart, key: &PlanKey) -> Plan {
    let mut b = PlanBuilder::new(key.clone(), key.phase == Phase::Calibrate);
    if part == BlockPart::Embed {
        let hidden = blocks::embed(&mut b, spec);
        b.output("hidden", hidden);
        return b.finish();
    }
    let hidden = b.input("hidden", key.rows, spec.hidden);
    let (name, out) = match part {
        BlockPart::Attention(i) => (
            "hidden",
            blocks::attention(&mut b, spec, &spec.layers[i], 0, hidden),
        ),
        BlockPart::Mlp(i) => ("hidden", blocks::mlp(&mut b, &spec.layers[i], hidden)),
        BlockPart::Layer(i) => (
            "hidden",
            blocks::layer(&mut b, spec, &spec.layers[i], 0, hidden),
        ),
        BlockPart::Head | BlockPart::Embed => ("logits", blocks::logits(&mut b, spec, hidden)),
    };
    b.output(name, out);
    b.finish()
}

impl MemoryUse {
    /// The sum.
    pub fn total(&self) -> u64 {
        let parts = [self.weights, self.cache, self.arena, self.step];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Memory of a model that need not be loaded; `weights` is the size of its weights.
pub fn memory_for(spec: &Spec, weights: u64, request: &MemoryRequest) -> MemoryUse {
    let pages_per_seq = request.context.div_ceil(exl_tensor::PAGE_TOKENS).max(1);
    let prefill = PlanKey {
        phase: Phase::Prefill,
        rows: request.rows.max(1),
        seqs: 1,
        pages_per_seq: pages_per_seq.next_power_of_two(),
        out_rows: 1,
        sample: None,
    };
    let seqs = request.seqs.max(1);
    let decode = PlanKey {
        phase: Phase::Decode,
        rows: seqs,
        seqs,
        out_rows: seqs,
        ..prefill.clone()
    };
    let arena = |key| plan(spec, key).arena().bytes() as u64;
    // One page more: page 0 takes the writes of padding rows.
    let pages = seqs.saturating_mul(pages_per_seq).saturating_add(1);
    MemoryUse {
        weights,
        cache: spec.kv_shape(request.kv_dtype).bytes(pages) as u64,
        arena: arena(&prefill).max(arena(&decode)),
        step: StepBlock::bytes_for(&prefill).max(StepBlock::bytes_for(&decode)) as u64,
    }
}
