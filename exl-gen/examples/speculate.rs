//! What guessing tokens gains:
//!
//! `cargo run --release -p exl-gen --example speculate -- run THREADS MODEL [DRAFT COST]` writes the same
//! answers with and without guesses, by turns, and prints tokens per step, the share of right guesses and
//! the time. COST is the time of the draft model's step as a share of the model's.
//!
//! `... -- rows THREADS MODEL` prints what more tokens in a step cost.
//!
//! `... -- rates THREADS MODEL DRAFT` prints how often the draft model's token is the model's when both are
//! drawn with one random number, and how often rejection sampling would keep it.
#![allow(clippy::print_stdout, reason = "its output is the numbers")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use exl_gen::{
    DoneReason, DraftModel, Encode, Engine, EngineHandle, EngineOptions, Grammar, LogitRows,
    Request, RunnerBackend, Sampler, SamplerSettings, SeqSlice, SliceExtras, Speculation,
    Tokenizer,
};
use exl_models::{LoadOptions, Model, Runner, RunnerOptions};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TEXT: &str = include_str!("../../testdata/demo-eval.txt");
/// Tokens of an answer.
const NEW: usize = 200;
/// Turns of each way.
const TURNS: usize = 5;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (what, rest) = args.split_first().ok_or(USAGE)?;
    let (threads, rest) = rest.split_first().ok_or(USAGE)?;
    let threads = threads.parse()?;
    let dirs: Vec<&Path> = rest.iter().map(Path::new).collect();
    match (what.as_str(), &dirs[..]) {
        ("run", [model]) => compare(threads, model, None),
        ("run", [model, draft, cost]) => {
            let cost = cost.to_string_lossy().parse()?;
            compare(threads, model, Some((draft, cost)))
        }
        ("rows", [model]) => rows(threads, model),
        ("rates", [model, draft]) => rates(threads, model, draft),
        _ => Err(USAGE.into()),
    }
}

const USAGE: &str = "usage: speculate run THREADS MODEL [DRAFT COST] | rows THREADS MODEL | \
                     rates THREADS MODEL DRAFT";

fn runner(threads: usize, dir: &Path, rows: usize) -> Result<Runner> {
    let model = Arc::new(Model::open(dir, &LoadOptions::default())?);
    let options = RunnerOptions {
        max_rows: rows,
        threads,
        ..RunnerOptions::default()
    };
    Ok(Runner::new(model, options)?)
}

/// An engine, and what guesses in it.
fn engine(
    threads: usize,
    dir: &Path,
    draft: Option<(&Path, f32)>,
) -> Result<(EngineHandle, Vec<Speculation>)> {
    let tokenizer = Arc::new(Tokenizer::open(dir)?);
    let model = runner(threads, dir, 600)?;
    let options = EngineOptions {
        prefix_reuse: false,
        ..EngineOptions::default()
    };
    let bytes = |runner: &Runner| runner.model().weights().bytes() as f32;
    let size = bytes(&model);
    let backend = Box::new(RunnerBackend::new(model));
    let Some((draft, cost)) = draft else {
        let engine = Engine::start(backend, tokenizer, options)?;
        return Ok((engine, vec![Speculation::ngrams()]));
    };
    let small = runner(threads, draft, 600)?;
    println!(
        "the draft model's weights are {:.2} of the model's",
        bytes(&small) / size
    );
    let draft = DraftModel {
        backend: Box::new(RunnerBackend::new(small)),
        tokenizer: Arc::new(Tokenizer::open(draft)?),
        cost,
    };
    let both = Speculation {
        ngram: Some(3),
        ..Speculation::model()
    };
    let engine = Engine::start_with_draft(backend, draft, tokenizer, options)?;
    let rejection = Speculation {
        rejection: true,
        ..Speculation::model()
    };
    Ok((engine, vec![Speculation::model(), rejection, both]))
}

/// What one way of guessing did.
#[derive(Default)]
struct Sum {
    plain: Vec<f64>,
    guessed: Vec<f64>,
    tokens: usize,
    steps: usize,
    drafted: usize,
    accepted: usize,
}

