//! Adapters, vectors in place of tokens and hidden states, against PEFT and transformers
//! (tests/golden/extras.py) and against adapters merged into the weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_models::{
    Adapter, Backend, LoadOptions, LogitRows, Model, ModelSource, Runner, RunnerOptions, SeqSlice,
    SliceExtras, Vectors,
};
use exl_tensor::{Buffer, DType, KvType, Weight};
use serde_json::{Value, json};

use crate::common::{Tensors, dir, golden, pieces_with, root, scratch, tensors};
use crate::quantized::{decoded, written};

/// Relative to the range of the logits, fp32 on both sides; measured 1.2e-6.
const TOLERANCE: f32 = 1e-5;

pub(crate) fn extras() -> PathBuf {
    root().join("exl-models/tests/golden/extras")
}

pub(crate) fn adapter(name: &str, model: &Model) -> Arc<Adapter> {
    Arc::new(Adapter::open(&extras().join(name), model.spec()).unwrap())
}

pub(crate) fn floats(tensors: &Tensors, name: &str) -> Vec<f32> {
    let bytes = tensors[name].2.chunks_exact(4);
    bytes
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

pub(crate) fn ids(tensors: &Tensors) -> Vec<u32> {
    let bytes = tensors["input_ids"].2.chunks_exact(4);
    bytes
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

pub(crate) fn runner(model: &Arc<Model>, backend: Backend, adapters: &[Arc<Adapter>]) -> Runner {
    let options = RunnerOptions {
        pages: 5,
        kv_type: KvType::F32,
        max_rows: 256,
        threads: 2,
        backend,
        adapters: adapters.to_vec(),
        ..Default::default()
    };
    Runner::new(model.clone(), options).unwrap()
}

/// Largest difference relative to the range of what is expected.
pub(crate) fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|v| v.is_finite()));
    let pairs = found.iter().zip(expected);
    let worst = pairs.fold(0f32, |w, (a, b)| w.max((a - b).abs()));
    let high = expected.iter().fold(f32::MIN, |m, &v| m.max(v));
    worst / (high - expected.iter().fold(f32::MAX, |m, &v| m.min(v)))
}

/// All logits of sequences with these adapters and the same tokens, side by side in pieces.
pub(crate) fn side_by_side(
    runner: &mut Runner,
    ids: &[u32],
    uses: &[&[(u32, f32)]],
    size: usize,
) -> Vec<Vec<f32>> {
    let vocab = runner.model().spec().vocab;
    let pages: Vec<[u32; 1]> = (0..uses.len() as u32).map(|p| [p]).collect();
    let mut all = vec![Vec::new(); uses.len()];
    for (i, tokens) in ids.chunks(size).enumerate() {
        let slices: Vec<SeqSlice<'_>> = uses
            .iter()
            .zip(&pages)
            .map(|(adapters, pages)| SeqSlice {
                tokens,
                start: i * size,
                pages,
                logits: LogitRows::All,
                extras: SliceExtras {
                    adapters,
                    ..SliceExtras::default()
                },
            })
            .collect();
        let logits = runner.step(&slices).unwrap();
        for (all, one) in all.iter_mut().zip(logits.chunks(tokens.len() * vocab)) {
            all.extend_from_slice(one);
        }
    }
    all
}

/// Adapters of sequences side by side; the fixture has the logits of all but the first.
pub(crate) const USES: [&[(u32, f32)]; 4] = [&[], &[(0, 1.0)], &[(1, 1.0)], &[(0, 0.5), (1, 1.0)]];
pub(crate) const NAMES: [&str; 3] = ["plain", "patterns", "both"];

