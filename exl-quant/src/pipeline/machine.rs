//! Runs parts of a model over one calibration row at a time.

use std::sync::Arc;

use exl_models::{BlockPart, LinearSpec, MlpSpec, NormSpec, Spec, block_plan, blocks};
use exl_tensor::{
    Activations, Bound, Buffer, Cpu, CpuOptions, DType, Executor, GateUpArgs, HostExecutor,
    KvBuffers, PAGE_TOKENS, Part, Phase, Plan, PlanBuilder, PlanKey, StepBlock, StepSeq, Weight,
    Weights,
};

use crate::{Matrix, Result};

/// An executor with room for rows of one length.
#[derive(Debug)]
pub(super) struct Machine {
    spec: Arc<Spec>,
    executor: HostExecutor,
    kv: KvBuffers,
    step: StepBlock,
    key: PlanKey,
}

/// What a run of [`Machine::run`] hands out: slots by name.
#[derive(Debug)]
pub(super) struct Slots<'a> {
    executor: &'a HostExecutor,
    bound: &'a Bound,
}

impl Slots<'_> {
    /// An output or a tap of the plan.
    pub(super) fn get(&self, name: &str) -> &[f32] {
        let plan = self.bound.plan();
        let tap = || plan.taps().iter().find(|(n, _)| n == name).map(|&(_, s)| s);
        let slot = plan
            .output(name)
            .or_else(tap)
            .expect("the plan was built with this slot");
        self.executor.slot(self.bound, slot)
    }
}

impl Machine {
    /// For rows of `length` tokens.
    pub(super) fn new(spec: &Arc<Spec>, length: usize, threads: usize) -> Result<Self> {
        let pages = length.div_ceil(PAGE_TOKENS);
        let key = PlanKey {
            phase: Phase::Calibrate,
            rows: length,
            seqs: 1,
            pages_per_seq: pages,
            out_rows: 0,
        };
        let cpu = Cpu::new(CpuOptions {
            threads,
            isa: None,
            activations: Activations::Exact16,
        });
        Ok(Self {
            spec: spec.clone(),
            executor: HostExecutor::cpu(cpu)?,
            kv: KvBuffers::new(spec.block_kv_shape(DType::F32), pages + 1)?,
            step: StepBlock::new(&key)?,
            key,
        })
    }

    /// The model.
    pub(super) fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// A part of the model with its weights; taps are on.
    pub(super) fn part(&self, part: BlockPart, weights: &Weights) -> Result<Bound> {
        Ok(Bound::new(
            Arc::new(block_plan(&self.spec, part, &self.key)),
            weights,
        )?)
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
        let plan: Plan = b.finish();
        Ok(Bound::new(Arc::new(plan), weights)?)
    }

    /// Embeds a row: `[length, hidden]`.
    pub(super) fn embed(&mut self, bound: &Bound, tokens: &[u32]) -> Result<Vec<f32>> {
        let pages: Vec<u32> = (1..=self.key.pages_per_seq as u32).collect();
        self.step.fill(&[StepSeq {
            tokens,
            start: 0,
            pages: &pages,
            logits: (0, 0),
        }])?;
        Ok(self.run(bound, &[])?.get("hidden").to_vec())
    }

    /// Runs a plan on one row; inputs by name. The step block must have been filled once, by
    /// [`Machine::embed`] or [`Machine::positions`]: only positions matter afterwards.
    pub(super) fn run<'a>(
        &'a mut self,
        bound: &'a Bound,
        inputs: &[(&str, &[f32])],
    ) -> Result<Slots<'a>> {
        self.executor.prepare(bound)?;
        for (name, values) in inputs {
            let slot = bound
                .plan()
                .input(name)
                .expect("the plan was built with this input");
            self.executor.write(bound, slot, values)?;
        }
        self.executor.run(bound, &self.step, &mut self.kv)?;
        Ok(Slots {
            executor: &self.executor,
            bound,
        })
    }

    /// Fills the step block for a row whose tokens do not matter.
    pub(super) fn positions(&mut self) -> Result<()> {
        let tokens = vec![0u32; self.key.rows];
        let pages: Vec<u32> = (1..=self.key.pages_per_seq as u32).collect();
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
    let transposed = matrix.transposed();
    let data = Buffer::from_slice(&transposed.data[..outputs * matrix.rows]);
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
