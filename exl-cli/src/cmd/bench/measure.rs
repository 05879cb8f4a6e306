//! Times prefill and decode steps of a loaded model.

use super::profile::Profile;
use super::{Report, jobs};
use crate::args::{ComputeArgs, LoadArgs};
use crate::failure::Interrupted;
use crate::machine;
use crate::memory::{self, Taken};
use crate::session;
use crate::signal::StopFlag;
use crate::ui::Ui;
use anyhow::{Result, anyhow};
use exl_models::{
    Backend, Draw, LogitRows, MemoryUse, ModelSource, Runner, RunnerOptions, SampleParams,
    SeqSlice, SliceExtras, WindowPages,
};
use exl_tensor::{Gpu, KvType, PAGE_TOKENS, Phase, PlanExtras, PlanKey, SampleShape};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// Steps run before the clock starts: they record plans, touch memory and wake threads.
const WARMUP_STEPS: usize = 2;

/// What to measure.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) prefill: Vec<usize>,
    pub(super) batch: Vec<usize>,
    pub(super) context: Vec<usize>,
    pub(super) cache: KvType,
    pub(super) steps: usize,
    pub(super) repeats: usize,
    pub(super) profile: bool,
    pub(super) jobs: bool,
    pub(super) compute: ComputeArgs,
    pub(super) load: LoadArgs,
}

/// Speed of reading a prompt.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Prefill {
    pub(super) tokens: usize,
    pub(super) tok_s: f64,
}

/// Speed of writing.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Decode {
    pub(super) batch: usize,
    pub(super) context: usize,
    /// Tokens per second of the whole batch.
    pub(super) tok_s: f64,
    pub(super) ms_per_step: f64,
    /// Weights and cache read, per second.
    pub(super) gb_s: f64,
    /// Share of the measured read bandwidth.
    pub(super) roofline: f64,
    pub(super) launches: usize,
}

