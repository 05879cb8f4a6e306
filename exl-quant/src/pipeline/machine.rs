//! Runs parts of a model over one calibration row at a time.

use std::sync::Arc;

use exl_models::{BlockPart, LayerSpec, MlpSpec, Spec, block_plan, blocks};
use exl_tensor::{
    Bound, Buffer, DType, KvBuffers, KvType, PAGE_TOKENS, Phase, PlanBuilder, PlanKey, Slot,
    StepBlock, StepSeq, Weight, Weights,
};

use super::device::{Device, Engine, Tap};
use super::sites::{IDS, SHARED, X};
use crate::{Matrix, Result};

/// An executor with room for rows of one length.
#[derive(Debug)]
pub(super) struct Machine {
    spec: Arc<Spec>,
    device: Device,
    engine: Engine,
    kv: KvBuffers,
    step: StepBlock,
    key: PlanKey,
}

/// What a run of [`Machine::run`] hands out: slots by name.
#[derive(Debug)]
pub(super) struct Slots<'a> {
    engine: &'a mut Engine,
    bound: &'a Bound,
}

impl Slots<'_> {
    /// An output of the plan.
    pub(super) fn tap(&mut self, name: &str) -> Tap<'_> {
        self.try_tap(name)
            .expect("the plan was built with this output")
    }

    /// An output of the plan, if it has it.
    pub(super) fn try_tap(&mut self, name: &str) -> Option<Tap<'_>> {
        let slot = self.bound.plan().output(name)?;
        Some(Tap {
            engine: self.engine,
            bound: self.bound,
            slot,
        })
    }

    /// Copies the values of an output.
    pub(super) fn copy_to(&mut self, name: &str, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(self.tap(name).values()?);
        Ok(())
    }
}

impl Machine {
    /// For rows of `length` tokens.
    pub(super) fn new(spec: &Arc<Spec>, length: usize, device: &Device) -> Result<Self> {
        let key = Self::key(length);
        let shape = spec.block_kv_shape(KvType::F32);
        Ok(Self {
            spec: spec.clone(),
            // Plans run one after the other, each over all rows.
            engine: device.engine(1)?,
            kv: device.kv(shape, key.pages_per_seq)?,
            device: device.clone(),
            step: StepBlock::new(&key)?,
            key,
        })
    }

    /// The shape of the steps.
    pub(super) fn key(length: usize) -> PlanKey {
        PlanKey {
            phase: Phase::Calibrate,
            rows: length,
            seqs: 1,
            pages_per_seq: length.div_ceil(PAGE_TOKENS),
            out_rows: 0,
            sample: None,
            extras: Default::default(),
        }
    }

    /// The model.
    pub(super) fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// Where it computes.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// A part of the model with its weights.
    pub(super) fn part(&self, part: BlockPart, weights: &Weights) -> Result<Bound> {
        let plan = block_plan(&self.spec, part, &self.key);
        self.device.bind(plan, weights)
    }

    /// Tokens of the step in, `hidden` out.
    pub(super) fn embedding(&self, weights: &Weights) -> Result<Bound> {
        self.part(BlockPart::Embed, weights)
    }

