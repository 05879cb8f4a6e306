//! What a model needs of the memory of a machine or a GPU, and what it took.

use crate::machine;
use crate::ui;
use anyhow::{Result, bail};
use exl_models::{MemoryRequest, MemoryUse, ModelSource};
use exl_tensor::Gpu;
use serde::Serialize;

/// What the driver takes for itself where it cannot be measured: its context with the kernels' code on
/// an H200 with driver 580. Other GPUs and drivers differ by some 100 MB.
pub(crate) const DRIVER_BYTES: u64 = 290_000_000;

/// What a model needs where it computes.
pub(crate) fn needed(
    source: &ModelSource,
    request: &MemoryRequest,
    gpu: Option<&Gpu>,
) -> Result<MemoryUse> {
    Ok(match gpu {
        Some(gpu) => source.gpu_memory_for(gpu.props(), request)?,
        None => source.memory_for(request),
    })
}

/// Refuses work that cannot fit into the memory of the machine or the GPU, before anything is
/// loaded; `what` is the work and `less` the flags that make it smaller.
pub(crate) fn check(need: &MemoryUse, what: &str, less: &str, gpu: Option<&Gpu>) -> Result<()> {
    let total = need.total();
    if let Some(gpu) = gpu {
        let (free, _) = gpu.memory()?;
        if total > free {
            bail!(
                "{what} needs {} of device memory ({}), the GPU has {} free (use a smaller {less}, a model with fewer bits, or --device cpu)",
                ui::bytes(total),
                parts(need),
                ui::bytes(free),
            );
        }
        return Ok(());
    }
    match machine::memory() {
        Some((memory, _)) if total > memory => bail!(
            "{what} needs {} of memory ({}), this machine has {} (use a smaller {less}, or a model with fewer bits)",
            ui::bytes(total),
            parts(need),
            ui::bytes(memory),
        ),
        _ => Ok(()),
    }
}

/// What two models need side by side.
pub(crate) fn sum(one: &MemoryUse, other: &MemoryUse) -> MemoryUse {
    MemoryUse {
        weights: one.weights + other.weights,
        cache: one.cache + other.cache,
        arena: one.arena + other.arena,
        scratch: one.scratch + other.scratch,
        step: one.step + other.step,
    }
}

/// The parts of the sum, in words.
pub(crate) fn parts(need: &MemoryUse) -> String {
    let mut text = format!(
        "weights {}, cache {}, activations {}",
        ui::bytes(need.weights),
        ui::bytes(need.cache),
        ui::bytes(need.arena + need.step)
    );
    if need.scratch > 0 {
        text.push_str(&format!(", scratch memory {}", ui::bytes(need.scratch)));
    }
    text
}

/// Device memory of a model: what was worked out before and what was taken.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Taken {
    /// Bytes of the GPU.
    pub(crate) memory_bytes: u64,
    /// Bytes that are not free, by whomever they are taken.
    pub(crate) taken_bytes: u64,
    /// Sum of the predictions.
    pub(crate) predicted_bytes: u64,
    pub(crate) parts: Vec<Part>,
}

/// A part of the device memory.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Part {
    pub(crate) part: &'static str,
    /// From shapes alone; absent where only the driver knows.
    pub(crate) predicted_bytes: Option<u64>,
    /// How far the driver's figure of free memory fell. It gives out pages of 2 MiB.
    pub(crate) taken_bytes: i64,
}

impl Taken {
    /// What a GPU's memory is taken for now, beside the prediction.
    pub(crate) fn now(gpu: &Gpu, need: &MemoryUse) -> Result<Self> {
        let (free, memory_bytes) = gpu.memory()?;
        let taken = gpu.taken()?;
        let part = |part, predicted_bytes, taken_bytes| Part {
            part,
            predicted_bytes,
            taken_bytes,
        };
        Ok(Self {
            memory_bytes,
            taken_bytes: memory_bytes - free,
            predicted_bytes: need.total(),
            parts: vec![
                part("context", None, taken.context),
                part("kernels", None, taken.kernels),
                part("weights", Some(need.weights), taken.weights),
                part("cache", Some(need.cache), taken.cache),
                part("activations", Some(need.arena), taken.activations),
                part("scratch", Some(need.scratch), taken.scratch),
                part("step", Some(need.step), taken.step),
                part("graphs", None, taken.graphs),
                part("rest", None, taken.rest),
            ],
        })
    }

    /// In one line.
    pub(crate) fn text(&self) -> String {
        let megabytes = |bytes: i64| format!("{:.1} MB", bytes as f64 / 1e6);
        let parts = self.parts.iter().map(|p| match p.predicted_bytes {
            Some(n) => {
                let (taken, predicted) = (megabytes(p.taken_bytes), megabytes(n.cast_signed()));
                format!("{} {taken} (predicted {predicted})", p.part)
            }
            None => format!("{} {}", p.part, megabytes(p.taken_bytes)),
        });
        parts.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: MemoryUse = MemoryUse {
        weights: 3_000_000_000,
        cache: 1_000_000_000,
        arena: 100_000_000,
        scratch: 50_000_000,
        step: 1_000_000,
    };

    #[test]
    fn what_cannot_fit_is_refused_with_its_parts() {
        let huge = MemoryUse {
            cache: u64::MAX / 2,
            ..NEED
        };
        let error = check(&huge, "a model", "--context", None).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("a model needs "), "{text}");
        let weights = format!("weights {}", ui::bytes(NEED.weights));
        for part in [weights.as_str(), "scratch memory", "--context"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn parts_are_told_beside_their_prediction() {
        let part = |part, predicted_bytes, taken_bytes| Part {
            part,
            predicted_bytes,
            taken_bytes,
        };
        let taken = Taken {
            memory_bytes: 10,
            taken_bytes: 5,
            predicted_bytes: 4,
            parts: vec![
                part("context", None, 280_000_000),
                part("cache", Some(1_000_000), 2_097_152),
            ],
        };
        assert_eq!(
            taken.text(),
            "context 280.0 MB, cache 2.1 MB (predicted 1.0 MB)"
        );
    }
}