/// Sequences of one step without an adapter, with one, with another, and with both.
#[test]
fn adapters_give_what_peft_gives() {
    let fixture = fixture();
    let model = golden("llama-plain").model;
    let adapters = ["plain", "patterns"].map(|name| adapter(name, &model));
    let ids = ids(&fixture);
    for (backend, size) in [
        (Backend::Cpu, ids.len()),
        (Backend::Cpu, 7),
        (Backend::Cpu, 1),
        (Backend::Reference, ids.len()),
    ] {
        let mut adapted = runner(&model, backend.clone(), &adapters);
        let found = side_by_side(&mut adapted, &ids, &USES, size);
        for (found, name) in found[1..].iter().zip(NAMES) {
            let worst = error(found, &floats(&fixture, name));
            println!("{name} in pieces of {size}: {worst:.1e}");
            assert!(worst < TOLERANCE, "{name}: {worst}");
        }
        // Who uses none computes what it computes alone, to the bit (the reference does not round
        // between gate and activation where they are one op).
        if matches!(backend, Backend::Reference) {
            continue;
        }
        let mut plain = runner(&model, backend, &[]);
        assert_eq!(found[0], side_by_side(&mut plain, &ids, &[&[]], size)[0]);
    }
}

/// Adapters over dense and over quantized weights against weights that they were added to.
#[test]
fn adapters_give_what_merged_weights_give() {
    for format in ["dense", "exl2", "gptq"] {
        let base = match format {
            "dense" => dir("llama-plain"),
            _ => written("llama-plain", format, &format!("adapted-{format}")),
        };
        let model = Arc::new(Model::open(&base, &LoadOptions::default()).unwrap());
        let adapters = ["plain", "patterns"].map(|name| adapter(name, &model));
        let scales = [0.75f32, -0.5];
        let merged = Arc::new(merge(&decoded(&model), &adapters, scales));
        let ids = golden("llama-plain").ids;
        let uses = [(0, scales[0]), (1, scales[1])];
        let mut adapted = runner(&model, Backend::Cpu, &adapters);
        let found = side_by_side(&mut adapted, &ids, &[&uses, &[]], 16);
        let mut right = runner(&merged, Backend::Cpu, &[]);
        let expected = side_by_side(&mut right, &ids, &[&[]], 16);
        // Measured 1.2e-6 dense. Quantized weights are noise here, and round their activations to 16
        // bits: 1.1e-3.
        let limit = if format == "dense" { TOLERANCE } else { 3e-3 };
        let mut right = runner(&Arc::new(decoded(&model)), Backend::Cpu, &[]);
        let without = side_by_side(&mut right, &ids, &[&[]], 16);
        println!(
            "{format} without adapters: {:.1e}",
            error(&found[1], &without[0])
        );
        let worst = error(&found[0], &expected[0]);
        println!("{format}: {worst:.1e}");
        assert!(worst < limit, "{format}: {worst}");
    }
}

/// Dense weights with what adapters add.
fn merge(model: &Model, adapters: &[Arc<Adapter>], scales: [f32; 2]) -> Model {
    let mut weights = model.weights().clone();
    for (adapter, scale) in adapters.iter().zip(scales) {
        for (linear, &rank) in adapter.ranks().iter() {
            let matrix =
                |name: String| adapter.weights().get(&name).unwrap().to_f32(&name).unwrap();
            let (a, b) = (matrix(format!("{linear}.a")), matrix(format!("{linear}.b")));
            let old = weights.get(linear).unwrap();
            let (shape, mut values) = (old.shape(), old.to_f32(linear).unwrap());
            for (o, row) in values.chunks_exact_mut(shape[1]).enumerate() {
                for (i, value) in row.iter_mut().enumerate() {
                    let sum = (0..rank).map(|r| b[o * rank + r] * a[r * shape[1] + i]);
                    *value += scale * sum.sum::<f32>();
                }
            }
            let buffer = Buffer::from_slice(&values);
            let dense = Weight::dense(linear, DType::F32, &shape, buffer).unwrap();
            weights.insert(linear.clone(), dense);
        }
    }
    Model::from_parts(model.spec().clone(), weights)
}

/// All logits with the fixture's vectors in place of tokens.
pub(crate) fn with_vectors(runner: &mut Runner, fixture: &Tensors, size: usize) -> Vec<f32> {
    let mut ids = ids(fixture);
    // What stands where the vectors are does not matter.
    ids[5..8].fill(u32::MAX);
    let vectors = [Vectors {
        position: 5,
        count: 3,
        values: floats(fixture, "vectors").into(),
    }];
    pieces_with(runner, &ids, size, |_| SliceExtras {
        vectors: &vectors,
        ..SliceExtras::default()
    })
}