    /// `hidden` in, `x` = the input of q, k and v.
    pub(super) fn attention_input(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, _, hidden| {
            let x = blocks::attention_input(b, layer, hidden);
            b.output(X, x);
        })
    }

    /// `hidden` in, `x` = the input of o.
    pub(super) fn attention_mixed(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, spec, hidden| {
            let x = blocks::attention_input(b, layer, hidden);
            let x = blocks::attention_mixed(b, spec, layer, 0, x);
            b.output(X, x);
        })
    }

    /// `hidden` and `x`, the input of o, in; `hidden` with what attention adds out.
    pub(super) fn attention_output(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, _, hidden| {
            let x = b.input(X, self.key.rows, layer.attn.o.inputs);
            let out = blocks::attention_output(b, layer, x, hidden);
            b.output("hidden", out);
        })
    }

    /// `hidden` in, `x` = the input of the MLP, with experts also `ids` = those of each token.
    pub(super) fn mlp_input(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, _, hidden| {
            let x = blocks::mlp_input(b, layer, hidden);
            if let MlpSpec::Moe(moe) = &layer.mlp {
                let routing = blocks::route(b, moe, x);
                b.output(IDS, routing.ids);
            }
            b.output(X, x);
        })
    }

    /// `hidden` in, `x` = the input of down, and `shared` = that of the shared expert's.
    pub(super) fn mlp_inner(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, _, hidden| {
            let x = blocks::mlp_input(b, layer, hidden);
            let inner = blocks::mlp_inner(b, &layer.mlp, x);
            b.output(X, inner.inner);
            if let Some(shared) = inner.shared {
                b.output(SHARED, shared);
            }
        })
    }

    /// What [`Machine::mlp_inner`] gave and `hidden` in, `hidden` with what the MLP adds out.
    pub(super) fn mlp_output(&self, layer: &LayerSpec, weights: &Weights) -> Result<Bound> {
        let rows = self.key.rows;
        self.record(weights, |b, _, hidden| {
            let inner = match &layer.mlp {
                MlpSpec::Dense(mlp) => blocks::MlpInner::dense(b.input(X, rows, mlp.down.inputs)),
                MlpSpec::Moe(moe) => {
                    let width = moe.experts.first().map_or(0, |e| e.down.inputs);
                    let inner = b.input(X, rows * moe.top_k, width);
                    let shared = moe.shared.as_ref();
                    let shared = shared.map(|s| b.input(SHARED, rows, s.mlp.down.inputs));
                    let x = blocks::mlp_input(b, layer, hidden);
                    blocks::MlpInner::routed(b, moe, x, (inner, shared))
                }
            };
            let out = blocks::mlp_output(b, layer, &inner, hidden);
            b.output("hidden", out);
        })
    }

    /// `hidden` in, `x` = the input of the head.
    pub(super) fn head_input(&self, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, spec, hidden| {
            let x = blocks::norm(b, Some(&spec.final_norm), hidden);
            b.output(X, x);
        })
    }

    fn record(
        &self,
        weights: &Weights,
        build: impl FnOnce(&mut PlanBuilder, &Spec, Slot),
    ) -> Result<Bound> {
        let mut b = PlanBuilder::new(self.key.clone(), false);
        let hidden = b.input("hidden", self.key.rows, self.spec.hidden);
        build(&mut b, &self.spec, hidden);
        self.device.bind(b.finish(), weights)
    }

    /// Embeds a row: `[length, hidden]`.
    pub(super) fn embed(&mut self, bound: &Bound, tokens: &[u32]) -> Result<Vec<f32>> {
        let pages: Vec<u32> = (0..self.key.pages_per_seq as u32).collect();
        self.step.fill(&[StepSeq {
            tokens,
            start: 0,
            pages: &pages,
            logits: (0, 0),
        }])?;
        Ok(self.run(bound, &[])?.tap("hidden").values()?.to_vec())
    }

    /// Runs a plan on one row; inputs by name. The step block must have been filled once, by
    /// [`Machine::embed`] or [`Machine::positions`]: only positions matter afterwards.
    pub(super) fn run<'a>(
        &'a mut self,
        bound: &'a Bound,
        inputs: &[(&str, &[f32])],
    ) -> Result<Slots<'a>> {
        let slot = |name: &str| {
            let slot = bound.plan().input(name);
            slot.expect("the plan was built with this input")
        };
        let inputs: Vec<_> = inputs
            .iter()
            .map(|&(n, values)| (slot(n), values))
            .collect();
        self.engine.run(bound, &inputs, &self.step, &mut self.kv)?;
        Ok(Slots {
            engine: &mut self.engine,
            bound,
        })
    }

    /// Fills the step block for a row whose tokens do not matter.
    pub(super) fn positions(&mut self) -> Result<()> {
        let tokens = vec![0u32; self.key.rows];
        let pages: Vec<u32> = (0..self.key.pages_per_seq as u32).collect();
        self.step.fill(&[StepSeq {
            tokens: &tokens,
            start: 0,
            pages: &pages,
            logits: (0, 0),
        }])?;
        Ok(())
    }
}

/// A decoded matrix `[inputs, padded outputs]` as the dense weight `[outputs, inputs]` of a plan.
pub(super) fn dense(name: &str, matrix: &Matrix, outputs: usize) -> Result<Weight> {
    let mut transposed = matrix.transposed();
    transposed.data.truncate(outputs * matrix.rows);
    let data = Buffer::from_vec(transposed.data);
    Ok(Weight::dense(
        name,
        DType::F32,
        &[outputs, matrix.rows],
        data,
    )?)
}

/// A weight of the model as `[inputs, outputs padded to 32]`.
pub(super) fn padded(name: &str, weight: &Weight) -> Result<Matrix> {
    let shape = weight.shape();
    let (outputs, inputs) = (shape[0], shape[1]);
    let data = weight.to_f32(name)?;
    let matrix = Matrix::new(outputs, inputs, data)?.transposed();
    let wide = outputs.next_multiple_of(32);
    if wide == outputs {
        return Ok(matrix);
    }
    let mut out = Matrix::zeros(inputs, wide);
    for r in 0..inputs {
        out.row_mut(r)[..outputs].copy_from_slice(matrix.row(r));
    }
    Ok(out)
}
