//! Logits against Hugging Face transformers on tiny random models (tests/golden/make.py).

use std::collections::BTreeSet;
use std::sync::Arc;

use exl_models::rope::RopeTable;
use exl_models::{
    Backend, LoadOptions, LogitRows, MemoryRequest, MlpSpec, Model, ModelSource, Runner, SeqSlice,
    SliceExtras, Spec,
};
use exl_tensor::{Activation, KvType, RopeStyle, Weight};

use crate::common::{CASES, golden, pieces_with, runner, runner_with};

/// Relative to the range of the logits, fp32 on both sides.
const TOLERANCE: f32 = 1e-4;

/// All logits of a row fed in pieces of the given size.
pub(crate) fn in_pieces(runner: &mut Runner, ids: &[u32], size: usize) -> Vec<f32> {
    pieces_with(runner, ids, size, |_| SliceExtras::default())
}

/// A fixture that is not in the list is tested by nothing here.
#[test]
fn every_fixture_is_in_the_list() {
    let folder = crate::common::root().join("exl-models/tests/golden");
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let found: BTreeSet<String> = names
        .filter_map(|n| Some(n.strip_suffix("-tiny")?.to_owned()))
        .collect();
    let listed: BTreeSet<String> = CASES.iter().map(|&c| c.to_owned()).collect();
    assert_eq!(found, listed, "CASES in tests/it/common.rs");
}

#[test]
fn logits_equal_transformers() {
    println!(
        "{:<16} {:>10} {:>10} {:>10} {:>10}",
        "case", "prefill", "chunks", "tokens", "f64"
    );
    let mut failures = Vec::new();
    for &case in CASES {
        let golden = golden(case);
        let mut cpu = golden.runner(Backend::Cpu);
        let n = golden.ids.len();
        let mut errors =
            [n, 7, 1].map(|size| golden.error(&in_pieces(&mut cpu, &golden.ids, size)));
        let mut reference = golden.runner(Backend::Reference);
        let exact = golden.error(&in_pieces(&mut reference, &golden.ids, n));
        println!(
            "{case:<16} {:>10.1e} {:>10.1e} {:>10.1e} {exact:>10.1e}",
            errors[0], errors[1], errors[2]
        );
        errors.sort_by(f32::total_cmp);
        if errors[2].max(exact) > TOLERANCE {
            failures.push(case);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE}: {failures:?}");
}

/// Rows of a prompt read their own keys and values as they were stored, as single tokens do: how a
/// prompt is cut matters far less than what a quantized cache loses.
#[test]
fn pieces_of_a_prompt_read_what_was_stored() {
    for case in ["llama-plain", "qwen3"] {
        let golden = golden(case);
        let ids = &golden.ids;
        let mut floats = golden.runner(Backend::Cpu);
        let exact = in_pieces(&mut floats, ids, ids.len());
        let apart = |a: &[f32], b: &[f32]| {
            let pairs = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
            pairs.sum::<f32>().sqrt()
        };
        let mut lost = Vec::new();
        for kv in [KvType::Q8, KvType::Q6, KvType::Q4] {
            let run = |backend, size| {
                let mut runner = runner_with(golden.model.clone(), backend, kv);
                in_pieces(&mut runner, ids, size)
            };
            let whole = run(Backend::Cpu, ids.len());
            let loss = apart(&whole, &exact);
            for (backend, size) in [
                (Backend::Cpu, 7),
                (Backend::Cpu, 1),
                (Backend::Reference, ids.len()),
            ] {
                let other = apart(&whole, &run(backend.clone(), size));
                println!("{case} {kv} {backend:?} in pieces of {size}: {other:.1e} of {loss:.1e}");
                assert!(
                    other <= 0.2 * loss,
                    "{case} {kv} {backend:?} {size}: {other} of {loss}"
                );
            }
            lost.push(loss);
        }
        assert!(lost[0] < lost[1] && lost[1] < lost[2], "{lost:?}");
    }
}

#[test]
fn sequences_in_one_step_do_not_touch_each_other() {
    let golden = golden("qwen3");
    let (vocab, ids) = (golden.model.spec().vocab, &golden.ids);
    let mut runner = golden.runner(Backend::Cpu);
    let alone = in_pieces(&mut runner, ids, ids.len());
    let slice = |page, range: std::ops::Range<usize>, logits| SeqSlice {
        tokens: &ids[range.clone()],
        start: range.start,
        pages: match page {
            1 => &[1],
            _ => &[4],
        },
        logits,
        extras: Default::default(),
    };
    runner
        .step(&[
            slice(1, 0..20, LogitRows::None),
            slice(4, 0..7, LogitRows::None),
        ])
        .unwrap();
    let two = [
        slice(1, 20..21, LogitRows::Last),
        slice(4, 7..40, LogitRows::Last),
    ];
    let mixed = runner.step(&two).unwrap();
    assert_eq!(mixed.len(), 2 * vocab);
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-4);
    assert!(close(&mixed[..vocab], &alone[20 * vocab..][..vocab]));
    assert!(close(&mixed[vocab..], &alone[39 * vocab..]));
}

