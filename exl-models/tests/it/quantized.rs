//! EXL2 and GPTQ checkpoints through the same forward code.

use std::path::PathBuf;
use std::sync::Arc;

use exl_models::{
    Backend, LoadOptions, LogitRows, Model, ModelSource, SeqSlice, Storage, WeightKey, layout,
};
use exl_tensor::{
    Bound, Buffer, Cpu, CpuOptions, DType, Executor, HostExecutor, KvBuffers, KvType, Phase,
    PlanKey, StepBlock, StepSeq, Weight,
};
use serde_json::json;

use crate::common::{Parts, golden, root, runner};

/// Deterministic noise.
struct Noise(u64);

impl Noise {
    fn word(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    fn words(&mut self, n: usize) -> Vec<u8> {
        (0..n).flat_map(|_| self.word().to_le_bytes()).collect()
    }

    /// Bits of binary16 numbers between `low` and `2 low`.
    fn scales(&mut self, n: usize, low: f32) -> Vec<u8> {
        let one = |w: u32| half::f16::from_f32(low * (1.0 + (w >> 8) as f32 / (1 << 24) as f32));
        (0..n)
            .flat_map(|_| one(self.word()).to_le_bytes())
            .collect()
    }
}

fn le(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The fixture with every linear replaced by noise in one of the formats.
fn quantized(case: &str, write: fn(&mut Parts, &WeightKey, &mut Noise)) -> Parts {
    let mut parts = Parts::of(case);
    let spec = golden(case).model.spec().clone();
    let mut noise = Noise(7);
    for key in layout(&spec).iter().filter(|k| k.is_linear()) {
        parts.tensors.remove(&format!("{}.weight", key.name));
        write(&mut parts, key, &mut noise);
    }
    parts
}

/// Groups of 32 rows of falling width, rows reversed.
fn exl2(parts: &mut Parts, key: &WeightKey, noise: &mut Noise) {
    let (k, n) = (key.shape[1], key.shape[0].next_multiple_of(32));
    let bits: Vec<usize> = [8, 6, 5, 4, 3, 2]
        .into_iter()
        .cycle()
        .take(k / 32)
        .collect();
    let (mut groups, mut row) = (Vec::new(), 0);
    let mut sorted = bits.clone();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    for b in &sorted {
        groups.extend_from_slice(&(*b as i16).to_le_bytes());
        groups.extend_from_slice(&(row as i16).to_le_bytes());
        row += b;
    }
    let g = sorted.len();
    let perm: Vec<i32> = (0..k as i32).rev().collect();
    let mut put = |suffix: &str, dtype: &str, shape: Vec<usize>, bytes| {
        parts.tensors.insert(
            format!("{}.{suffix}", key.name),
            (dtype.to_owned(), shape, bytes),
        );
    };
    put("q_weight", "I32", vec![row, n], noise.words(row * n));
    put("q_scale", "I32", vec![g, n / 8], noise.words(g * n / 8));
    // Codes reach 2^(bits - 1), scale codes 256; a maximum of 0.01 keeps 8-bit weights below 1.3.
    put("q_scale_max", "F16", vec![g], noise.scales(g, 0.005));
    put("q_groups", "I16", vec![2 * g], groups);
    put("q_invperm", "I32", vec![k], le(&perm));
    if let Some(bias) = key.bias.as_ref().and_then(|b| parts.tensors.get_mut(b)) {
        let values = bias
            .2
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]));
        let halves = values.flat_map(|v| half::f16::from_f32(v.to_f32()).to_le_bytes());
        (bias.0, bias.2) = ("F16".to_owned(), halves.collect());
    }
}

/// Groups of 32 features, interleaved by `g_idx`.
fn gptq(parts: &mut Parts, key: &WeightKey, noise: &mut Noise) {
    parts.config["quantization_config"] =
        json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true});
    let (k, n) = (key.shape[1], key.shape[0].next_multiple_of(32));
    let g = k / 32;
    let order: Vec<i32> = (0..k).map(|i| (i % g) as i32).collect();
    let mut put = |suffix: &str, dtype: &str, shape: Vec<usize>, bytes| {
        parts.tensors.insert(
            format!("{}.{suffix}", key.name),
            (dtype.to_owned(), shape, bytes),
        );
    };
    put("qweight", "I32", vec![k / 8, n], noise.words(k / 8 * n));
    put("qzeros", "I32", vec![g, n / 8], noise.words(g * n / 8));
    put("scales", "F16", vec![g, n], noise.scales(g * n, 0.01));
    put("g_idx", "I32", vec![k], le(&order));
}

/// A directory with the fixture in one of the formats, "exl2" or "gptq".
pub(crate) fn written(case: &str, format: &str, name: &str) -> PathBuf {
    let write = if format == "exl2" { exl2 } else { gptq };
    quantized(case, write).write(name)
}

