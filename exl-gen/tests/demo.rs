//! The whole way with a trained model: tokenizer, template, engine, runner.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;

use exl_gen::{
    ChatInput, ChatTemplates, DoneReason, DraftModel, Encode, Engine, EngineHandle, EngineOptions,
    Request, RunnerBackend, SamplerSettings, Speculation, Tokenizer,
};
use exl_models::{LoadOptions, Model, Runner, RunnerOptions};

const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/models/demo-4m");
const OWN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");

fn dir() -> Option<&'static Path> {
    let found = [OWN, SHARED]
        .into_iter()
        .map(Path::new)
        .find(|dir| dir.join("tokenizer.json").is_file());
    if found.is_none() {
        println!("skipped: no model in {OWN} or {SHARED}");
    }
    found
}

fn start(dir: &Path, kv: exl_tensor::KvType) -> EngineHandle {
    let options = RunnerOptions {
        kv_type: kv,
        ..RunnerOptions::default()
    };
    let chunks = EngineOptions {
        chunk_rows: 4,
        ..EngineOptions::default()
    };
    start_with(dir, options, chunks)
}

fn start_with(dir: &Path, runner: RunnerOptions, engine: EngineOptions) -> EngineHandle {
    let model = Model::open(dir, &LoadOptions::default()).unwrap();
    let runner = Runner::new(Arc::new(model), runner).unwrap();
    let tokenizer = Arc::new(Tokenizer::open(dir).unwrap());
    Engine::start(Box::new(RunnerBackend::new(runner)), tokenizer, engine).unwrap()
}

/// Tokens of a long text, from `start` on.
fn passage(engine: &EngineHandle, start: usize, count: usize) -> Vec<u32> {
    let text = include_str!("../../testdata/demo-eval.txt");
    let tokens = engine.tokenizer().encode(text, Encode::TEXT).unwrap();
    tokens[start..start + count].to_vec()
}

fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request {
        max_new_tokens,
        sampler: SamplerSettings::greedy(),
        ignore_eos: true,
        ..Request::new(prompt)
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let golden = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../testdata/demo-4m-greedy.json"
    );
    let (Some(dir), Ok(golden)) = (dir(), std::fs::read_to_string(golden)) else {
        println!("skipped: no model or no expected tokens");
        return;
    };
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let ids = |key: &str| -> Vec<u32> {
        let list = golden[key].as_array().unwrap().iter();
        list.map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let engine = start(dir, exl_tensor::KvType::F32);
    let prompt = engine
        .tokenizer()
        .encode(golden["text"].as_str().unwrap(), Encode::TEXT)
        .unwrap();
    assert_eq!(prompt, ids("prompt"));
    let expected = ids("ids");
    let request = Request {
        max_new_tokens: expected.len(),
        sampler: SamplerSettings::greedy(),
        ignore_eos: true,
        decode_special: true,
        ..Request::new(prompt)
    };
    let answer = engine.submit(request).unwrap().wait();
    assert_eq!(answer.done.reason, DoneReason::MaxTokens);
    let first = answer
        .token_ids
        .iter()
        .zip(&expected)
        .position(|(a, b)| a != b);
    assert_eq!(first, None, "first difference; gaps: {}", golden["gaps"]);
    assert_eq!(answer.token_ids.len(), expected.len());
    engine.drain();
}

/// Guessed tokens go through the model side by side, and the text is the same to the last one.
#[test]
fn guesses_change_no_text() {
    let Some(dir) = dir() else {
        return;
    };
    let tokenizer = Arc::new(Tokenizer::open(dir).unwrap());
    let model = Arc::new(Model::open(dir, &LoadOptions::default()).unwrap());
    let runner = |kv_type| {
        let options = RunnerOptions {
            kv_type,
            threads: 2,
            ..RunnerOptions::default()
        };
        Box::new(RunnerBackend::new(
            Runner::new(Arc::clone(&model), options).unwrap(),
        ))
    };
    for kv_type in [exl_tensor::KvType::F16, exl_tensor::KvType::Q4] {
        let draft = DraftModel {
            backend: runner(exl_tensor::KvType::Q4),
            tokenizer: Arc::clone(&tokenizer),
            cost: 0.0,
        };
        let options = EngineOptions::default();
        let engine =
            Engine::start_with_draft(runner(kv_type), draft, Arc::clone(&tokenizer), options);
        let engine = engine.unwrap();
        let settings = [SamplerSettings::greedy(), SamplerSettings::default()];
        for (seed, sampler) in (1..).zip(settings) {
            let sampler = SamplerSettings {
                seed: Some(seed),
                ..sampler
            };
            let request = Request {
                sampler,
                ..greedy(passage(&engine, 500, 200), 120)
            };
            let ask = |speculation| {
                let request = Request {
                    speculation,
                    ..request.clone()
                };
                engine.submit(request).unwrap().wait()
            };
            let plain = ask(None);
            assert_eq!(plain.done.steps, 120);
            for speculation in [Speculation::ngrams(), Speculation::model()] {
                let guessed = ask(Some(speculation.clone()));
                assert_eq!(guessed.token_ids, plain.token_ids, "{speculation:?}");
                assert_eq!(guessed.text, plain.text);
                let done = guessed.done;
                assert!(!speculation.model || done.steps < 60, "{done:?}");
            }
        }
        engine.drain();
    }
}