fn compare(threads: usize, dir: &Path, draft: Option<(&Path, f32)>) -> Result<()> {
    let (engine, ways) = engine(threads, dir, draft)?;
    for (name, request) in requests(&engine)? {
        for speculation in &ways {
            let sum = turns(&engine, &request, speculation)?;
            let what = match (speculation.ngram, speculation.model) {
                _ if speculation.rejection => "model with rejection",
                (Some(_), true) => "n-grams and model",
                (Some(_), false) => "n-grams",
                (None, _) => "model",
            };
            let ratios = sum.plain.iter().zip(&sum.guessed).map(|(a, b)| a / b);
            println!(
                "{name}, {what}: {:.2} tokens a step, {} of {} guesses right, {:.3} s without and \
                 {:.3} s with guesses, {:.2} times as fast",
                sum.tokens as f64 / sum.steps as f64,
                sum.accepted / TURNS,
                sum.drafted / TURNS,
                median(sum.plain.clone()),
                median(sum.guessed.clone()),
                median(ratios.collect()),
            );
        }
    }
    engine.drain();
    Ok(())
}

/// A text to be copied, a text to go on with, both greedy and drawn, and a form.
fn requests(engine: &EngineHandle) -> Result<Vec<(&'static str, Request)>> {
    let encode = |text: &str| engine.tokenizer().encode(text, Encode::TEXT);
    let text = encode(TEXT)?;
    let passage = &text[1000..1300];
    // The answer goes on with the second copy.
    let copy = [passage, &passage[..100]].concat();
    let request = |prompt: &[u32], sampler: SamplerSettings| Request {
        max_new_tokens: NEW,
        ignore_eos: true,
        sampler: SamplerSettings {
            seed: Some(1),
            ..sampler
        },
        ..Request::new(prompt.to_vec())
    };
    let (greedy, drawn) = (SamplerSettings::greedy, SamplerSettings::default);
    let number = serde_json::json!({"type": "integer", "minimum": 0, "maximum": 99});
    let person = serde_json::json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": number},
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let list = serde_json::json!({"type": "array", "items": person, "minItems": 12});
    let people = Request {
        grammar: Some(Grammar::JsonSchema(list)),
        ..request(&encode("The people on the ship: ")?, drawn())
    };
    Ok(vec![
        ("a copied text, greedy", request(&copy, greedy())),
        ("a copied text, drawn", request(&copy, drawn())),
        ("a new text, greedy", request(&text[5000..5200], greedy())),
        ("a new text, drawn", request(&text[5000..5200], drawn())),
        ("a JSON list, drawn", people),
    ])
}