#[test]
fn impossible_steps_are_refused() {
    let golden = golden("llama-plain");
    let mut runner = golden.runner(Backend::Cpu);
    let mut message = |tokens: &[u32], start, pages: &[u32]| {
        let slice = SeqSlice {
            tokens,
            start,
            pages,
            logits: LogitRows::Last,
            extras: Default::default(),
        };
        runner.step(&[slice]).unwrap_err().to_string()
    };
    assert_eq!(message(&[], 0, &[1]), "step: sequence 0: no tokens");
    assert_eq!(
        message(&[250], 0, &[1]),
        "step: sequence 0: token 250, the vocabulary has 250"
    );
    assert_eq!(
        message(&[1], 256, &[1]),
        "step: sequence 0: needs 2 pages, has 1"
    );
    assert_eq!(
        message(&[1], 0, &[5]),
        "step: sequence 0: page 5, the cache has 0 to 4"
    );
    assert!(message(&[1; 129], 0, &[1]).contains("1 sequences with 129 tokens"));
    assert!(message(&[1], usize::MAX, &[1]).contains("needs 72057594037927936 pages, has 1"));
}

#[test]
fn a_page_that_is_written_has_one_user() {
    let golden = golden("llama-plain");
    let mut runner = golden.runner(Backend::Cpu);
    let slice = |start, pages| SeqSlice {
        tokens: &[1, 2],
        start,
        pages,
        logits: LogitRows::None,
        extras: Default::default(),
    };
    let mut message = |slices: &[SeqSlice<'_>]| {
        let result = runner.step(slices).map(|_| ());
        result.map_err(|e| e.to_string())
    };
    let refused = |sequence: usize, page: usize| {
        format!(
            "step: sequence {sequence}: page {page} is written and used a second time; copy it first"
        )
    };
    assert_eq!(
        message(&[slice(0, &[2]), slice(5, &[2])]).unwrap_err(),
        refused(0, 2)
    );
    assert_eq!(message(&[slice(255, &[3, 3])]).unwrap_err(), refused(0, 3));
    // The second sequence writes what the first one reads.
    assert_eq!(
        message(&[slice(256, &[1, 2]), slice(0, &[1])]).unwrap_err(),
        refused(1, 1)
    );
    // Reading together is allowed, and so are pages beyond those in use.
    assert!(message(&[slice(256, &[1, 2]), slice(300, &[1, 3, 2])]).is_ok());
}

