//! Layers that keep what their window needs compute what layers that keep everything compute.

use std::sync::Arc;

use exl_models::{
    Backend, LogitRows, MemoryRequest, Model, Runner, RunnerOptions, SeqSlice, SliceExtras, Spec,
    WindowPages,
};
use exl_tensor::{KvFormat, KvType, PAGE_TOKENS, StepBlock};

use crate::common::golden;

/// Families in which all layers slide, or some.
pub(crate) const CASES: [&str; 6] = [
    "mistral-window",
    "phi3-window",
    "gemma2",
    "gemma3-text",
    "cohere2",
    "qwen2-window",
];

/// A fixture with windows of this many tokens where it has any.
pub(crate) fn widened(model: &Model, window: usize) -> Arc<Model> {
    let mut spec = Spec::clone(model.spec());
    for layer in &mut spec.layers {
        if layer.attn.window > 0 {
            layer.attn.window = window;
        }
    }
    let weights = model.weights().clone();
    Arc::new(Model::from_parts(Arc::new(spec), weights))
}

fn options(window_pages: WindowPages, kv_type: KvType, backend: Backend) -> RunnerOptions {
    RunnerOptions {
        pages: 16,
        window_pages,
        kv_type,
        max_rows: 200,
        max_seqs: 2,
        threads: 2,
        backend,
        ..Default::default()
    }
}

fn text(vocab: usize, seed: usize, tokens: usize) -> Vec<u32> {
    let token = |i: usize| (i * i * 31 + i * 7 + seed * 101) % vocab;
    (0..tokens).map(|i| token(i) as u32).collect()
}

/// Two texts side by side, each with every other page and every other window page, over and over:
/// the logits of chunks of 150 and 49 tokens, then of single ones.
fn logits(runner: &mut Runner) -> Vec<f32> {
    let vocab = runner.model().spec().vocab;
    let window = runner.kv().pages().window;
    let texts = [text(vocab, 1, 1500), text(vocab, 2, 1500)];
    let tables = [0, 1].map(|s| (0..8).map(|p| 2 * p + s).collect::<Vec<u32>>());
    let rings = [0, 1].map(|s| {
        let each = window.map(|pages| pages as u32 / 2);
        let page = |place: u32| each.map(|each| 2 * (place % each) + s);
        (0..8).filter_map(page).collect::<Vec<u32>>()
    });
    let mut all = Vec::new();
    let mut starts = [0, 0];
    for step in 0.. {
        let counts = if step < 9 { [150, 49] } else { [1, 1] };
        let slices: Vec<SeqSlice<'_>> = (0..2)
            .map(|s| SeqSlice {
                tokens: &texts[s][starts[s]..starts[s] + counts[s]],
                start: starts[s],
                pages: &tables[s],
                logits: LogitRows::All,
                extras: SliceExtras {
                    window_pages: &rings[s],
                    ..SliceExtras::default()
                },
            })
            .collect();
        all.extend_from_slice(runner.step(&slices).unwrap());
        starts = [0, 1].map(|s| starts[s] + counts[s]);
        if step == 19 {
            return all;
        }
    }
    all
}

/// Both ways of keeping a cache, and that one keeps less.
pub(crate) fn compare(model: &Arc<Model>, kv_type: KvType, backend: &Backend) {
    let runner = |window| {
        let options = options(window, kv_type, backend.clone());
        Runner::new(model.clone(), options).unwrap()
    };
    let (mut all, mut needed) = (runner(WindowPages::All), runner(WindowPages::Needed));
    assert_eq!(all.kv().pages().window, None);
    assert!(needed.kv().pages().window.is_some());
    assert!(needed.memory().cache < all.memory().cache);
    let (all, needed) = (logits(&mut all), logits(&mut needed));
    assert!(all.iter().all(|v| v.is_finite()));
    let family = model.spec().family;
    assert!(all == needed, "{family} with {kv_type}");
}