/// Hidden states of some positions, also of rows whose logits are not wanted, and the expected ones.
pub(crate) fn hidden(runner: &mut Runner, fixture: &Tensors) -> (Vec<f32>, Vec<f32>) {
    let (ids, expected) = (ids(fixture), floats(fixture, "hidden"));
    let width = runner.model().spec().hidden;
    let positions = [0, 3, 4, 11, 23, 200];
    let mut found = Vec::new();
    for (range, logits) in [(0..10, LogitRows::None), (10..24, LogitRows::Last)] {
        let slice = SeqSlice {
            tokens: &ids[range.clone()],
            start: range.start,
            pages: &[1],
            logits,
            extras: SliceExtras {
                hidden: &positions,
                ..SliceExtras::default()
            },
        };
        runner.step(&[slice]).unwrap();
        found.extend_from_slice(runner.hidden().unwrap());
    }
    let rows = positions[..5].iter();
    let rows = rows.flat_map(|r| expected[r * width..][..width].to_vec());
    (found, rows.collect())
}

pub(crate) fn fixture() -> Tensors {
    tensors(&extras().join("golden.safetensors"))
}

#[test]
fn vectors_stand_in_place_of_tokens() {
    let fixture = fixture();
    let model = golden("llama-plain").model;
    for (backend, size) in [
        (Backend::Cpu, 24),
        (Backend::Cpu, 6),
        (Backend::Reference, 24),
    ] {
        let found = with_vectors(&mut runner(&model, backend, &[]), &fixture, size);
        let worst = error(&found, &floats(&fixture, "with_vectors"));
        println!("vectors in pieces of {size}: {worst:.1e}");
        assert!(worst < TOLERANCE, "{worst}");
    }
}

#[test]
fn hidden_states_come_out() {
    let model = golden("llama-plain").model;
    let mut one = runner(&model, Backend::Cpu, &[]);
    let (found, expected) = hidden(&mut one, &fixture());
    let worst = error(&found, &expected);
    println!("hidden states: {worst:.1e}");
    assert!(worst < TOLERANCE, "{worst}");
    let plain = SeqSlice {
        tokens: &[1, 2],
        start: 0,
        pages: &[1],
        logits: LogitRows::Last,
        extras: SliceExtras::default(),
    };
    one.step(&[plain]).unwrap();
    assert!(one.hidden().unwrap().is_empty());
}

/// The model, its tokens allowed positions on axes.
pub(crate) fn on_axes(model: &Model) -> Arc<Model> {
    let mut spec = exl_models::Spec::clone(model.spec());
    let pairs = spec.ropes[0].inv_freq.len();
    spec.ropes[0].sections = Some([pairs / 4, pairs * 3 / 8, pairs - pairs / 4 - pairs * 3 / 8]);
    Arc::new(Model::from_parts(Arc::new(spec), model.weights().clone()))
}

/// All logits of tokens at these positions, in pieces; at the ordinary ones where there are none.
pub(crate) fn placed(
    runner: &mut Runner,
    ids: &[u32],
    positions: &[[u32; 3]],
    size: usize,
) -> Vec<f32> {
    let mut all = Vec::new();
    for (i, tokens) in ids.chunks(size).enumerate() {
        let own = positions.chunks(size).nth(i).unwrap_or(&[]);
        let slice = SeqSlice {
            tokens,
            start: i * size,
            pages: &[0],
            logits: LogitRows::All,
            extras: SliceExtras {
                positions: own,
                ..SliceExtras::default()
            },
        };
        all.extend_from_slice(runner.step(&[slice]).unwrap());
    }
    all
}

/// Where tokens are of a text with an image of 2 by 3 in it, from `first` on.
pub(crate) fn image(tokens: usize, first: u32) -> Vec<[u32; 3]> {
    let text = |p: u32| [p; 3];
    let mut all: Vec<[u32; 3]> = (first..first + 4).map(text).collect();
    let p = first + 4;
    all.extend((0..6).map(|k| [p, p + k / 3, p + k % 3]));
    let rest = (p + 3..).map(text);
    all.extend(rest.take(tokens - all.len()));
    all
}

