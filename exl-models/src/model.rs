//! A loaded model and the plans it runs by.

use std::path::Path;
use std::sync::Arc;

use exl_tensor::{
    CostReport, DeviceProps, GpuSketch, KvPages, KvShape, KvType, PAGE_TOKENS, Phase, Plan,
    PlanAdapter, PlanBuilder, PlanExtras, PlanKey, PlanMemory, SampleShape, StepBlock, Weights,
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
    /// Scratch memory of a GPU's kernels; the CPU's are small and not counted here.
    pub scratch: u64,
    /// The step's own arrays: tokens, positions, block tables.
    pub step: u64,
}

/// Pages that sliding layers have ([`exl_tensor::SlidingLayers`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowPages {
    /// Those of all other layers: sequences name none for them.
    #[default]
    All,
    /// What their windows need ([`KvShape::windowed`]): sequences name pages for them
    /// ([`crate::SliceExtras::window_pages`]) where that is less than all.
    Needed,
}

/// The setting for which memory is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Sequences at once.
    pub seqs: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// Pages of the layers with a window.
    pub window_pages: WindowPages,
    /// Storage of the cache.
    pub kv_type: KvType,
    /// Token rows of the largest step.
    pub rows: usize,
    /// Rows of the largest step that get logits, where they are more than one of each sequence.
    pub out_rows: usize,
}

impl MemoryRequest {
    /// For `seqs` sequences of `context` tokens, each with its own cache, in steps of up to `rows`
    /// tokens, with logits of one row for each.
    pub fn new((seqs, context): (usize, usize), kv_type: KvType, rows: usize) -> Self {
        let pages = context.div_ceil(PAGE_TOKENS).max(1);
        Self {
            context,
            seqs: seqs.max(1),
            pages: seqs.max(1).saturating_mul(pages),
            window_pages: WindowPages::All,
            kv_type,
            rows,
            out_rows: 0,
        }
    }

    /// Pages of a cache of this shape.
    pub fn kv_pages(&self, shape: &KvShape) -> KvPages {
        match self.window_pages {
            WindowPages::All => self.pages.into(),
            WindowPages::Needed => {
                let steps = (self.seqs.max(1), self.rows.max(1));
                shape.windowed(self.pages, steps)
            }
        }
    }

    /// The largest steps with a cache of this shape: a part of a prompt beside the other sequences, one token of
    /// each, and one of a single sequence, for which a GPU may want more scratch memory than for several. With
    /// tokens, one is drawn for each sequence, without penalties and blocked ids: those make the step block larger
    /// by 4 bytes for each token that a row looks back at and each id. Logits of more rows are not drawn from.
    pub fn steps(&self, shape: &KvShape, tokens: Option<usize>) -> [PlanKey; 3] {
        let pages_per_seq = self.context.div_ceil(PAGE_TOKENS).max(1);
        let (rows, seqs) = (self.rows.max(1), self.seqs.max(1));
        let sample = tokens.map(|tokens| SampleShape {
            tokens,
            window: 0,
            blocked: 0,
        });
        let extras = PlanExtras {
            window_pages: self.kv_pages(shape).window.is_some(),
            ..PlanExtras::default()
        };
        let step = |phase, rows: usize, out_rows: usize| PlanKey {
            phase,
            rows,
            seqs: seqs.min(rows),
            pages_per_seq: pages_per_seq.next_power_of_two(),
            out_rows: out_rows.min(rows),
            sample: sample.filter(|_| out_rows <= seqs),
            extras: extras.clone(),
        };
        [
            step(Phase::Prefill, rows, self.out_rows.max(seqs)),
            step(Phase::Decode, seqs, seqs),
            step(Phase::Decode, 1, 1),
        ]
    }
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
    pub fn kv_shape(&self, kv: KvType) -> KvShape {
        self.spec.kv_shape(kv)
    }

