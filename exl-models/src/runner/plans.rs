//! Plans that are ready to run, the least recently used dropped first.

use std::collections::HashMap;
use std::sync::Arc;

use exl_tensor::{Bound, PlanKey, Slot, StepBlock};

use super::Adapted;
use crate::Result;

/// A recorded plan with its weights and step block.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) bound: Bound,
    pub(super) step: StepBlock,
    /// Where the logits lie, if the plan computes any.
    pub(super) logits: Option<Slot>,
    /// Where the tokens lie, if the plan draws any.
    pub(super) tokens: Option<Slot>,
    /// Where last hidden states lie, if any are wanted.
    pub(super) hidden: Option<Slot>,
    /// Where vectors go, if there are any.
    pub(super) vectors: Option<Slot>,
    /// Where the positions of its steps must end, if the model has a table of them.
    pub(super) position_limit: Option<usize>,
}

#[derive(Debug)]
pub(super) struct PlanCache {
    capacity: usize,
    /// Counts uses; each entry keeps the count of its last one.
    clock: u64,
    entries: HashMap<PlanKey, (u64, Ready)>,
}

impl PlanCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            clock: 0,
            entries: HashMap::new(),
        }
    }

    /// The plan for a shape, recorded now if need be.
    pub(super) fn ready(&mut self, model: &Adapted, key: &PlanKey) -> Result<&mut Ready> {
        self.clock += 1;
        if !self.entries.contains_key(key) {
            let ready = Ready::new(model, key)?;
            self.make_room();
            self.entries.insert(key.clone(), (self.clock, ready));
        }
        let (used, ready) = self
            .entries
            .get_mut(key)
            .expect("it was there or inserted above");
        *used = self.clock;
        Ok(ready)
    }

    /// Bytes of all step blocks.
    pub(super) fn step_bytes(&self) -> usize {
        self.entries.keys().map(StepBlock::bytes_for).sum()
    }

    fn make_room(&mut self) {
        if self.entries.len() < self.capacity {
            return;
        }
        let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used);
        if let Some(key) = oldest.map(|(key, _)| key.clone()) {
            self.entries.remove(&key);
        }
    }
}

impl Ready {
    fn new(model: &Adapted, key: &PlanKey) -> Result<Self> {
        let plan = Arc::new(model.plan(key));
        Ok(Self {
            step: StepBlock::new(key)?,
            logits: plan.output("logits"),
            tokens: plan.output("tokens"),
            hidden: plan.output("hidden"),
            vectors: plan.input("vectors"),
            position_limit: plan.position_limit(),
            bound: Bound::new(plan, model.weights())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoadOptions, Model};
    use exl_tensor::Phase;
    use std::path::Path;

    #[test]
    fn the_least_recently_used_plan_goes_first() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama-plain-tiny");
        let model = Arc::new(Model::open(&dir, &LoadOptions::default()).unwrap());
        let model = Adapted::new(model, &[], None).unwrap();
        let key = |rows| PlanKey {
            phase: Phase::Prefill,
            rows,
            seqs: 1,
            pages_per_seq: 1,
            out_rows: 1,
            sample: None,
            extras: Default::default(),
        };
        let mut cache = PlanCache::new(2);
        for rows in [3, 4, 3, 5] {
            let ready = cache.ready(&model, &key(rows)).unwrap();
            assert_eq!(ready.bound.plan().key().rows, rows);
        }
        let mut kept: Vec<usize> = cache.entries.keys().map(|k| k.rows).collect();
        kept.sort_unstable();
        assert_eq!(kept, [3, 5]);
    }
}
