//! What masks cost: `cargo run --release -p exl-gen --example masks -- MODEL [JOBS] [TOKENS]`.
//!
//! Runs the same batch without and with a JSON schema and prints where the time went.
#![allow(clippy::print_stdout, reason = "its output is the numbers")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use exl_gen::{
    Encode, Engine, EngineOptions, Grammar, Request, RunnerBackend, SamplerSettings, Stats,
    Tokenizer,
};
use exl_models::{LoadOptions, Model, Runner, RunnerOptions};

/// People, each a small object: strings, numbers, choices, lists.
fn schema(items: usize) -> serde_json::Value {
    serde_json::json!({
        "type": "array", "minItems": items, "maxItems": items,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 12, "maxLength": 40},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "kind": {"enum": ["sailor", "captain", "passenger"]},
                "said": {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 4}
            },
            "required": ["name", "age", "kind", "said"],
            "additionalProperties": false
        }
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dir = Path::new(args.first().ok_or("give a model directory")?);
    let number = |at: usize, default| args.get(at).map_or(Ok(default), |n| n.parse());
    let (jobs, tokens): (usize, usize) = (number(1, 1)?, number(2, 400)?);

    let tokenizer = Arc::new(Tokenizer::open(dir)?);
    let model = Arc::new(Model::open(dir, &LoadOptions::default())?);
    let prompt = tokenizer.encode("The people on the ship: ", Encode::TEXT)?;
    let run = |grammar: Option<Grammar>| -> Result<(Stats, Duration), Box<dyn std::error::Error>> {
        let options = RunnerOptions {
            pages: jobs * (prompt.len() + tokens).div_ceil(256),
            max_seqs: jobs,
            ..RunnerOptions::default()
        };
        let runner = Runner::new(Arc::clone(&model), options)?;
        let backend = Box::new(RunnerBackend::new(runner));
        let engine = Engine::start(backend, Arc::clone(&tokenizer), EngineOptions::default())?;
        let request = |seed: usize| Request {
            max_new_tokens: tokens,
            grammar: grammar.clone(),
            ignore_eos: true,
            sampler: SamplerSettings {
                seed: Some(seed as u64),
                ..SamplerSettings::default()
            },
            ..Request::new(prompt.clone())
        };
        let streams: Vec<_> = (0..jobs).map(|job| engine.submit(request(job))).collect();
        let begin = Instant::now();
        for stream in streams {
            println!("  {:?}", stream?.wait().done.reason);
        }
        let took = begin.elapsed();
        engine.drain();
        Ok((engine.stats(), took))
    };

    println!("{}, {jobs} jobs of up to {tokens} tokens", dir.display());
    let grammar = Grammar::JsonSchema(schema(200));
    // The first run warms up.
    run(None)?;
    for (name, grammar) in [("free", None), ("with a schema", Some(grammar))] {
        let (stats, took) = run(grammar)?;
        let each = |time: Duration, n: u64| time.as_secs_f64() * 1e6 / n.max(1) as f64;
        println!(
            "{name}: {} tokens in {} steps, {:.3} s ({:.1} us a step, {:.1} us of it the model)",
            stats.new_tokens,
            stats.steps,
            took.as_secs_f64(),
            each(took, stats.steps),
            each(stats.busy, stats.steps),
        );
        let masks = stats.masks;
        if masks.masks > 0 {
            println!(
                "  {} masks, {:.1} us each; waited for them {:.2} us a step, {:.2}% of the time",
                masks.masks,
                each(masks.computed, masks.masks),
                each(masks.waited, stats.steps),
                100.0 * masks.waited.as_secs_f64() / took.as_secs_f64(),
            );
        }
    }
    Ok(())
}
