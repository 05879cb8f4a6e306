//! Runs parts of a model over one calibration row at a time.

use std::sync::Arc;

use exl_models::{BlockPart, LinearSpec, MlpSpec, NormSpec, Spec, block_plan, blocks};
use exl_tensor::{
    Bound, Buffer, DType, GateUpArgs, KvBuffers, KvType, PAGE_TOKENS, Part, Phase, PlanBuilder,
    PlanKey, StepBlock, StepSeq, Weight, Weights,
};

use super::device::{Device, Engine, Tap};
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
    /// An output or a tap of the plan.
    pub(super) fn tap(&mut self, name: &str) -> Tap<'_> {
        let plan = self.bound.plan();
        let tap = || plan.taps().iter().find(|(n, _)| n == name).map(|&(_, s)| s);
        let slot = plan
            .output(name)
            .or_else(tap)
            .expect("the plan was built with this slot");
        Tap {
            engine: self.engine,
            bound: self.bound,
            slot,
        }
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

    /// A part of the model with its weights; taps are on.
    pub(super) fn part(&self, part: BlockPart, weights: &Weights) -> Result<Bound> {
        let plan = block_plan(&self.spec, part, &self.key);
        self.device.bind(plan, weights)
    }

    /// `hidden` in, `out` = its norm.
    pub(super) fn norm(&self, norm: &NormSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, spec, rows| {
            let hidden = b.input("hidden", rows, spec.hidden);
            let out = blocks::norm(b, norm, hidden);
            b.output("out", out);
        })
    }

    /// `hidden` and `x` in, `hidden` = `hidden + x W^T + bias` out.
    pub(super) fn add(&self, linear: &LinearSpec, weights: &Weights) -> Result<Bound> {
        self.record(weights, |b, spec, rows| {
            let hidden = b.input("hidden", rows, spec.hidden);
            let x = b.input("x", rows, linear.inputs);
            let part = part(b, linear);
            let out = b.linear_add(x, &part, hidden);
            b.output("hidden", out);
        })
    }

    /// `hidden` in, `out` = the gated activation of its norm.
    pub(super) fn gate_up(
        &self,
        norm: &NormSpec,
        mlp: &MlpSpec,
        weights: &Weights,
    ) -> Result<Bound> {
        self.record(weights, |b, spec, rows| {
            let hidden = b.input("hidden", rows, spec.hidden);
            let x = blocks::norm(b, norm, hidden);
            let args = GateUpArgs {
                gate: part(b, &mlp.gate),
                up: part(b, &mlp.up),
                act: mlp.act,
            };
            let out = b.gate_up(x, &args);
            b.output("out", out);
        })
    }

    fn record(
        &self,
        weights: &Weights,
        build: impl FnOnce(&mut PlanBuilder, &Spec, usize),
    ) -> Result<Bound> {
        let mut b = PlanBuilder::new(self.key.clone(), false);
        build(&mut b, &self.spec, self.key.rows);
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

fn part(b: &mut PlanBuilder, linear: &LinearSpec) -> Part {
    let weight = b.weight(&linear.key, &[linear.outputs, linear.inputs]);
    let bias = linear
        .bias
        .then(|| b.weight(&linear.bias_key(), &[linear.outputs]));
    Part { weight, bias }
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
