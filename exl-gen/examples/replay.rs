//! Loads an engine as a server does, and checks what it answers:
//!
//! `cargo run --release -p exl-gen --example replay -- prefix MODEL_DIR` sends 200 requests that begin
//! with the same 1500 tokens: without reuse of prefixes, with it, and after a restart that finds them on disk.
//!
//! `cargo run --release -p exl-gen --example replay -- poisson MODEL_DIR` sends 500 requests at random
//! times, aborts some of them, and compares every answer with that of the request alone.
#![allow(clippy::print_stdout, reason = "its output is the report")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use exl_gen::{
    Answer, DiskOptions, DoneReason, Encode, Engine, EngineHandle, EngineOptions, Event, JobStream,
    Philox, Request, RunnerBackend, SamplerSettings, Tokenizer,
};
use exl_models::{LoadOptions, Model, Runner, RunnerOptions};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Logits closer than this may change places.
const GAP: f32 = 1e-3;
const TEXT: &str = include_str!("../../testdata/demo-eval.txt");

/// A model that engines can be started with.
struct Loaded {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    /// The tokens of a text, to cut prompts from.
    text: Vec<u32>,
}

impl Loaded {
    fn open(dir: &Path) -> Result<Self> {
        let tokenizer = Arc::new(Tokenizer::open(dir)?);
        Ok(Self {
            model: Arc::new(Model::open(dir, &LoadOptions::default())?),
            text: tokenizer.encode(TEXT, Encode::TEXT)?,
            tokenizer,
        })
    }

    fn engine(&self, pages: usize, seqs: usize, options: EngineOptions) -> Result<EngineHandle> {
        let sizes = RunnerOptions {
            pages,
            max_rows: 512 + seqs,
            max_seqs: seqs,
            ..RunnerOptions::default()
        };
        let runner = Runner::new(Arc::clone(&self.model), sizes)?;
        let backend = Box::new(RunnerBackend::new(runner));
        Ok(Engine::start(
            backend,
            Arc::clone(&self.tokenizer),
            options,
        )?)
    }

    /// `count` tokens of the text from `start` on, which goes round.
    fn cut(&self, start: usize, count: usize) -> Vec<u32> {
        let tokens = self.text.iter().cycle();
        tokens
            .skip(start % self.text.len())
            .take(count)
            .copied()
            .collect()
    }
}

fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request {
        max_new_tokens,
        sampler: SamplerSettings::greedy(),
        ignore_eos: true,
        ..Request::new(prompt)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let loaded = |dir: &String| Loaded::open(dir.as_ref());
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["prefix", _] => prefix(&loaded(&args[1])?),
        ["poisson", _] => poisson(&loaded(&args[1])?),
        _ => Err("usage: replay prefix|poisson MODEL_DIR".into()),
    }
}

const JOBS: usize = 200;
const PREFIX: usize = 1500;

/// The same requests in all ways; the answers must be equal.
fn prefix(loaded: &Loaded) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("exl-replay-{}", std::process::id()));
    let outcome = prefix_in(loaded, &folder);
    let removed = std::fs::remove_dir_all(&folder);
    outcome?;
    Ok(removed?)
}

fn prefix_in(loaded: &Loaded, folder: &Path) -> Result<()> {
    let requests: Vec<Request> = (0..JOBS)
        .map(|n| {
            let own = loaded.cut(PREFIX + 40 * n, 16);
            greedy([loaded.cut(0, PREFIX), own].concat(), 16)
        })
        .collect();
    let disk = DiskOptions {
        folder: folder.to_owned(),
        model: "the model of this process".to_owned(),
        limit: 1 << 32,
    };
    let ways = [
        ("without reuse", false, None),
        ("with reuse", true, Some(disk.clone())),
        ("after a restart", true, Some(disk)),
    ];
    let mut texts: Vec<Vec<Vec<u32>>> = Vec::new();
    let mut seconds = Vec::new();
    for (way, prefix_reuse, disk) in ways {
        let options = EngineOptions {
            prefix_reuse,
            disk,
            ..EngineOptions::default()
        };
        let engine = loaded.engine(112, 16, options)?;
        let (answers, wall) = run(&engine, &requests)?;
        let stats = engine.stats();
        seconds.push(wall.as_secs_f64());
        println!(
            "{way}: {:.2} s ({:.1} times as fast), {} prompt tokens computed, {} found",
            wall.as_secs_f64(),
            seconds[0] / wall.as_secs_f64(),
            stats.prompt_tokens,
            stats.cached_tokens
        );
        // The end of the prefix shares a page with what follows: those that start together compute it
        // side by side.
        let most = JOBS * 16 + 16 * 256 + if texts.len() < 2 { PREFIX } else { 0 };
        if prefix_reuse && stats.prompt_tokens as usize > most {
            return Err("the prefix was computed more than once".into());
        }
        texts.push(answers.into_iter().map(|answer| answer.token_ids).collect());
    }
    match texts.iter().all(|text| *text == texts[0]) {
        true => Ok(()),
        false => Err("the answers differ".into()),
    }
}

fn run(engine: &EngineHandle, requests: &[Request]) -> Result<(Vec<Answer>, Duration)> {
    let begin = Instant::now();
    let submit = |request: &Request| engine.submit(request.clone());
    let streams = requests
        .iter()
        .map(submit)
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let answers = streams.into_iter().map(JobStream::wait).collect();
    let wall = begin.elapsed();
    engine.drain();
    Ok((answers, wall))
}