#[test]
fn positions_on_axes_are_relative_and_kept_in_the_cache() {
    let golden = golden("qwen2");
    let (model, ids) = (on_axes(&golden.model), golden.ids);
    let run = |backend: Backend, positions: &[[u32; 3]], size: usize| {
        placed(&mut runner(&model, backend, &[]), &ids, positions, size)
    };
    let n = ids.len();
    let text = run(Backend::Cpu, &[], n);
    // Ordinary positions said aloud give the same bits.
    let aloud: Vec<[u32; 3]> = (0..n as u32).map(|p| [p; 3]).collect();
    assert_eq!(text, run(Backend::Cpu, &aloud, n));
    let image_at = |first| image(n, first);
    let found = run(Backend::Cpu, &image_at(0), n);
    let vocab = model.spec().vocab;
    assert_eq!(text[..5 * vocab], found[..5 * vocab]);
    let apart = error(&found, &text);
    assert!(apart > 1e-2, "{apart}");
    for (what, other) in [
        ("in pieces", run(Backend::Cpu, &image_at(0), 7)),
        ("one by one", run(Backend::Cpu, &image_at(0), 1)),
        ("by the reference", run(Backend::Reference, &image_at(0), n)),
        ("further on", run(Backend::Cpu, &image_at(100), n)),
    ] {
        let worst = error(&other, &found);
        println!("{what}: {worst:.1e}");
        assert!(worst < TOLERANCE, "{what}: {worst}");
    }
}

