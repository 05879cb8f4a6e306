//! The whole way with a trained model: tokenizer, template, engine, runner.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;

use exl_gen::{
    ChatInput, ChatTemplates, DoneReason, Encode, Engine, EngineHandle, EngineOptions, Request,
    RunnerBackend, SamplerSettings, Tokenizer,
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
    let model = Model::open(dir, &LoadOptions::default()).unwrap();
    let options = RunnerOptions {
        kv_type: kv,
        ..RunnerOptions::default()
    };
    let runner = Runner::new(Arc::new(model), options).unwrap();
    let tokenizer = Arc::new(Tokenizer::open(dir).unwrap());
    let options = EngineOptions {
        chunk_rows: 4,
        ..EngineOptions::default()
    };
    Engine::start(Box::new(RunnerBackend::new(runner)), tokenizer, options).unwrap()
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
