//! Logits of hidden states, a few positions at a time, and the divergence between two of them.

use std::sync::Arc;

use exl_models::{BlockPart, Spec, block_plan};
use exl_tensor::{Bound, KvBuffers, KvType, Phase, Plan, PlanKey, StepBlock, Weights};

use super::device::{Device, Engine};
use crate::{KlScore, Result};

/// Logits kept at a time, per model.
const BYTES: usize = 32 << 20;

/// Final norm and head.
#[derive(Debug)]
pub(super) struct Head {
    device: Device,
    engine: Engine,
    kv: KvBuffers,
    spec: Arc<Spec>,
    rows: usize,
}

impl Head {
    /// For rows of `length` positions, which are cut into equal pieces.
    pub(super) fn new(spec: &Arc<Spec>, length: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            // The original's head and another one take turns.
            engine: device.engine(2)?,
            kv: device.kv(spec.block_kv_shape(KvType::F32), 1)?,
            device: device.clone(),
            rows: Self::rows(spec, length),
            spec: spec.clone(),
        })
    }

    /// Positions of a piece.
    fn rows(spec: &Spec, length: usize) -> usize {
        let most = (BYTES / (4 * spec.vocab)).clamp(1, length);
        // Pieces of equal size share one plan.
        let mut sizes = (1..=most).rev();
        sizes.find(|n| length.is_multiple_of(*n)).unwrap_or(1)
    }

    /// Binds the weights of a head.
    pub(super) fn bind(&self, weights: &Weights) -> Result<Bound> {
        let plan = block_plan(&self.spec, BlockPart::Head, &self.key());
        self.device.bind(plan, weights)
    }

    fn key(&self) -> PlanKey {
        head_key(self.rows)
    }

    /// The plan of a head for rows of `length` positions.
    pub(super) fn plan(spec: &Arc<Spec>, length: usize) -> Plan {
        block_plan(spec, BlockPart::Head, &head_key(Self::rows(spec, length)))
    }

    /// Logits of every piece of a row.
    pub(super) fn logits(
        &mut self,
        bound: &Bound,
        hidden: &[f32],
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let step = StepBlock::new(&self.key())?;
        let input = bound
            .plan()
            .input("hidden")
            .expect("the head's plan has this input");
        let out = bound
            .plan()
            .output("logits")
            .expect("the head's plan has this output");
        for (i, piece) in hidden
            .chunks_exact(self.rows * self.spec.hidden)
            .enumerate()
        {
            let inputs = [(input, piece)];
            self.engine.run(bound, &inputs, &step, &mut self.kv)?;
            each(i * self.rows, self.engine.values(bound, out)?)?;
        }
        Ok(())
    }

    /// Adds the divergence of `quantized` hidden states (through their head) from `reference`
    /// ones of one row of `tokens`.
    pub(super) fn score(
        &mut self,
        score: &mut KlScore,
        reference: (&Bound, &[f32]),
        quantized: (&Bound, &[f32]),
        tokens: &[u32],
    ) -> Result<()> {
        self.scores(std::slice::from_mut(score), reference, &[quantized], tokens)
    }

    /// As [`Head::score`] for several models with the same reference.
    pub(super) fn scores(
        &mut self,
        scores: &mut [KlScore],
        reference: (&Bound, &[f32]),
        quantized: &[(&Bound, &[f32])],
        tokens: &[u32],
    ) -> Result<()> {
        let width = self.rows * self.spec.hidden;
        let vocab = self.spec.vocab;
        let rows = self.rows;
        let mut right = Vec::with_capacity(rows * vocab);
        for (i, r) in reference.1.chunks_exact(width).enumerate() {
            right.clear();
            self.logits(reference.0, r, |_, x| {
                right.extend_from_slice(x);
                Ok(())
            })?;
            let next =
                &tokens[(i * rows + 1).min(tokens.len())..((i + 1) * rows + 1).min(tokens.len())];
            for (score, (bound, hidden)) in scores.iter_mut().zip(quantized) {
                self.logits(bound, &hidden[i * width..][..width], |_, x| {
                    score.add(&right, x, vocab, next);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

fn head_key(rows: usize) -> PlanKey {
    // A prefill plan keeps no taps.
    PlanKey {
        phase: Phase::Prefill,
        rows,
        seqs: 1,
        pages_per_seq: 1,
        out_rows: 0,
        sample: None,
        extras: Default::default(),
    }
}