/// Both ways by turns; the texts must be the same.
fn turns(engine: &EngineHandle, request: &Request, speculation: &Speculation) -> Result<Sum> {
    let ask = |speculation: Option<Speculation>| {
        let request = Request {
            speculation,
            ..request.clone()
        };
        let answer = engine.submit(request)?.wait();
        match answer.done.reason {
            DoneReason::Error(why) => Err(Box::<dyn Error>::from(why)),
            _ => Ok(answer),
        }
    };
    // The first turn warms up.
    ask(None)?;
    ask(Some(speculation.clone()))?;
    let mut sum = Sum::default();
    for _ in 0..TURNS {
        let (plain, guessed) = (ask(None)?, ask(Some(speculation.clone()))?);
        if !speculation.rejection && plain.token_ids != guessed.token_ids {
            return Err("the texts differ".into());
        }
        sum.plain.push(plain.done.timings.decode.as_secs_f64());
        sum.guessed.push(guessed.done.timings.decode.as_secs_f64());
        sum.tokens += guessed.done.new_tokens;
        sum.steps += guessed.done.steps;
        sum.drafted += guessed.done.drafted_tokens;
        sum.accepted += guessed.done.accepted_tokens;
    }
    Ok(sum)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rows(threads: usize, dir: &Path) -> Result<()> {
    let text = Tokenizer::open(dir)?.encode(TEXT, Encode::TEXT)?;
    let mut runner = runner(threads, dir, 512)?;
    let pages: Vec<u32> = (0..8).collect();
    let mut step = |start: usize, rows: usize| -> Result<Duration> {
        let begin = Instant::now();
        runner.step(&[SeqSlice {
            tokens: &text[start..start + rows],
            start,
            pages: &pages,
            logits: LogitRows::All,
            extras: SliceExtras::default(),
        }])?;
        Ok(begin.elapsed())
    };
    step(0, 500)?;
    let counts = [1, 2, 3, 4, 6, 8, 12, 16];
    let mut times = vec![Vec::new(); counts.len()];
    for _ in 0..60 {
        for (times, &rows) in times.iter_mut().zip(&counts) {
            times.push(step(500, rows)?);
        }
    }
    // Whatever else the machine does only adds to them.
    let least = |times: &[Duration]| {
        let least = times.iter().min().copied();
        least.unwrap_or_default().as_secs_f64()
    };
    let one = least(&times[0]);
    for (times, rows) in times.iter().zip(counts) {
        let time = least(times);
        let more = (time / one - 1.0) / (rows - 1).max(1) as f64;
        println!(
            "{rows} tokens: {:.3} ms, {more:.3} of the first for each more",
            time * 1e3
        );
    }
    Ok(())
}

fn rates(threads: usize, dir: &Path, draft: &Path) -> Result<()> {
    const LENGTH: usize = 500;
    const DRAWS: u64 = 20;
    let tokenizer = Tokenizer::open(dir)?;
    let text = tokenizer.encode(TEXT, Encode::TEXT)?;
    let logits = |dir: &Path| -> Result<Vec<Vec<f32>>> {
        let slice = SeqSlice {
            tokens: &text[..LENGTH],
            start: 0,
            pages: &[0, 1],
            logits: LogitRows::All,
            extras: SliceExtras::default(),
        };
        let mut runner = runner(threads, dir, LENGTH)?;
        let vocab = runner.model().spec().vocab;
        let rows = runner.step(&[slice])?.chunks_exact(vocab);
        Ok(rows
            .map(|row| row[..tokenizer.vocab_size()].to_vec())
            .collect())
    };
    let (model, draft) = (logits(dir)?, logits(draft)?);
    for temperature in [1.0, 0.8, 0.5] {
        let settings = SamplerSettings {
            temperature,
            seed: Some(1),
            ..SamplerSettings::neutral()
        };
        let mut sampler = Sampler::new(settings, tokenizer.vocab_size())?;
        let (mut same, mut likeliest, mut kept) = (0, 0, 0.0);
        for (at, (p, q)) in (0..).zip(model.iter().zip(&draft)) {
            kept += overlap(p, q, temperature);
            let best = (0..q.len()).max_by(|&a, &b| q[a].total_cmp(&q[b]));
            for draw in 0..DRAWS {
                let index = at * DRAWS + draw;
                let token = sampler.sample(&mut p.clone(), &[], &[], index)?.token;
                let guess = sampler.sample(&mut q.clone(), &[], &[], index)?.token;
                same += u64::from(token == guess);
                likeliest += u64::from(best == Some(token as usize));
            }
        }
        let all = (model.len() as u64 * DRAWS) as f64;
        println!(
            "temperature {temperature}: one random number {:.3}, the likeliest as a guess {:.3}, \
             rejection sampling {:.3}",
            same as f64 / all,
            likeliest as f64 / all,
            kept / model.len() as f64,
        );
    }
    Ok(())
}

/// The sum of the smaller ones of both probabilities of each token.
fn overlap(p: &[f32], q: &[f32], temperature: f32) -> f64 {
    let softmax = |row: &[f32]| -> Vec<f64> {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights = row
            .iter()
            .map(|l| f64::from((l - most) / temperature).exp());
        let weights: Vec<f64> = weights.collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    };
    softmax(p)
        .iter()
        .zip(softmax(q))
        .map(|(a, b)| a.min(b))
        .sum()
}
