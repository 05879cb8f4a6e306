//! `exl generate`: continues prompts, several of them as one batch.

mod output;

use crate::answer;
use crate::args::GenerateArgs;
use crate::failure::{Interrupted, Usage};
use crate::grammar;
use crate::guessing::Guessing;
use crate::sampling;
use crate::session::{self, Room};
use crate::signal::{self, StopFlag};
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use exl_gen::{
    Encode, EngineHandle, Event, Grammar, Guidance, JobStream, Request, SamplerSettings, Tokenizer,
};
use exl_models::ModelSource;
use output::Output;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

/// How long a look at one job's events may take: Ctrl-C works and others wait no longer.
const GLANCE: Duration = Duration::from_millis(20);
/// A prompt as its author wrote it: special tokens in it are meant, BOS is added.
const PROMPT: Encode = Encode {
    parse_special: true,
    add_special: true,
};

/// A prompt and how much may follow it.
struct Job {
    text: String,
    tokens: Vec<u32>,
    max_new: usize,
}

pub(crate) fn run(args: &GenerateArgs, ui: &Ui) -> Result<()> {
    let stop = signal::stop_flag()?;
    let context = args.cache.context.map(|n| n as usize);
    let options = session::load_options(args.load, &args.compute, context);
    let source = session::open(&args.model, &options, ui)?;
    let tokenizer = Arc::new(Tokenizer::open(source.files().dir())?);
    let jobs = jobs(args, &source, &tokenizer, ui)?;
    let sampler = sampling::settings(&args.sampling, source.files())?;
    let given = Given::new(args, &tokenizer)?;
    let guessing = &given.guessing;
    if guessing.most() > 0 && given.negative.is_some() {
        ui.note("--negative reads two sequences side by side: nothing is guessed");
    }
    let lengths = given.lengths(&jobs);
    let room = Room::of(lengths, args.cache.mode)
        .with_disk(&args.cache)
        .with_guesses(guessing, &options)
        .with_adapters(&args.lora.lora);
    let engine = session::engine(source, &tokenizer, &room, &args.compute, &stop, ui)?;
    let mut streams = Vec::new();
    for (number, job) in (1..).zip(&jobs) {
        let stream = engine.submit(given.request(args, job, &sampler));
        streams.push(stream.with_context(|| format!("prompt {number}"))?);
    }
    let prompts = jobs.iter().map(|job| job.text.as_str()).collect();
    let mut output = Output::new(args.json, given.form.is_some(), prompts, *ui);
    let outcome = pump(&mut streams, &mut output, &stop);
    // What there is goes out even when something failed on the way.
    drop(streams);
    end(&engine);
    outcome?;
    output.finish()?;
    if stop.is_set() {
        let why = format!("stopped after {} new tokens", output.new_tokens());
        return Err(Interrupted(why).into());
    }
    Ok(())
}

/// What flags say for all prompts.
struct Given {
    begin: Vec<u32>,
    negative: Option<Vec<u32>>,
    form: Option<Grammar>,
    guessing: Guessing,
}

impl Given {
    fn new(args: &GenerateArgs, tokenizer: &Tokenizer) -> Result<Self> {
        let negative = args.extra.negative.as_ref();
        let negative = negative
            .map(|text| tokenizer.encode(text, PROMPT))
            .transpose()?;
        if negative.as_ref().is_some_and(Vec::is_empty) {
            return Err(
                Usage("--negative is empty, and the model has no BOS token".to_owned()).into(),
            );
        }
        Ok(Self {
            begin: answer::begin(&args.answer, tokenizer)?,
            negative,
            form: grammar::grammar(&args.form, tokenizer)?,
            guessing: Guessing::new(&args.sampling)?,
        })
    }

    /// Tokens of every sequence that runs.
    fn lengths(&self, jobs: &[Job]) -> Vec<usize> {
        let one = |job: &Job| {
            let negative = self.negative.as_ref().map(Vec::len);
            let prompts = std::iter::once(job.tokens.len()).chain(negative);
            prompts
                .map(|prompt| prompt + job.max_new)
                .collect::<Vec<_>>()
        };
        jobs.iter().flat_map(one).collect()
    }