#[test]
fn batched_answers_equal_single_ones() {
    let Some(dir) = dir() else {
        return;
    };
    let engine = start(dir, exl_tensor::KvType::F16);
    let templates = ChatTemplates::open(dir).unwrap().unwrap();
    let request = |question: &str| {
        let messages = [serde_json::json!({"role": "user", "content": question})];
        let text = templates
            .select(false)
            .unwrap()
            .render(&ChatInput {
                messages: &messages,
                add_generation_prompt: true,
                variables: Some(engine.tokenizer().template_variables()),
                ..ChatInput::default()
            })
            .unwrap();
        assert_eq!(
            text,
            format!("<|begin|><|user|>{question}<|end|><|assistant|>")
        );
        Request {
            max_new_tokens: 24,
            sampler: SamplerSettings::greedy(),
            ..Request::new(engine.tokenizer().encode(&text, Encode::PROMPT).unwrap())
        }
    };
    let questions = ["Who was the captain?", "Tell me of the sea.", "Why?"];
    let alone: Vec<String> = questions
        .iter()
        .map(|question| engine.submit(request(question)).unwrap().wait().text)
        .collect();
    let streams: Vec<_> = questions
        .iter()
        .map(|question| engine.submit(request(question)).unwrap())
        .collect();
    let together: Vec<String> = streams
        .into_iter()
        .map(|stream| stream.wait().text)
        .collect();
    assert_eq!(alone, together);
    assert!(alone.iter().all(|text| !text.is_empty()));
    engine.drain();
}

/// Few pages, so that jobs also give way and come back. The texts are those of each request alone
/// and without reuse.
#[test]
fn sharing_and_giving_way_change_no_text() {
    let Some(dir) = dir() else {
        return;
    };
    let engine = |pages, seqs, prefix_reuse| {
        let runner = RunnerOptions {
            pages,
            max_seqs: seqs,
            max_rows: 128,
            ..RunnerOptions::default()
        };
        let options = EngineOptions {
            chunk_rows: 100,
            prefix_reuse,
            ..EngineOptions::default()
        };
        start_with(dir, runner, options)
    };
    let crowded = engine(5, 6, true);
    let prefix = passage(&crowded, 0, 560);
    let request = |n: usize| match n % 2 {
        // Two of these at once want six pages in the end.
        0 => greedy(passage(&crowded, 700 + 30 * n, 30 + n), 600),
        _ => greedy([prefix.clone(), passage(&crowded, 30 * n, 9)].concat(), 20),
    };
    let requests: Vec<Request> = (0..6).map(request).collect();
    let streams: Vec<_> = requests
        .iter()
        .map(|request| crowded.submit(request.clone()).unwrap())
        .collect();
    let together: Vec<Vec<u32>> = streams.into_iter().map(|s| s.wait().token_ids).collect();
    crowded.drain();
    let (stats, load) = (crowded.stats(), crowded.load());
    assert_eq!((stats.failed, load.free_pages), (0, load.pages));
    assert!(stats.cached_tokens > 0, "{stats:?}");
    assert!(stats.preemptions > 0, "{stats:?}");
    let alone = engine(4, 1, false);
    for (n, (request, ids)) in requests.iter().zip(&together).enumerate() {
        let answer = alone.submit(request.clone()).unwrap().wait();
        assert_eq!(&answer.token_ids, ids, "request {n}");
    }
    alone.drain();
}