/// Loads the model and measures everything in `settings`.
pub(super) fn measure(
    dir: &Path,
    (settings, gpu): (&Settings, Option<&Gpu>),
    bandwidth: f64,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<Report> {
    let start = Instant::now();
    let options = session::load_options(settings.load, &settings.compute, None);
    let source = session::open(dir, &options, ui)?;
    let options = runner_options(settings, gpu);
    let need = memory::needed(&source, &options.memory_request(), gpu)?;
    check_sizes(&source, (settings, gpu), &need, ui)?;
    let loaded = session::load(&source, gpu, stop, ui)?;
    drop(source);
    let load_seconds = start.elapsed().as_secs_f64();
    let mut runner = Runner::new(loaded.model, options)?;
    let Speeds {
        prefill,
        decode,
        profiles,
    } = speeds(&mut runner, settings, bandwidth, stop, ui)?;
    let kv_type = runner.options().kv_type;
    let cost = runner.model().cost(&decode_key(&runner, 1, 1), kv_type, 0);
    let resident = machine::resident();
    let gpu_memory = gpu.map(|gpu| Taken::now(gpu, &need)).transpose()?;
    let (device, cache_bytes) = (session::device_name(&runner), runner.memory().cache);
    let jobs = match settings.jobs {
        true => jobs::time(dir, runner, (settings, &decode), stop, ui)?,
        false => Vec::new(),
    };
    Ok(Report {
        device,
        model: String::new(),
        threads: session::threads(&settings.compute.device),
        activations: session::activations_name(&settings.compute),
        deterministic: settings.compute.deterministic,
        cache: settings.cache.to_string(),
        weight_bytes: cost.total.weight_bytes,
        checkpoint_bytes: loaded.checkpoint_bytes,
        read_bandwidth_gb_s: bandwidth / 1e9,
        load_seconds,
        prefill,
        decode,
        jobs,
        profiles,
        memory_bytes: resident.map_or(0, |r| r.now),
        memory_peak_bytes: resident.map_or(0, |r| r.peak),
        cache_bytes,
        gpu_memory,
    })
}

/// Room for the hungriest measurement.
fn runner_options(settings: &Settings, gpu: Option<&Gpu>) -> RunnerOptions {
    let batch = settings.batch.iter().copied().max().unwrap_or(1);
    let prompt = settings.prefill.iter().copied().max().unwrap_or(1);
    // The generator keeps half of a step's rows for prompts.
    let least = if settings.jobs { 2 * batch } else { batch };
    RunnerOptions {
        pages: pages(settings),
        window_pages: WindowPages::Needed,
        max_rows: session::prefill_rows(gpu).min(prompt).max(least),
        max_seqs: batch,
        ..session::runner_options(&settings.compute, settings.cache, gpu)
    }
}

/// Refuses measurements that do not fit into memory, and remarks on those that the model was not
/// made for.
fn check_sizes(
    source: &ModelSource,
    (settings, gpu): (&Settings, Option<&Gpu>),
    need: &MemoryUse,
    ui: &Ui,
) -> Result<()> {
    let most = |values: &[usize]| values.iter().copied().max().unwrap_or(0);
    let (tokens, batch) = (most(&settings.prefill), most(&settings.batch));
    let context = most(&settings.context) + decode_tokens(settings);
    let name = source.files().dir().display();
    let what = format!("{name} with prompts of {tokens} tokens and {batch} sequences of {context}");
    memory::check(need, &what, "--prefill, --batch or --context", gpu)?;
    session::check_context(source, "--prefill", tokens, ui)?;
    session::check_context(source, "--context", context, ui)?;
    Ok(())
}

fn speeds(
    runner: &mut Runner,
    settings: &Settings,
    bandwidth: f64,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<Speeds> {
    let total = settings.prefill.len() + settings.batch.len() * settings.context.len();
    let mut progress = ui.steps("measuring", total as u64);
    let mut speeds = Speeds::default();
    for &tokens in &settings.prefill {
        let step = format!("prefill of {tokens}");
        progress.set_label(&step);
        let repeats = settings.repeats;
        speeds
            .prefill
            .push(time_prefill(runner, tokens, repeats, stop)?);
        if settings.profile {
            let run = |runner: &mut Runner| time_prefill(runner, tokens, 0, stop).map(drop);
            speeds.profiles.push(profiled(runner, step, run)?);
        }
        progress.add(1);
    }
    for &batch in &settings.batch {
        for &context in &settings.context {
            let step = format!("decode of {batch} at {context}");
            progress.set_label(&step);
            speeds.decode.push(time_decode(
                runner,
                (batch, context),
                settings,
                bandwidth,
                stop,
            )?);
            if settings.profile {
                let run = |runner: &mut Runner| {
                    let once = Settings {
                        steps: 1,
                        repeats: 1,
                        ..settings.clone()
                    };
                    time_decode(runner, (batch, context), &once, bandwidth, stop).map(drop)
                };
                speeds.profiles.push(profiled(runner, step, run)?);
            }
            progress.add(1);
        }
    }
    Ok(speeds)
}

/// All that was measured.
#[derive(Default)]
struct Speeds {
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    profiles: Vec<Profile>,
}

/// Runs steps with their parts timed; the last one counts.
fn profiled(
    runner: &mut Runner,
    step: String,
    run: impl FnOnce(&mut Runner) -> Result<()>,
) -> Result<Profile> {
    runner.time_parts(true);
    let ran = run(runner);
    let profile = Profile::new(step, runner.part_times());
    runner.time_parts(false);
    ran.map(|()| profile)
}

/// Pages that the hungriest measurement needs.
fn pages(settings: &Settings) -> usize {
    let prefill = settings
        .prefill
        .iter()
        .copied()
        .max()
        .unwrap_or(0)
        .div_ceil(PAGE_TOKENS);
    let batch = settings.batch.iter().copied().max().unwrap_or(0);
    let context = settings.context.iter().copied().max().unwrap_or(0) + decode_tokens(settings);
    prefill.max(batch * context.div_ceil(PAGE_TOKENS))
}

fn decode_tokens(settings: &Settings) -> usize {
    WARMUP_STEPS + settings.steps
}

fn time_prefill(
    runner: &mut Runner,
    tokens: usize,
    repeats: usize,
    stop: &StopFlag,
) -> Result<Prefill> {
    let pages: Vec<u32> = (0..tokens.div_ceil(PAGE_TOKENS) as u32).collect();
    let window_pages = window_pages(runner, (0, 1), pages.len());
    let text = some_tokens(runner, tokens);
    let chunk_rows = runner.options().max_rows;
    let mut times = Vec::new();
    // One round more than asked: the first one warms up.
    for round in 0..=repeats {
        let start = Instant::now();
        for (at, chunk) in text.chunks(chunk_rows).enumerate() {
            check(stop)?;
            let first = at * chunk_rows;
            let last = first + chunk.len() == tokens;
            let logits = if last {
                LogitRows::Last
            } else {
                LogitRows::None
            };
            let out = runner.step(&[SeqSlice {
                tokens: chunk,
                start: first,
                pages: &pages,
                logits,
                extras: SliceExtras {
                    window_pages: &window_pages,
                    ..SliceExtras::default()
                },
            }])?;
            if last {
                check_finite(out)?;
            }
        }
        if round > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(Prefill {
        tokens,
        tok_s: tokens as f64 / median(times),
    })
}

/// Decodes with `context` tokens in the cache. They are not computed: zeros cost as much to read.
fn time_decode(
    runner: &mut Runner,
    (batch, context): (usize, usize),
    settings: &Settings,
    bandwidth: f64,
    stop: &StopFlag,
) -> Result<Decode> {
    let per_seq = (context + decode_tokens(settings)).div_ceil(PAGE_TOKENS) as u32;
    let pages: Vec<Vec<u32>> = (0..batch as u32)
        .map(|seq| (seq * per_seq..(seq + 1) * per_seq).collect())
        .collect();
    let window_pages: Vec<Vec<u32>> = (0..batch)
        .map(|seq| window_pages(runner, (seq, batch), per_seq as usize))
        .collect();
    let tokens = some_tokens(runner, batch);
    let mut times = Vec::new();
    for _ in 0..settings.repeats {
        let mut start = Instant::now();
        for step in 0..decode_tokens(settings) {
            check(stop)?;
            if step == WARMUP_STEPS {
                start = Instant::now();
            }
            let slices: Vec<SeqSlice<'_>> = (0..batch)
                .map(|seq| SeqSlice {
                    tokens: &tokens[seq..=seq],
                    start: context + step,
                    pages: &pages[seq],
                    logits: LogitRows::Last,
                    extras: SliceExtras {
                        window_pages: &window_pages[seq],
                        ..SliceExtras::default()
                    },
                })
                .collect();
            decode_step(runner, &slices)?;
        }
        times.push(start.elapsed().as_secs_f64() / settings.steps as f64);
    }
    let seconds = median(times);
    let middle = context + WARMUP_STEPS + settings.steps / 2;
    let key = decode_key(runner, batch, per_seq as usize);
    let cost = runner.model().cost(&key, runner.options().kv_type, middle);
    let rate = (cost.total.weight_bytes + cost.total.kv_bytes) as f64 / seconds;
    Ok(Decode {
        batch,
        context,
        tok_s: batch as f64 / seconds,
        ms_per_step: seconds * 1e3,
        gb_s: rate / 1e9,
        roofline: rate / bandwidth,
        launches: cost.launches,
    })
}

/// Window pages in the places of a sequence's pages, where layers with a window have pages of their own:
/// each of `seqs` sequences uses its share of them over and over. A share holds a window and a step: there
/// are enough for as many sequences that take the largest step together.
fn window_pages(runner: &Runner, (seq, seqs): (usize, usize), places: usize) -> Vec<u32> {
    let Some(all) = runner.kv().pages().window else {
        return Vec::new();
    };
    let share = all / seqs;
    let page = |place: usize| (seq * share + place % share) as u32;
    (0..places).map(page).collect()
}

/// A step as the engine takes it: a GPU draws the tokens itself, the CPU gives logits.
fn decode_step(runner: &mut Runner, slices: &[SeqSlice<'_>]) -> Result<()> {
    if !draws(runner) {
        return check_finite(runner.step(slices)?);
    }
    let greedy = Draw {
        params: SampleParams::default(),
        recent: &[],
        blocked: &[],
    };
    let draws = vec![greedy; slices.len()];
    let tokens = runner.step_drawn(slices, &draws, usize::MAX)?;
    if tokens.iter().all(|&token| token >= 0) {
        return Ok(());
    }
    Err(broken())
}

fn draws(runner: &Runner) -> bool {
    matches!(runner.options().backend, Backend::Cuda(..))
}

/// The plan that [`decode_step`] runs.
fn decode_key(runner: &Runner, batch: usize, pages_per_seq: usize) -> PlanKey {
    let sample = SampleShape {
        tokens: runner.model().spec().vocab,
        window: 0,
        blocked: 0,
    };
    PlanKey {
        phase: Phase::Decode,
        rows: batch,
        seqs: batch,
        pages_per_seq: pages_per_seq.next_power_of_two(),
        out_rows: batch,
        sample: draws(runner).then_some(sample),
        extras: PlanExtras {
            window_pages: runner.kv().pages().window.is_some(),
            ..PlanExtras::default()
        },
    }
}

/// Tokens spread over the vocabulary.
fn some_tokens(runner: &Runner, n: usize) -> Vec<u32> {
    let vocab = runner.model().spec().vocab as u64;
    (0..n as u64)
        .map(|i| ((i * 2_654_435_761 + 17) % vocab) as u32)
        .collect()
}

/// A speed means nothing when the numbers broke down.
fn check_finite(logits: &[f32]) -> Result<()> {
    if logits.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(broken())
}

fn broken() -> anyhow::Error {
    anyhow!("the model computes NaN or infinity: its weights are damaged")
}

pub(super) fn check(stop: &StopFlag) -> Result<()> {
    if stop.is_set() {
        return Err(Interrupted("nothing was measured to the end".to_owned()).into());
    }
    Ok(())
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