    fn request(&self, args: &GenerateArgs, job: &Job, sampler: &SamplerSettings) -> Request {
        let (answer, extra) = (&args.answer, &args.extra);
        Request {
            max_new_tokens: job.max_new,
            min_new_tokens: answer.min_tokens as usize,
            prefix: self.begin.clone(),
            token_healing: extra.heal,
            sampler: sampler.clone(),
            speculation: self.guessing.speculation.clone(),
            guidance: self.negative.clone().map(|negative| Guidance {
                negative,
                scale: extra.guidance,
            }),
            grammar: self.form.clone(),
            prefer_end: args.form.prefer_end,
            stop_strings: args.stop.clone(),
            banned_strings: answer.ban.clone(),
            ignore_eos: args.ignore_eos,
            logprobs: extra.logprobs.map(|count| count as usize),
            adapters: session::uses(&args.lora.lora),
            ..Request::new(job.tokens.clone())
        }
    }
}

fn end(engine: &EngineHandle) {
    engine.drain();
}

/// Passes events on until every job has ended.
fn pump(streams: &mut [JobStream], output: &mut Output<'_>, stop: &StopFlag) -> Result<()> {
    let mut running: Vec<bool> = vec![true; streams.len()];
    let mut aborted = false;
    while running.iter().any(|r| *r) {
        if stop.is_set() && !aborted {
            aborted = true;
            streams.iter().for_each(JobStream::abort);
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            if !running[number] {
                continue;
            }
            let mut next = stream.recv_timeout(GLANCE);
            while let Some(event) = next {
                running[number] = !matches!(event, Event::Done(_));
                output.event(number, event)?;
                next = stream.try_recv();
            }
        }
    }
    Ok(())
}

/// Encodes the prompts and finds out how much may follow each.
fn jobs(
    args: &GenerateArgs,
    source: &ModelSource,
    tokenizer: &Tokenizer,
    ui: &Ui,
) -> Result<Vec<Job>> {
    let limit = limit(args, source, ui)?;
    let mut jobs = Vec::new();
    for (number, text) in texts(&args.prompt)?.into_iter().enumerate() {
        let tokens = tokenizer.encode(&text, PROMPT)?;
        if text.is_empty() {
            ui.note(&format!(
                "prompt {} is empty: the model starts from nothing",
                number + 1
            ));
        }
        if tokens.is_empty() {
            return Err(Usage(format!("prompt {} is empty", number + 1)).into());
        }
        if tokens.len() >= limit {
            bail!(
                "prompt {} has {} tokens and the cache holds {limit}: shorten it, or give a larger --context (the model was trained for {})",
                number + 1,
                tokens.len(),
                source.spec().max_context
            );
        }
        let max_new = (args.max_tokens as usize).min(limit - tokens.len());
        if max_new < args.max_tokens as usize {
            ui.note(&format!(
                "prompt {}: room for {max_new} new tokens only (--context {limit})",
                number + 1
            ));
        }
        jobs.push(Job {
            text,
            tokens,
            max_new,
        });
    }
    Ok(jobs)
}

/// Tokens of prompt and answer together, at most.
fn limit(args: &GenerateArgs, source: &ModelSource, ui: &Ui) -> Result<usize> {
    let max = source.spec().max_context;
    let limit = args.cache.context.map_or(max, |n| n as usize);
    session::check_context(source, "--context", limit, ui)?;
    Ok(limit)
}

/// The prompts; `-` is replaced by all of stdin.
fn texts(prompts: &[String]) -> Result<Vec<String>> {
    if prompts.iter().filter(|p| *p == "-").count() > 1 {
        return Err(Usage("-p - can be given once: there is one stdin".to_owned()).into());
    }
    prompts
        .iter()
        .map(|prompt| {
            if prompt != "-" {
                return Ok(prompt.clone());
            }
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("-p -: stdin cannot be read as UTF-8 text")?;
            Ok(text)
        })
        .collect()
}
