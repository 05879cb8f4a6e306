//! Shared by the integration tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_models::{Backend, LoadOptions, Model, ModelSource, Runner, RunnerOptions};
use exl_tensor::DType;

pub(crate) const CASES: [&str; 14] = [
    "llama-plain",
    "llama-llama3",
    "llama-linear",
    "llama-yarn",
    "llama-bias",
    "llama-tied",
    "llama-headdim",
    "llama-v5",
    "mistral-window",
    "mistral-full",
    "qwen2",
    "qwen2-tied",
    "qwen2-window",
    "qwen3",
];

pub(crate) fn dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("{case}-tiny"))
}

/// A fixture's model and what transformers computed with it.
pub(crate) struct Golden {
    pub(crate) model: Arc<Model>,
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<usize>,
    /// `[positions, vocab]`.
    pub(crate) logits: Vec<f32>,
}

pub(crate) fn golden(case: &str) -> Golden {
    let source = ModelSource::open(&dir(case), &LoadOptions::default()).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        let view = source.files().tensor(name).unwrap();
        view.data
            .chunks_exact(4)
            .map(|b| b.try_into().unwrap())
            .collect()
    };
    let ids = words("input_ids")
        .into_iter()
        .map(u32::from_le_bytes)
        .collect();
    let positions = words("positions")
        .into_iter()
        .map(|b| u32::from_le_bytes(b) as usize);
    let positions = positions.collect();
    let logits = words("logits")
        .into_iter()
        .map(f32::from_le_bytes)
        .collect();
    let model = Arc::new(source.load(&|_| ()).unwrap());
    Golden {
        model,
        ids,
        positions,
        logits,
    }
}

impl Golden {
    pub(crate) fn runner(&self, backend: Backend) -> Runner {
        runner(self.model.clone(), backend)
    }

    /// Largest difference at the stored positions relative to the logits' range; `all` is
    /// `[tokens, vocab]`.
    pub(crate) fn error(&self, all: &[f32]) -> f32 {
        let vocab = self.model.spec().vocab;
        assert_eq!(all.len(), self.ids.len() * vocab);
        let rows = self
            .positions
            .iter()
            .flat_map(|p| &all[p * vocab..][..vocab]);
        let worst = rows
            .zip(&self.logits)
            .fold(0f32, |w, (a, b)| w.max((a - b).abs()));
        // `max` swallows NaN.
        assert!(all.iter().all(|v| v.is_finite()));
        let high = self.logits.iter().fold(f32::MIN, |m, &v| m.max(v));
        let low = self.logits.iter().fold(f32::MAX, |m, &v| m.min(v));
        worst / (high - low)
    }
}

pub(crate) fn runner(model: Arc<Model>, backend: Backend) -> Runner {
    let options = RunnerOptions {
        pages: 5,
        kv_dtype: DType::F32,
        max_rows: 128,
        threads: 2,
        backend,
        ..Default::default()
    };
    Runner::new(model, options).unwrap()
}