    /// The forward pass for one shape. Output `logits` `[out_rows, vocab]`, absent when no row
    /// wants any; with [`PlanKey::sample`] also `tokens` I32 `[out_rows, 1]`, for which penalties
    /// and blocked ids are applied to the logits; with [`exl_tensor::PlanExtras::hidden_rows`] also
    /// `hidden` `[hidden_rows, hidden]`, the states behind the final norm.
    pub fn plan(&self, key: &PlanKey) -> Plan {
        plan(&self.spec, key)
    }

    /// Bytes, operations and launches of one step with `context` tokens in each sequence.
    pub fn cost(&self, key: &PlanKey, kv_type: KvType, context: usize) -> CostReport {
        let bytes = |name: &str| self.weights.get(name).map_or(0, |w| w.bytes() as u64);
        CostReport::new(&self.plan(key), &self.kv_shape(kv_type), context, bytes)
    }

    /// Memory needed to run, exact for everything but allocator slack.
    pub fn memory_for(&self, request: &MemoryRequest) -> MemoryUse {
        memory_for(&self.spec, self.weights.bytes() as u64, request)
    }
}

/// The forward pass of a spec for one shape. It has no taps: those are in [`block_plan`]s. A key with
/// adapters is recorded without what they add; [`Runner`](crate::Runner) knows them.
pub fn plan(spec: &Spec, key: &PlanKey) -> Plan {
    plan_adapted(spec, key, Vec::new())
}

/// As [`plan`], with the adapters of the key, in its order.
pub(crate) fn plan_adapted(spec: &Spec, key: &PlanKey, adapters: Vec<PlanAdapter>) -> Plan {
    let mut b = PlanBuilder::new(key.clone(), false).with_adapters(adapters);
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
    /// Both at once.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            weights: self.weights.saturating_add(other.weights),
            cache: self.cache.saturating_add(other.cache),
            arena: self.arena.saturating_add(other.arena),
            scratch: self.scratch.saturating_add(other.scratch),
            step: self.step.saturating_add(other.step),
        }
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        let parts = [
            self.weights,
            self.cache,
            self.arena,
            self.scratch,
            self.step,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Memory of a model that need not be loaded; `weights` is the size of its weights.
pub fn memory_for(spec: &Spec, weights: u64, request: &MemoryRequest) -> MemoryUse {
    let shape = spec.kv_shape(request.kv_type);
    let steps = request.steps(&shape, None);
    let arena = steps.each_ref().map(|key| plan(spec, key).arena().bytes());
    let step = steps.each_ref().map(StepBlock::bytes_for);
    MemoryUse {
        weights,
        cache: cache_bytes(&shape, request),
        arena: arena.into_iter().max().unwrap_or(0) as u64,
        scratch: 0,
        step: step.into_iter().max().unwrap_or(0) as u64,
    }
}

/// Memory of a model on a GPU, loaded or not.
///
/// # Errors
/// [`crate::Error::Exec`] when the sketch is not of this model.
pub(crate) fn gpu_memory_for(
    spec: &Spec,
    sketch: &GpuSketch,
    props: &DeviceProps,
    request: &MemoryRequest,
) -> Result<MemoryUse> {
    let shape = spec.kv_shape(request.kv_type);
    let mut most = PlanMemory::default();
    let pages = request.kv_pages(&shape);
    for key in request.steps(&shape, Some(spec.vocab)) {
        let plan = Arc::new(plan(spec, &key));
        most = most.max(sketch.plan(&plan, (&shape, pages), props)?);
    }
    Ok(MemoryUse {
        weights: sketch.weight_bytes(),
        cache: cache_bytes(&shape, request),
        arena: most.arena,
        scratch: most.scratch,
        step: most.step,
    })
}

fn cache_bytes(shape: &KvShape, request: &MemoryRequest) -> u64 {
    shape.bytes(request.kv_pages(shape)) as u64
}

#[cfg(test)]
mod tests;