/// The same model with every quantized weight decoded.
pub(crate) fn decoded(model: &Model) -> Model {
    let mut weights = model.weights().clone();
    for key in layout(model.spec()).iter().filter(|k| k.is_linear()) {
        let values = model
            .weights()
            .get(&key.name)
            .unwrap()
            .to_f32(&key.name)
            .unwrap();
        // Padded outputs are the last rows.
        let values = &values[..key.shape[0] * key.shape[1]];
        let buffer = Buffer::from_slice(values);
        let dense = Weight::dense(&key.name, DType::F32, &key.shape, buffer).unwrap();
        weights.insert(key.name.clone(), dense);
    }
    Model::from_parts(model.spec().clone(), weights)
}

fn logits(model: Arc<Model>, backend: Backend, ids: &[u32], size: usize) -> Vec<f32> {
    let mut runner = runner(model, backend);
    let mut all = Vec::new();
    for (i, tokens) in ids.chunks(size).enumerate() {
        let slice = SeqSlice {
            tokens,
            start: i * size,
            pages: &[1],
            logits: LogitRows::All,
            extras: Default::default(),
        };
        all.extend_from_slice(runner.step(&[slice]).unwrap());
    }
    all
}

/// Largest difference relative to the range of `b`.
fn relative(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|v| v.is_finite()));
    let worst = a.iter().zip(b).fold(0f32, |w, (x, y)| w.max((x - y).abs()));
    let high = b.iter().fold(f32::MIN, |m, &v| m.max(v));
    worst / (high - b.iter().fold(f32::MAX, |m, &v| m.min(v)))
}

#[test]
fn quantized_weights_act_as_their_decoded_values() {
    type Case<'a> = (&'a str, fn(&mut Parts, &WeightKey, &mut Noise), Storage);
    let cases: [Case<'_>; 3] = [
        ("qwen2", exl2, Storage::Exl2),
        ("llama-bias", gptq, Storage::Gptq),
        ("qwen3", exl2, Storage::Exl2),
    ];
    for (case, write, storage) in cases {
        let dir = quantized(case, write).write(&format!("quantized-{case}"));
        let source = ModelSource::open(&dir, &LoadOptions::default()).unwrap();
        let linears = || source.layout().iter().filter(|k| k.is_linear());
        assert!(linears().all(|k| source.storage(k) == storage));
        assert!(linears().all(|k| source.file_bytes(k) > 0));
        let model = Arc::new(source.load(&|_| ()).unwrap());
        let ids = golden(case).ids;
        let n = ids.len();
        let exact = logits(Arc::new(decoded(&model)), Backend::Reference, &ids, n);
        // The fast kernels multiply codes by scales in 32 bits; decoded values are rounded to 16
        // bits, which alone moves every product by some 2e-4.
        for (backend, size, bound) in [
            (Backend::Reference, n, 1e-5),
            (Backend::Cpu, n, 1e-2),
            (Backend::Cpu, 1, 1e-2),
        ] {
            let error = relative(&logits(model.clone(), backend.clone(), &ids, size), &exact);
            println!("{case} {backend:?} in pieces of {size}: {error:.1e}");
            assert!(
                error < bound,
                "{case} {backend:?} in pieces of {size}: {error}"
            );
        }
    }
}

#[test]
fn prepared_plans_over_quantized_weights_need_no_more_scratch_memory() {
    for (case, write) in [
        ("qwen3", exl2 as fn(&mut _, &_, &mut _)),
        ("llama-bias", gptq),
    ] {
        let dir = quantized(case, write).write(&format!("scratch-{case}"));
        let model = Model::open(&dir, &LoadOptions::default()).unwrap();
        for (rows, kv) in [(1, KvType::F16), (7, KvType::Q4), (40, KvType::F16)] {
            let mut kv = KvBuffers::new(model.kv_shape(kv), 2).unwrap();
            let key = PlanKey {
                phase: Phase::Prefill,
                rows,
                seqs: 1,
                pages_per_seq: 1,
                out_rows: 1,
                sample: None,
                extras: Default::default(),
            };
            let bound = Bound::new(Arc::new(model.plan(&key)), model.weights()).unwrap();
            let mut step = StepBlock::new(&key).unwrap();
            step.fill(&[StepSeq {
                tokens: &vec![1; rows],
                start: 0,
                pages: &[1],
                logits: (rows - 1, rows),
            }])
            .unwrap();
            let mut cpu = HostExecutor::cpu(Cpu::new(CpuOptions::default())).unwrap();
            cpu.prepare(&bound).unwrap();
            cpu.run(&bound, &step, &mut kv).unwrap();
            assert_eq!(
                cpu.kernels().map(Cpu::growths),
                Some(0),
                "{case}, {rows} rows"
            );
        }
    }
}

/// A tied model that comes with a quantized head uses that one.
#[test]
fn a_tied_model_may_have_a_quantized_head() {
    let parts = quantized("qwen2-tied", exl2);
    let source =
        ModelSource::open(&parts.write("quantized-tied"), &LoadOptions::default()).unwrap();
    assert_eq!(
        source.storage(source.key("lm_head").unwrap()),
        Storage::Exl2
    );
    let model = source.load(&|_| ()).unwrap();
    assert!(
        model
            .weights()
            .get("lm_head")
            .unwrap()
            .quant_kind()
            .is_some()
    );
    assert!(
        model
            .weights()
            .get("model.embed_tokens")
            .unwrap()
            .quant_kind()
            .is_none()
    );
}