#[test]
fn impossible_extras_are_refused() {
    let model = golden("llama-plain").model;
    let mut one = runner(&model, Backend::Cpu, &[]);
    let vectors = [Vectors {
        position: 0,
        count: 2,
        values: vec![0.0; 65].into(),
    }];
    let cases: [(SliceExtras<'_>, &str); 4] = [
        (
            SliceExtras {
                adapters: &[(0, 1.0)],
                ..Default::default()
            },
            "adapter 0 times 1, there are 0",
        ),
        (
            SliceExtras {
                vectors: &vectors,
                ..Default::default()
            },
            "2 vectors of 64 at position 0 have 65 values",
        ),
        (
            SliceExtras {
                hidden: &[2, 2],
                ..Default::default()
            },
            "do not rise",
        ),
        (
            SliceExtras {
                positions: &[[0; 3]; 3],
                ..Default::default()
            },
            "positions on axes, the model's positions have none",
        ),
    ];
    let slice = |extras| SeqSlice {
        tokens: &[1, 2, 3],
        start: 0,
        pages: &[0],
        logits: LogitRows::Last,
        extras,
    };
    for (extras, expected) in cases {
        let text = one.step(&[slice(extras)]).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    let mut axes = runner(&on_axes(&golden("qwen2").model), Backend::Cpu, &[]);
    for (positions, expected) in [
        (&[[0; 3]; 2][..], "2 positions on axes for 3 tokens"),
        (&[[0, u32::MAX, 0]; 3], "position 4294967295 on an axis"),
    ] {
        let extras = SliceExtras {
            positions,
            ..Default::default()
        };
        let text = axes.step(&[slice(extras)]).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

/// A copy of an adapter with a changed configuration and changed tensors.
fn damaged(name: &str, config: impl Fn(&mut Value), change: impl Fn(&mut Tensors)) -> PathBuf {
    let (from, to) = (
        extras().join("plain"),
        scratch().join(format!("adapter-{name}")),
    );
    std::fs::create_dir_all(&to).unwrap();
    let text = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    config(&mut json);
    std::fs::write(to.join("adapter_config.json"), json.to_string()).unwrap();
    let mut all = tensors(&from.join("adapter_model.safetensors"));
    change(&mut all);
    write(&to.join("adapter_model.safetensors"), &all);
    to
}

fn write(path: &Path, all: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in all {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(path, file).unwrap();
}

#[test]
fn adapters_that_are_no_plain_lora_are_refused() {
    let source = ModelSource::open(&dir("llama-plain"), &LoadOptions::default()).unwrap();
    let refusal = |dir: &Path| {
        let found = Adapter::open(dir, source.spec());
        found.err().map(|e| e.to_string()).expect("a refusal")
    };
    let many: serde_json::Map<String, Value> =
        (0..5000).map(|i| (format!("p{i}"), json!(4))).collect();
    let settings: [(&str, Value, &str); 12] = [
        (
            "peft_type",
            json!("IA3"),
            "peft_type: expected \"LORA\", found \"IA3\"",
        ),
        ("use_dora", json!(true), "use_dora: true is not supported"),
        (
            "fan_in_fan_out",
            json!(true),
            "fan_in_fan_out: true is not supported",
        ),
        (
            "modules_to_save",
            json!(["lm_head"]),
            "modules_to_save: [\"lm_head\"] is not supported",
        ),
        (
            "init_lora_weights",
            json!("pissa"),
            "\"pissa\" changes the weights",
        ),
        ("r", json!(5), "has rank 4"),
        (
            "r",
            json!(4.7),
            "r: expected a whole number from 1 on, found 4.7",
        ),
        (
            "use_rslora",
            json!("yes"),
            "use_rslora: expected true or false",
        ),
        ("lora_alpha", json!(1e300), "beyond 32-bit numbers"),
        // What would take a gigabyte of memory, or a minute, is refused.
        (
            "rank_pattern",
            json!({ r"(\w{60}){60}": 4 }),
            "rank_pattern: ",
        ),
        (
            "alpha_pattern",
            Value::Object(many),
            "5000 patterns, more than 4096",
        ),
        ("rank_pattern", json!({ "a(": 4 }), "a("),
    ];
    for (key, value, expected) in settings {
        let name = format!("{key}-{}", expected.len());
        let dir = damaged(&name, |json| json[key] = value.clone(), |_| ());
        let text = refusal(&dir);
        assert!(text.contains(expected), "{text}");
    }
    let layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let renamed = |to: &'static str| {
        move |all: &mut Tensors| {
            let tensor = all.remove(layer).unwrap();
            all.insert(to.to_owned(), tensor);
        }
    };
    let names: [(&'static str, &str); 4] = [
        (
            "base_model.model.lm_head.lora_A.weight",
            "an adapter of lm_head is not supported",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "an adapter of model.embed_tokens is not supported",
        ),
        (
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
            "the model has no linear model.layers.9.self_attn.q_proj",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
            "is neither a lora_A nor a lora_B",
        ),
    ];
    for (i, (to, expected)) in names.into_iter().enumerate() {
        let text = refusal(&damaged(&format!("name{i}"), |_| (), renamed(to)));
        assert!(text.contains(to) && text.contains(expected), "{text}");
    }
    let text = refusal(&damaged(
        "half",
        |_| (),
        |all| {
            all.remove(layer);
        },
    ));
    assert!(
        text.contains("q_proj has only one of lora_A and lora_B"),
        "{text}"
    );
    let text = refusal(&damaged(
        "shape",
        |_| (),
        |all| {
            all.get_mut(layer).unwrap().1 = vec![2, 128];
        },
    ));
    assert!(
        text.contains("expected shape [rank, 64], found shape [2, 128]"),
        "{text}"
    );
    let text = refusal(Path::new("nowhere"));
    assert!(
        text.contains("adapter_config.json: there is no such file"),
        "{text}"
    );
}

#[test]
fn other_contents_have_another_fingerprint() {
    let model = golden("llama-plain").model;
    let name = |dir: &Path| {
        let adapter = Adapter::open(dir, model.spec()).unwrap();
        adapter.fingerprint().to_owned()
    };
    let plain = name(&extras().join("plain"));
    assert_eq!(plain, name(&damaged("same", |_| (), |_| ())));
    let scaled = damaged("alpha", |json| json["lora_alpha"] = json!(9), |_| ());
    assert_ne!(plain, name(&scaled));
    let layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let changed = damaged("bit", |_| (), |all| all.get_mut(layer).unwrap().2[0] ^= 1);
    assert_ne!(plain, name(&changed));
}
