//! Times decoding through the generator: jobs with scheduling, cache pages, sampling and streaming,
//! as chat and programs run them.

use super::measure::{self, Settings};
use crate::signal::StopFlag;
use crate::ui::Ui;
use anyhow::{Result, bail};
use exl_gen::{
    DoneReason, Engine, EngineHandle, EngineOptions, Request, RunnerBackend, SamplerSettings,
    Tokenizer,
};
use exl_models::Runner;
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// Speed of a batch of jobs beside the bare steps.
#[derive(Clone, Debug, Serialize)]
pub(super) struct JobSpeed {
    pub(super) batch: usize,
    pub(super) context: usize,
    /// Tokens per second of all jobs, each from its first token to its last.
    pub(super) tok_s: f64,
    /// Of the bare steps' tokens per second.
    pub(super) share: f64,
}

/// Decodes as many tokens as the bare steps did. `raw` are their speeds, by batch and context.
pub(super) fn time(
    dir: &Path,
    runner: Runner,
    (settings, raw): (&Settings, &[measure::Decode]),
    stop: &StopFlag,
    ui: &Ui,
) -> Result<Vec<JobSpeed>> {
    let tokenizer = Arc::new(Tokenizer::open(dir)?);
    let vocab = runner.model().spec().vocab;
    let chunk_rows = runner.options().max_rows;
    let engine = Engine::start(
        Box::new(RunnerBackend::new(runner)),
        tokenizer,
        EngineOptions {
            chunk_rows,
            ..EngineOptions::default()
        },
    )?;
    let mut progress = ui.steps("measuring jobs", raw.len() as u64);
    let mut speeds = Vec::new();
    for bare in raw {
        let prompts: Vec<Vec<u32>> = (0..bare.batch)
            .map(|job| prompt(vocab, job, bare.context))
            .collect();
        // Computes the prompts, which are found in the cache from then on: all jobs begin together.
        rate(&engine, &prompts, 1)?;
        let mut rates = Vec::new();
        for _ in 0..settings.repeats {
            measure::check(stop)?;
            rates.push(rate(&engine, &prompts, settings.steps)?);
        }
        let tok_s = measure::median(rates);
        speeds.push(JobSpeed {
            batch: bare.batch,
            context: bare.context,
            tok_s,
            share: tok_s / bare.tok_s,
        });
        progress.add(1);
    }
    Ok(speeds)
}

/// A prompt that begins like no other one, so that every job has pages of its own.
fn prompt(vocab: usize, number: usize, context: usize) -> Vec<u32> {
    let at = |i: usize| (number * 7919 + i * 104_729 + 17) % vocab;
    (0..context.max(1)).map(|i| at(i) as u32).collect()
}

/// Tokens per second of jobs that run at the same time, the first token of each not counted.
fn rate(engine: &EngineHandle, prompts: &[Vec<u32>], steps: usize) -> Result<f64> {
    let jobs = prompts.iter().map(|prompt| {
        let mut request = Request::new(prompt.clone());
        // The first token comes with the prompt.
        request.max_new_tokens = steps + 1;
        request.ignore_eos = true;
        request.sampler = SamplerSettings::greedy();
        engine.submit(request)
    });
    let jobs = jobs.collect::<exl_gen::Result<Vec<_>>>()?;
    let mut total = 0.0;
    for job in jobs {
        let done = job.wait().done;
        if done.reason != DoneReason::MaxTokens {
            bail!("a job ended early: {:?}", done.reason);
        }
        total += (done.new_tokens - 1) as f64 / done.timings.decode.as_secs_f64();
    }
    Ok(total)
}