#[test]
fn quantized_shapes_are_checked() {
    let mut parts = quantized("llama-plain", exl2);
    parts.config["vocab_size"] = json!(320);
    parts
        .tensors
        .get_mut("model.embed_tokens.weight")
        .unwrap()
        .1[0] = 320;
    let table = &mut parts
        .tensors
        .get_mut("model.embed_tokens.weight")
        .unwrap()
        .2;
    table.resize(320 * 64 * 2, 0);
    let dir = parts.write("quantized-shape");
    let text = Model::open(&dir, &LoadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        text.ends_with(
            "tensor lm_head.q_weight: expected I32 of shape [any, 320], found I32 of shape \
             [14, 256]"
        ),
        "{text}"
    );
}

/// Every tensor of a quantized linear is looked at when the model is opened, not when its layer is
/// loaded.
#[test]
fn opening_finds_a_missing_or_misshapen_tensor() {
    type Write = fn(&mut Parts, &WeightKey, &mut Noise);
    let exl2_tensors = ["q_scale", "q_scale_max", "q_groups", "q_invperm"];
    let gptq_tensors = ["qzeros", "scales"];
    let cases: [(Write, &[&str]); 2] = [(exl2, &exl2_tensors), (gptq, &gptq_tensors)];
    let refused = |parts: &Parts| {
        let dir = parts.write("quantized-open");
        let error = ModelSource::open(&dir, &LoadOptions::default()).unwrap_err();
        error.to_string()
    };
    for (write, suffixes) in cases {
        for suffix in suffixes {
            let name = format!("model.layers.1.mlp.up_proj.{suffix}");
            let mut parts = quantized("llama-plain", write);
            let tensor = parts.tensors.remove(&name).unwrap();
            let text = refused(&parts);
            assert!(text.contains(&format!("no tensor {name} ")), "{text}");
            let mut longer = tensor.clone();
            *longer.1.last_mut().unwrap() *= 2;
            longer.2 = longer.2.repeat(2);
            let mut other_type = tensor.clone();
            other_type.0 = "U8".to_owned();
            *other_type.1.last_mut().unwrap() *= if tensor.0 == "I32" { 4 } else { 2 };
            for wrong in [longer, other_type] {
                parts.tensors.insert(name.clone(), wrong);
                let text = refused(&parts);
                let at = text
                    .find("tensor model.layers.1.mlp.up_proj.q")
                    .or(text.find("scales"));
                assert!(at.is_some() && text.contains("found "), "{suffix}: {text}");
            }
        }
    }
    let mut parts = quantized("llama-plain", gptq);
    for (name, tensor) in &mut parts.tensors {
        if name.ends_with("g_idx") {
            tensor.1[0] *= 2;
            tensor.2 = tensor.2.repeat(2);
        }
    }
    assert!(refused(&parts).contains("g_idx: expected I32 of shape [64], found"));
    parts.tensors.retain(|name, _| !name.ends_with("g_idx"));
    let dir = parts.write("quantized-open");
    ModelSource::open(&dir, &LoadOptions::default()).unwrap();
}

#[test]
fn gptq_of_another_width_is_refused() {
    let mut parts = quantized("llama-bias", gptq);
    parts.config["quantization_config"]["bits"] = json!(8);
    let dir = parts.write("quantized-bits");
    let text = Model::open(&dir, &LoadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(text.contains("bits: expected 4"), "{text}");
}

/// Checkpoints written by ExLlamaV2 against its own logits (its attention ran in 16 bits).
#[test]
fn published_checkpoints_give_the_published_logits() {
    let folder = root().join("../shared/golden");
    if !folder.exists() {
        println!("skipped: no EXL2 checkpoints beside the repository");
        return;
    }
    for bits in ["2.3", "3.0", "4.0", "5.0", "6.0", "8.0"] {
        let dir = folder.join(format!("demo-4m-exl2-{bits}bpw"));
        let golden = crate::common::tensors(&dir.join("golden.safetensors.ref"));
        let (kind, _, bytes) = &golden["input_ids"];
        assert_eq!(kind, "I64");
        let ids: Vec<u32> = bytes
            .chunks_exact(8)
            .map(|b| u32::from(b[0]) | u32::from(b[1]) << 8)
            .collect();
        let (kind, _, bytes) = &golden["logits"];
        assert_eq!(kind, "F16");
        let halves = bytes
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]));
        let expected: Vec<f32> = halves.map(half::f16::to_f32).collect();
        let model = Arc::new(Model::open(&dir, &LoadOptions::default()).unwrap());
        let error = relative(&logits(model, Backend::Cpu, &ids, ids.len()), &expected);
        println!("{bits} bpw: {error:.1e}");
        assert!(error < 1e-2, "{bits} bpw: {error}");
    }
}
