//! Models with sliding windows through the engine: with window pages for what the windows need, jobs say
//! what they say with a cache that keeps everything.

#![allow(clippy::unwrap_used)] // helpers of tests count as no tests for the lint

use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_gen::{
    Answer, DiskOptions, Engine, EngineHandle, EngineOptions, Event, Request, RunnerBackend,
    SamplerSettings,
};
use exl_models::{LoadOptions, Model, ModelSource, Runner, RunnerOptions, Spec, WindowPages};

#[path = "support/characters.rs"]
mod characters;

use characters::tokenizer;

const CASES: [&str; 5] = [
    "mistral-window",
    "phi3-window",
    "gemma2",
    "gemma3-text",
    "cohere2",
];

/// A fixture, with a window of so many tokens where it has one.
fn model(case: &str, window: usize) -> Arc<Model> {
    let root = std::env::var_os("EXL_TEST_ROOT").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let dir = root.join(format!("exl-models/tests/golden/{case}-tiny"));
    let source = ModelSource::open(&dir, &LoadOptions::default()).unwrap();
    let model = source.load(&|_| ()).unwrap();
    let mut spec = Spec::clone(model.spec());
    for layer in &mut spec.layers {
        if layer.attn.window > 0 {
            layer.attn.window = window;
        }
    }
    let weights = model.weights().clone();
    Arc::new(Model::from_parts(Arc::new(spec), weights))
}

fn start(
    model: &Arc<Model>,
    window_pages: WindowPages,
    (pages, seqs): (usize, usize),
    options: EngineOptions,
) -> EngineHandle {
    let sizes = RunnerOptions {
        pages,
        window_pages,
        max_seqs: seqs,
        max_rows: 128,
        threads: 2,
        ..RunnerOptions::default()
    };
    let runner = Runner::new(Arc::clone(model), sizes).unwrap();
    let backend = Box::new(RunnerBackend::new(runner));
    let tokenizer = tokenizer(model.spec().vocab as u32);
    let engine = Engine::start(backend, tokenizer, options).unwrap();
    let keeps_less = engine.load().window_pages > 0;
    assert_eq!(keeps_less, window_pages == WindowPages::Needed);
    engine
}

/// Prompts in chunks of so many tokens.
fn chunks(chunk_rows: usize) -> EngineOptions {
    EngineOptions {
        chunk_rows,
        ..EngineOptions::default()
    }
}

fn text(model: &Model, seed: usize, tokens: usize) -> Vec<u32> {
    let vocab = model.spec().vocab;
    let token = |i: usize| (i * i * 31 + i * 7 + seed * 101) % vocab;
    (0..tokens).map(|i| token(i) as u32).collect()
}

fn request(prompt: Vec<u32>, new: usize, seed: u64) -> Request {
    Request {
        max_new_tokens: new,
        sampler: SamplerSettings {
            seed: Some(seed),
            ..SamplerSettings::default()
        },
        ignore_eos: true,
        ..Request::new(prompt)
    }
}

fn ask(engine: &EngineHandle, request: &Request) -> Answer {
    engine.submit(request.clone()).unwrap().wait()
}

fn drained(engine: &EngineHandle) {
    engine.drain();
    let (stats, load) = (engine.stats(), engine.load());
    assert_eq!((stats.failed, load.free_pages), (0, load.pages));
    assert_eq!(load.free_window_pages, load.window_pages);
}

/// Log-probabilities of all tokens of an answer, to the bit.
#[test]
fn a_text_beyond_its_window_is_the_same_to_the_bit() {
    for (case, window) in CASES.iter().flat_map(|case| [(case, 8), (case, 300)]) {
        let model = model(case, window);
        let asked = Request {
            logprobs: Some(3),
            ..request(text(&model, 1, 700), 800, 5)
        };
        let run = |window_pages| {
            let engine = start(&model, window_pages, (12, 1), chunks(100));
            let mut all = Vec::new();
            for event in engine.submit(asked.clone()).unwrap() {
                if let Event::Text { logprobs, .. } = event {
                    all.extend(logprobs);
                }
            }
            // The window pages did not become more while the text got longer.
            let load = engine.load();
            assert!(load.window_pages <= 11, "{}", load.window_pages);
            drained(&engine);
            all
        };
        let (all, needed) = (run(WindowPages::All), run(WindowPages::Needed));
        assert_eq!(all.len(), 800);
        assert!(all == needed, "{case} with a window of {window}");
    }
}

/// Few pages, common beginnings, jobs that are broken off and jobs that give way: the texts are those of
/// each request alone with all pages. A text that comes back is computed in other steps than before; so
/// few rows of a sequence in each give the same bits, however they are cut.
#[test]
fn sharing_aborts_and_giving_way_change_no_text() {
    for (case, window) in [("gemma3-text", 8), ("mistral-window", 70)] {
        let model = model(case, window);
        let prefix = text(&model, 3, 560);
        let requests: Vec<Request> = (0..10)
            .map(|n| match n % 3 {
                1 => {
                    let prompt = [prefix.clone(), text(&model, n, 9)].concat();
                    request(prompt, 40, n as u64)
                }
                // Four of these at once want 28 pages in the end.
                _ => request(text(&model, n, 400 + n), 1300, n as u64),
            })
            .collect();
        let crowded = start(&model, WindowPages::Needed, (26, 5), chunks(7));
        let streams: Vec<_> = requests
            .iter()
            .map(|request| crowded.submit(request.clone()).unwrap())
            .collect();
        crowded.abort(streams[4].id());
        let answers: Vec<Answer> = streams.into_iter().map(exl_gen::JobStream::wait).collect();
        drained(&crowded);
        let stats = crowded.stats();
        assert!(stats.cached_tokens > 0, "{stats:?}");
        assert!(stats.preemptions > 0, "{stats:?}");
        let options = EngineOptions {
            prefix_reuse: false,
            ..chunks(7)
        };
        let alone = start(&model, WindowPages::All, (26, 1), options);
        for (n, (request, answer)) in requests.iter().zip(&answers).enumerate() {
            let expected = ask(&alone, request).token_ids;
            match n {
                4 => assert!(expected.starts_with(&answer.token_ids)),
                _ => assert_eq!(answer.token_ids, expected, "request {n} of {case}"),
            }
        }
        drained(&alone);
    }
}

/// Pages on disk hold what all layers keep: either kind of cache reads what the other wrote.
#[test]
fn pages_on_disk_are_those_of_a_cache_that_keeps_everything() {
    let model = model("gemma3-text", 300);
    let folder = std::env::temp_dir().join(format!("exl-gen-window-{}", std::process::id()));
    let asked = request(text(&model, 2, 1200), 20, 4);
    let ways = [WindowPages::All, WindowPages::Needed];
    for (at, first) in ways.into_iter().enumerate() {
        let options = EngineOptions {
            disk: Some(DiskOptions {
                folder: folder.clone(),
                model: format!("model {at}"),
                limit: 1 << 24,
            }),
            ..chunks(100)
        };
        let engine = start(&model, first, (12, 1), options.clone());
        let expected = ask(&engine, &asked).token_ids;
        drained(&engine);
        for again in ways {
            let engine = start(&model, again, (12, 1), options.clone());
            let answer = ask(&engine, &asked);
            assert_eq!(answer.token_ids, expected, "{first:?}, then {again:?}");
            assert_eq!(answer.done.cached_tokens, 4 * 256);
            drained(&engine);
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}
