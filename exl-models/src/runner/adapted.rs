//! A model with its adapters.

use std::sync::Arc;

use exl_tensor::{Gpu, Plan, PlanAdapter, PlanKey, Weights};

use crate::model::plan_adapted;
use crate::{Adapter, Model, Result};

/// A model, and the adapters that its sequences may use.
#[derive(Debug)]
pub(super) struct Adapted {
    base: Arc<Model>,
    /// Of the model and of all adapters.
    weights: Weights,
    adapters: Vec<PlanAdapter>,
}

impl Adapted {
    /// With the adapters' weights on the GPU if there is one.
    ///
    /// # Errors
    /// Out of device memory.
    pub(super) fn new(
        base: Arc<Model>,
        adapters: &[Arc<Adapter>],
        gpu: Option<&Gpu>,
    ) -> Result<Self> {
        let mut weights = base.weights().clone();
        let mut known = Vec::new();
        for (i, adapter) in adapters.iter().enumerate() {
            let name = format!("lora.{i}");
            for (linear, weight) in adapter.weights().iter() {
                let full = format!("{name}.{linear}");
                match gpu {
                    Some(gpu) => {
                        let weight = gpu.upload_alone(&full, weight)?;
                        weights.insert(full, weight);
                    }
                    None => weights.insert_shared(full, weight.clone()),
                }
            }
            let ranks = adapter.ranks().clone();
            known.push(PlanAdapter { name, ranks });
        }
        Ok(Self {
            base,
            weights,
            adapters: known,
        })
    }

    pub(super) fn base(&self) -> &Arc<Model> {
        &self.base
    }

    pub(super) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The forward pass for a shape; the numbers of its adapters were checked.
    pub(super) fn plan(&self, key: &PlanKey) -> Plan {
        let used = key.extras.adapters.iter();
        let used = used.map(|&id| self.adapters[id as usize].clone());
        plan_adapted(self.base.spec(), key, used.collect())
    }
}