#[test]
fn logits_are_those_of_a_cache_that_keeps_everything() {
    let mixed = KvType {
        k: KvFormat::Q8,
        v: KvFormat::Q4,
    };
    for case in CASES {
        let model = golden(case).model;
        let types: &[KvType] = match case {
            "mistral-window" => &[KvType::F32],
            // Keys with centers, and without.
            "qwen2-window" => &[KvType::Q4, mixed],
            _ => &[KvType::F16],
        };
        for &kv in types {
            compare(&model, kv, &Backend::Cpu);
            // A window that lies in three pages.
            compare(&widened(&model, 300), kv, &Backend::Cpu);
        }
    }
}

#[test]
fn memory_is_what_was_announced_with_windows() {
    for (case, window) in [("mistral-window", 8), ("gemma3-text", 300)] {
        let model = widened(&golden(case).model, window);
        let options = options(WindowPages::Needed, KvType::F16, Backend::Cpu);
        let request = options.memory_request();
        let announced = model.memory_for(&request);
        let mut runner = Runner::new(model.clone(), options).unwrap();
        logits(&mut runner);
        let used = runner.memory();
        assert_eq!(used.cache, announced.cache, "{case}");
        assert_eq!(used.weights, announced.weights);
        let everything = MemoryRequest {
            window_pages: WindowPages::All,
            ..request
        };
        let whole = model.memory_for(&everything);
        assert_eq!(whole.cache, model.kv_shape(KvType::F16).bytes(16) as u64);
        assert!(announced.cache < whole.cache);
        // The step block has a second table.
        let shape = model.kv_shape(KvType::F16);
        let steps = request.steps(&shape, None);
        assert!(steps.iter().all(|key| key.extras.window_pages));
        let bytes = steps.each_ref().map(StepBlock::bytes_for);
        assert_eq!(announced.step, bytes[0].max(bytes[1]) as u64);
        assert!(announced.step > whole.step);
    }
}

#[test]
fn window_pages_are_checked_like_pages() {
    let model = golden("qwen2-window").model;
    let options = options(WindowPages::Needed, KvType::F16, Backend::Cpu);
    let mut runner = Runner::new(model.clone(), options.clone()).unwrap();
    let last = runner.kv().pages().window.unwrap() as u32 - 1;
    let beyond = [last + 1];
    let slice = |start, pages, window_pages| SeqSlice {
        tokens: &[1, 2],
        start,
        pages,
        logits: LogitRows::None,
        extras: SliceExtras {
            window_pages,
            ..SliceExtras::default()
        },
    };
    let mut message = |slices: &[SeqSlice<'_>]| {
        let result = runner.step(slices).map(|_| ());
        result.map_err(|e| e.to_string())
    };
    assert_eq!(
        message(&[slice(255, &[0, 1], &[3])]).unwrap_err(),
        "step: sequence 0: needs 2 window pages, has 1"
    );
    assert_eq!(
        message(&[slice(0, &[0], &beyond)]).unwrap_err(),
        format!(
            "step: sequence 0: window page {}, the cache has 0 to {last}",
            last + 1
        )
    );
    let twice = message(&[slice(0, &[0], &[2]), slice(5, &[1], &[2])]).unwrap_err();
    assert!(
        twice.contains("page 2 is written and used a second time"),
        "{twice}"
    );
    // What no window reaches may be any page, also one that others write.
    let gone = slice(2 * PAGE_TOKENS + 9, &[2, 3, 4], &[2, 2, 1]);
    assert!(message(&[slice(0, &[0], &[2]), gone]).is_ok());
    let seen = slice(2 * PAGE_TOKENS + 6, &[2, 3, 4], &[2, 2, 1]);
    assert!(message(&[slice(0, &[0], &[2]), seen]).is_err());
    // With as many pages as the other layers there are none of their own.
    let options = RunnerOptions {
        window_pages: WindowPages::All,
        ..options
    };
    let mut runner = Runner::new(model, options).unwrap();
    let error = runner.step(&[slice(0, &[0], &[2])]).unwrap_err();
    assert!(error.to_string().contains("all layers have the same pages"));
}