#[test]
fn loading_stops_when_told_to() {
    use std::ops::ControlFlow;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let dir = crate::common::dir("llama-plain");
    let source = ModelSource::open(&dir, &LoadOptions::default()).unwrap();
    for stop_at in [0, 3] {
        let calls = AtomicUsize::new(0);
        let model = source.load_while(&|_| {
            if calls.fetch_add(1, Ordering::Relaxed) >= stop_at {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        assert!(model.unwrap().is_none());
        assert!(calls.into_inner() < source.layout().len());
    }
    let whole = source.load_while(&|_| ControlFlow::Continue(())).unwrap();
    assert!(whole.is_some());
}

/// Each fixture would notice if the setting it is about were ignored.
#[test]
fn fixtures_notice_their_settings() {
    let plain = |spec: &mut Spec| {
        let freq = |i: u16| 10_000f32.powf(-f32::from(i) / 8.0);
        let table = RopeTable {
            inv_freq: (0..8).map(freq).collect(),
            attention_factor: 1.0,
            sections: None,
        };
        assert_ne!(spec.ropes[0], table);
        spec.ropes = vec![table];
    };
    let window = |spec: &mut Spec| spec.layers.iter_mut().for_each(|l| l.attn.window = 0);
    let biases = |spec: &mut Spec| {
        for layer in &mut spec.layers {
            if let MlpSpec::Dense(mlp) = &mut layer.mlp {
                mlp.down.bias = false;
            }
        }
    };
    let qkv = |spec: &mut Spec| spec.layers.iter_mut().for_each(|l| l.attn.k.bias = false);
    let norms = |spec: &mut Spec| spec.layers.iter_mut().for_each(|l| l.attn.k_norm = None);
    let one_table = |spec: &mut Spec| spec.layers.iter_mut().for_each(|l| l.attn.rope = Some(0));
    let halves = |spec: &mut Spec| {
        let layers = spec.layers.iter_mut();
        layers.for_each(|l| l.attn.style = RopeStyle::Neox);
    };
    let silu = |spec: &mut Spec| {
        for layer in &mut spec.layers {
            if let MlpSpec::Dense(mlp) = &mut layer.mlp {
                mlp.act = Activation::Silu;
            }
        }
    };
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Spec));
    let changes: [Change<'_>; 12] = [
        ("llama-llama3", &plain),
        ("llama-linear", &plain),
        ("llama-yarn", &plain),
        ("llama-v5", &plain),
        ("llama-bias", &biases),
        ("mistral-window", &window),
        ("qwen2-window", &window),
        ("qwen2", &qkv),
        ("qwen3", &norms),
        ("olmo3", &one_table),
        ("ernie4.5", &halves),
        ("arcee", &silu),
    ];
    for (case, change) in changes {
        let golden = golden(case);
        let mut spec = Spec::clone(golden.model.spec());
        change(&mut spec);
        let mut weights = golden.model.weights().clone();
        weights.insert("rope.inv_freq.0", Weight::constant(&spec.ropes[0].inv_freq));
        let changed = Arc::new(Model::from_parts(Arc::new(spec), weights));
        let logits = in_pieces(
            &mut runner(changed, Backend::Cpu),
            &golden.ids,
            golden.ids.len(),
        );
        assert!(golden.error(&logits) > 100.0 * TOLERANCE, "{case}");
    }
}

#[test]
fn memory_is_what_was_announced() {
    let golden = golden("llama-plain");
    let request = MemoryRequest::new((1, 1280), KvType::F32, 40);
    let announced = golden.model.memory_for(&request);
    let mut runner = golden.runner(Backend::Cpu);
    let slice = SeqSlice {
        tokens: &golden.ids,
        start: 0,
        pages: &[0],
        logits: LogitRows::Last,
        extras: Default::default(),
    };
    runner.step(&[slice]).unwrap();
    let used = runner.memory();
    assert_eq!(
        (used.weights, used.cache),
        (announced.weights, announced.cache)
    );
    assert_eq!(used.arena, announced.arena);
    assert!(used.total() - used.scratch <= announced.total());
    // Logits of every row take more; the step block of the same rows is larger as well.
    let logits = LogitRows::All;
    runner.step(&[SeqSlice { logits, ..slice }]).unwrap();
    let every = MemoryRequest {
        out_rows: 40,
        ..request
    };
    let announced = golden.model.memory_for(&every);
    assert!(announced.arena > used.arena);
    assert_eq!(runner.memory().arena, announced.arena);
}
