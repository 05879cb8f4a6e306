//! Halves of layers over calibration rows, with whatever weights are put into them.

use std::collections::HashMap;
use std::sync::Arc;

use exl_models::{BlockPart, LinearSpec, ModelSource, Module, Spec, block_plan};
use exl_quant::{Hessian, HessianAccumulator, Part, Result};
use exl_tensor::{
    Activations, Bound, Cpu, CpuOptions, Executor, HostExecutor, KvBuffers, KvType, PAGE_TOKENS,
    Phase, PlanKey, Slot, StepBlock, StepSeq, Weights,
};

/// Hidden states of the calibration rows, `[length, hidden]` each.
pub(crate) type Rows = Vec<Vec<f32>>;

/// A part of the model that the original quantizes as one: half a layer, or the head.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) part: BlockPart,
    /// q, k, v and o, or gate, up and down, or the head.
    pub(crate) linears: Vec<LinearSpec>,
}

impl Block {
    /// The halves of the layers in order.
    pub(crate) fn of_layers(spec: &Spec) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (i, layer) in spec.layers.iter().enumerate() {
            let a = &layer.attn;
            let parts = layer.mlp.parts().into_iter();
            let mlp = parts.flat_map(|m| m.branches().chain([&m.down]));
            blocks.push(Block {
                part: BlockPart::Attention(i),
                linears: [&a.q, &a.k, &a.v, &a.o].map(Clone::clone).to_vec(),
            });
            blocks.push(Block {
                part: BlockPart::Mlp(i),
                linears: mlp.cloned().collect(),
            });
        }
        blocks
    }

    pub(crate) fn head(spec: &Spec) -> Block {
        Block {
            part: BlockPart::Head,
            linears: vec![spec.head.linear.clone()],
        }
    }

    /// The unquantized weights.
    pub(crate) fn load(&self, source: &ModelSource) -> Result<Weights> {
        Ok(match self.part {
            BlockPart::Attention(i) | BlockPart::Mlp(i) | BlockPart::Layer(i) => {
                source.load_layer(i)?
            }
            BlockPart::Embed => source.load_module(Module::Embedding)?,
            BlockPart::Head => source.load_module(Module::Head)?,
        })
    }
}

/// An executor for rows of one length.
pub(crate) struct Forward {
    spec: Arc<Spec>,
    executor: HostExecutor,
    kv: KvBuffers,
    step: StepBlock,
    key: PlanKey,
}

impl Forward {
    pub(crate) fn new(spec: &Arc<Spec>, length: usize) -> Result<Self> {
        let key = PlanKey {
            phase: Phase::Calibrate,
            rows: length,
            seqs: 1,
            pages_per_seq: length.div_ceil(PAGE_TOKENS),
            out_rows: 0,
            sample: None,
            extras: Default::default(),
        };
        let cpu = Cpu::new(CpuOptions {
            threads: 0,
            isa: None,
            activations: Activations::Exact16,
        });
        Ok(Self {
            executor: HostExecutor::cpu(cpu)?,
            kv: KvBuffers::new(spec.block_kv_shape(KvType::F32), key.pages_per_seq)?,
            step: StepBlock::new(&key)?,
            spec: spec.clone(),
            key,
        })
    }

    /// Embeds rows of tokens.
    pub(crate) fn embed(&mut self, source: &ModelSource, tokens: &[Vec<u32>]) -> Result<Rows> {
        let weights = source.load_module(Module::Embedding)?;
        let bound = self.bind(BlockPart::Embed, &weights)?;
        let mut rows = Vec::with_capacity(tokens.len());
        for row in tokens {
            self.positions(row)?;
            self.executor.prepare(&bound)?;
            self.executor.run(&bound, &self.step, &mut self.kv)?;
            rows.push(self.output(&bound)?.to_vec());
        }
        Ok(rows)
    }

    /// Hidden states behind a block with these weights.
    pub(crate) fn outputs(&mut self, part: BlockPart, w: &Weights, rows: &Rows) -> Result<Rows> {
        let bound = self.bind(part, w)?;
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            self.run(&bound, row)?;
            out.push(self.output(&bound)?.to_vec());
        }
        Ok(out)
    }

    /// The Hessian of every input of a block, by the input's name.
    pub(crate) fn hessians(
        &mut self,
        source: &ModelSource,
        block: &Block,
        rows: &Rows,
    ) -> Result<HashMap<String, Hessian>> {
        let bound = self.bind(block.part, &block.load(source)?)?;
        let mut sums: Vec<(&str, Slot, HessianAccumulator)> = Vec::new();
        for (name, slot) in bound.plan().taps() {
            let dim = bound.plan().slot(*slot).dim;
            sums.push((name.as_str(), *slot, HessianAccumulator::new(dim)));
        }
        for row in rows {
            self.run(&bound, row)?;
            for (_, slot, sum) in &mut sums {
                sum.add(self.executor.values(&bound, *slot)?, Part::Train)?;
            }
        }
        sums.iter()
            .map(|(name, _, sum)| Ok(((*name).to_owned(), sum.finish(name)?.all)))
            .collect()
    }

    fn bind(&self, part: BlockPart, weights: &Weights) -> Result<Bound> {
        let plan = block_plan(&self.spec, part, &self.key);
        Ok(Bound::new(Arc::new(plan), weights)?)
    }

    fn positions(&mut self, tokens: &[u32]) -> Result<()> {
        let pages: Vec<u32> = (0..self.key.pages_per_seq as u32).collect();
        self.step.fill(&[StepSeq {
            tokens,
            start: 0,
            pages: &pages,
            logits: (0, 0),
        }])?;
        Ok(())
    }

    fn run(&mut self, bound: &Bound, hidden: &[f32]) -> Result<()> {
        let input = bound.plan().input("hidden");
        let input = input.expect("every block reads hidden states");
        self.executor.prepare(bound)?;
        self.executor.write(bound, input, hidden)?;
        Ok(self.executor.run(bound, &self.step, &mut self.kv)?)
    }

    fn output(&mut self, bound: &Bound) -> Result<&[f32]> {
        let out = bound.plan().output("hidden");
        let out = out.expect("embedding and halves of layers give hidden states");
        Ok(self.executor.values(bound, out)?)
    }
}