/// A request of the trace.
struct Arrival {
    /// Seconds after the one before.
    after: f64,
    request: Request,
    /// Aborted after so many tokens.
    abort: Option<usize>,
}

const REQUESTS: usize = 500;
/// Requests per second, more than a small model on few cores keeps up with at times.
const RATE: f64 = 60.0;

fn trace(loaded: &Loaded) -> Vec<Arrival> {
    let random = Philox::new(7);
    let draw = |n: usize, k: usize| random.uniform((8 * n + k) as u64, 0);
    (0..REQUESTS)
        .map(|n| {
            // A third begins with one of four common texts.
            let common = match draw(n, 0) < 0.33 {
                true => loaded.cut(3000 * (4.0 * draw(n, 1)) as usize, 600),
                false => Vec::new(),
            };
            let own = loaded.cut(
                (1e6 * draw(n, 2)) as usize,
                1 + (400.0 * draw(n, 3)) as usize,
            );
            let new = 1 + (60.0 * draw(n, 4)) as usize;
            Arrival {
                after: -(1.0 - draw(n, 5)).ln() / RATE,
                request: greedy([common, own].concat(), new),
                abort: (draw(n, 6) < 0.2).then_some((40.0 * draw(n, 7)) as usize),
            }
        })
        .collect()
}

fn poisson(loaded: &Loaded) -> Result<()> {
    let trace = trace(loaded);
    let engine = loaded.engine(40, 16, EngineOptions::default())?;
    let begin = Instant::now();
    let mut open: Vec<(usize, JobStream, Vec<u32>)> = Vec::new();
    let mut ended: Vec<(usize, Vec<u32>, DoneReason)> = Vec::new();
    let mut memory = Vec::new();
    let mut next = Duration::ZERO;
    for (n, arrival) in trace.iter().enumerate() {
        next += Duration::from_secs_f64(arrival.after);
        while begin.elapsed() < next {
            read(&trace, &mut open, &mut ended);
            std::thread::sleep(Duration::from_millis(1));
        }
        open.push((n, engine.submit(arrival.request.clone())?, Vec::new()));
        if n % 100 == 99 {
            memory.push(resident());
        }
    }
    while !open.is_empty() {
        read(&trace, &mut open, &mut ended);
        std::thread::sleep(Duration::from_millis(1));
    }
    memory.push(resident());
    let wall = begin.elapsed().as_secs_f64();
    engine.drain();
    let (stats, load) = (engine.stats(), engine.load());
    println!(
        "{REQUESTS} requests in {wall:.1} s: {} finished, {} aborted, {} failed; {} prompt tokens \
         computed, {} found in the cache, {} times a job gave way",
        stats.finished,
        stats.aborted,
        stats.failed,
        stats.prompt_tokens,
        stats.cached_tokens,
        stats.preemptions
    );
    println!("memory in MiB after every 100 requests: {memory:?}");
    if stats.failed > 0 || load.free_pages != load.pages {
        return Err("jobs failed or pages leaked".into());
    }
    compare(loaded, &trace, &ended)
}

/// Reads what there is, and aborts what is to be aborted.
fn read(
    trace: &[Arrival],
    open: &mut Vec<(usize, JobStream, Vec<u32>)>,
    ended: &mut Vec<(usize, Vec<u32>, DoneReason)>,
) {
    open.retain_mut(|(n, stream, ids)| {
        while let Some(event) = stream.try_recv() {
            match event {
                Event::Text { token_ids, .. } => ids.extend(token_ids),
                Event::Done(done) => {
                    ended.push((*n, std::mem::take(ids), done.reason));
                    return false;
                }
                _ => {}
            }
        }
        if trace[*n].abort.is_some_and(|after| ids.len() >= after) {
            stream.abort();
        }
        true
    });
}

/// Every request again, alone and without reuse.
fn compare(
    loaded: &Loaded,
    trace: &[Arrival],
    ended: &[(usize, Vec<u32>, DoneReason)],
) -> Result<()> {
    let options = EngineOptions {
        prefix_reuse: false,
        ..EngineOptions::default()
    };
    let engine = loaded.engine(8, 1, options)?;
    let mut different = 0;
    for (n, ids, reason) in ended {
        let request = Request {
            logprobs: Some(2),
            ..trace[*n].request.clone()
        };
        let full = request.max_new_tokens;
        let alone = engine.submit(request)?.wait();
        let complete = ids.len() == full || *reason == DoneReason::Aborted;
        if !complete || alone.token_ids.len() != full {
            return Err(format!("request {n} ended early: {reason:?}").into());
        }
        let first = ids.iter().zip(&alone.token_ids).position(|(a, b)| a != b);
        let Some(first) = first else { continue };
        let top = &alone.logprobs[first].top;
        different += 1;
        if top[0].1 - top[1].1 > GAP {
            return Err(format!("request {n} differs at token {first}: {top:?}").into());
        }
    }
    engine.drain();
    println!(
        "{} answers are those of the requests alone, {different} of them up to a tie within {GAP}",
        ended.len()
    );
    Ok(())
}

/// Memory of this process in MiB, 0 where the system does not tell.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<usize>().ok());
    (pages.unwrap_or(0) * 4096) >> 20
}
