//! Shared by the integration tests.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_models::{
    Backend, LoadOptions, LogitRows, Model, ModelSource, Runner, RunnerOptions, SeqSlice,
    SliceExtras,
};
use exl_tensor::KvType;
use serde_json::{Value, json};

pub(crate) const CASES: &[&str] = &[
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
    "arcee",
    "cohere",
    "cohere-qknorm",
    "cohere2",
    "dbrx",
    "dbrx-raw",
    "ernie4.5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-text",
    "gemmoe",
    "glm",
    "glm4",
    "gpt-bigcode",
    "gpt2",
    "gpt2-hub",
    "granite",
    "index",
    "internlm2",
    "internlm2-dynamic",
    "llama-dynamic",
    "llama-swiglu",
    "llava-pixtral",
    "minicpm",
    "ministral",
    "mistral3",
    "mixtral",
    "mixtral4",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "orion",
    "phi3",
    "phi3-longrope-long",
    "phi3-longrope-short",
    "phi3-window",
    "qwen1",
    "qwen2-moe",
    "qwen2-moe-mixed",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-moe",
    "qwen3-moe-raw",
    "seed-oss",
    "smollm3",
    "stablelm",
    "stablelm-parallel",
    "starcoder2",
    "yi",
];

/// The repository, or the folder that stands in for it where there is none (`cargo xtask bundle`).
pub(crate) fn root() -> PathBuf {
    let named = std::env::var_os("EXL_TEST_ROOT").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
}

pub(crate) fn dir(case: &str) -> PathBuf {
    root()
        .join("exl-models/tests/golden")
        .join(format!("{case}-tiny"))
}

/// Where tests may write.
pub(crate) fn scratch() -> PathBuf {
    match std::env::var_os("EXL_TEST_ROOT") {
        Some(_) => std::env::temp_dir().join("exl-tests"),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    }
}

/// How a fixture is opened.
pub(crate) fn load_options(case: &str) -> LoadOptions {
    let mut options = LoadOptions::default();
    // The factors of short texts, as transformers takes them by the length of the text.
    if case == "phi3-longrope-short" {
        options.rope.context = Some(64);
    }
    options
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
    let source = ModelSource::open(&dir(case), &load_options(case)).unwrap();
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

/// All logits of a row fed in pieces of the given size, with what `extras` says of a range of it.
pub(crate) fn pieces_with<'a>(
    runner: &mut Runner,
    ids: &[u32],
    size: usize,
    extras: impl Fn(Range<usize>) -> SliceExtras<'a>,
) -> Vec<f32> {
    let mut all = Vec::new();
    for (i, tokens) in ids.chunks(size).enumerate() {
        let start = i * size;
        let slice = SeqSlice {
            tokens,
            start,
            pages: &[3, 0, 2],
            logits: LogitRows::All,
            extras: extras(start..start + tokens.len()),
        };
        all.extend_from_slice(runner.step(&[slice]).unwrap());
    }
    all
}

pub(crate) fn runner(model: Arc<Model>, backend: Backend) -> Runner {
    runner_with(model, backend, KvType::F32)
}

pub(crate) fn runner_with(model: Arc<Model>, backend: Backend, kv_type: KvType) -> Runner {
    let options = RunnerOptions {
        pages: 5,
        kv_type,
        max_rows: 128,
        threads: 2,
        backend,
        ..Default::default()
    };
    Runner::new(model, options).unwrap()
}

/// Type, shape and bytes by name.
pub(crate) type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// The contents of a safetensors file.
pub(crate) fn tensors(path: &Path) -> Tensors {
    let file = std::fs::read(path).unwrap();
    let split = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..split]).unwrap();
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let entries = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__");
    let tensor = |(name, t): (&String, &Value)| {
        let shape = t["shape"].as_array().unwrap().iter().map(number).collect();
        let range = number(&t["data_offsets"][0])..number(&t["data_offsets"][1]);
        let dtype = t["dtype"].as_str().unwrap().to_owned();
        (name.clone(), (dtype, shape, file[split..][range].to_vec()))
    };
    entries.map(tensor).collect()
}

/// A model directory taken apart.
pub(crate) struct Parts {
    pub(crate) config: Value,
    pub(crate) tensors: Tensors,
}

impl Parts {
    pub(crate) fn of(case: &str) -> Self {
        let text = std::fs::read_to_string(dir(case).join("config.json")).unwrap();
        let tensors = tensors(&dir(case).join("model.safetensors"));
        Self {
            config: serde_json::from_str(&text).unwrap(),
            tensors,
        }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut (String, Vec<usize>, Vec<u8>) {
        self.tensors.get_mut(name).unwrap()
    }

    pub(crate) fn write(&self, name: &str) -> PathBuf {
        let dir = scratch().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
            data.extend_from_slice(bytes);
        }
        let mut header = Value::Object(header).to_string();
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&data);
        std::fs::write(dir.join("model.safetensors"), file).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        dir
    }
}
