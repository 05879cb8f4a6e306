//! `exl eval`: perplexity, and the distance to a reference.

mod verify;

use crate::args::EvalArgs;
use crate::cmd::info::bits;
use crate::failure::{Interrupted, Usage};
use crate::memory;
use crate::rows::{self, From};
use crate::session;
use crate::signal::{self, StopFlag};
use crate::ui::{self, Align, Table, Ui};
use anyhow::{Result, bail};
use exl_models::{LogitRows, MemoryUse, ModelSource, Runner, RunnerOptions, SeqSlice};
use exl_quant::KlScore;
use exl_tensor::{Gpu, KvType, PAGE_TOKENS};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// Logits held at a time per model.
const LOGITS_BYTES: usize = 64 << 20;
/// Most token rows of one step.
const CHUNK_ROWS: usize = 512;
/// Rows that go through the cache side by side.
const CACHED_ROWS: usize = 16;

#[derive(Serialize)]
struct Report {
    rows: usize,
    length: usize,
    ppl: f64,
    kl: Option<f64>,
    kl_p99: Option<f64>,
    top1: Option<f64>,
    /// Bytes of the weight files.
    bytes: u64,
    bpw: f64,
    head_bpw: f64,
    seconds: f64,
}

pub(crate) fn run(args: &EvalArgs, ui: &Ui) -> Result<()> {
    match (&args.model, &args.verify) {
        (Some(model), _) => evaluate(args, model, ui),
        (None, Some(dir)) => verify::run(args, dir, ui),
        (None, None) => Err(Usage("name a model: --model or --verify".to_owned()).into()),
    }
}

fn evaluate(args: &EvalArgs, model: &Path, ui: &Ui) -> Result<()> {
    let stop = signal::stop_flag()?;
    let options = session::load_options(args.load, &args.compute, None);
    let source = session::open(model, &options, ui)?;
    let from = From {
        tokens: args.tokens.as_deref(),
        text: args.text.as_deref(),
        rows: args.rows,
        length: args.length,
    };
    let rows = rows::rows(&from, &source, ui)?;
    let reference = match &args.reference {
        Some(dir) => Some(session::open(dir, &options, ui)?),
        None => None,
    };
    let start = Instant::now();
    let gpu = session::gpu(args.compute.device.device, ui)?;
    let score = Evaluation {
        args,
        model,
        gpu: gpu.as_ref(),
        rows: &rows,
        stop: &stop,
        ui,
    }
    .run(&source, reference.as_ref())?;
    let bits = bits(&source);
    let compared = reference.is_some();
    let report = Report {
        rows: rows.len(),
        length: rows.first().map_or(0, Vec::len),
        ppl: score.perplexity(),
        kl: compared.then(|| score.mean_kl()),
        kl_p99: compared.then(|| score.p99_kl()),
        top1: compared.then(|| score.top1()),
        bytes: bits.bytes,
        bpw: bits.bpw,
        head_bpw: bits.head_bpw,
        seconds: start.elapsed().as_secs_f64(),
    };
    if args.json {
        return ui::print_json(&report);
    }
    ui::print(&table(model, &report).render())?;
    Ok(())
}

fn table(model: &Path, r: &Report) -> Table {
    let mut table = Table::new(&[
        ("", Align::Left),
        (&model.display().to_string(), Align::Right),
    ]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("evaluated", format!("{} rows of {}", r.rows, r.length));
    row("perplexity", format!("{:.4}", r.ppl));
    if let (Some(kl), Some(p99), Some(top1)) = (r.kl, r.kl_p99, r.top1) {
        row("KL divergence", format!("{kl:.6}"));
        row("KL, 99th percentile", format!("{p99:.5}"));
        row("same top token", format!("{:.2}%", 100.0 * top1));
    }
    row("weight files", ui::bytes(r.bytes));
    row(
        "bits per weight",
        format!("{:.3}, head {:.3}", r.bpw, r.head_bpw),
    );
    row("time", format!("{:.1} s", r.seconds));
    table
}

/// Where the judged model's logits come from.
enum Judged<'a> {
    /// Computed chunk by chunk.
    Runner(&'a mut Runner),
    /// There already, for the whole row.
    Known(&'a [f32]),
}

impl Judged<'_> {
    fn vocab(&self, row_tokens: usize) -> usize {
        match self {
            Self::Runner(runner) => runner.model().spec().vocab,
            Self::Known(logits) => logits.len() / row_tokens,
        }
    }
}

/// Steps of a model, in which every row gets logits.
#[derive(Clone, Copy)]
struct Steps {
    cache: KvType,
    /// Texts side by side.
    seqs: usize,
    /// Tokens of all of them together.
    rows: usize,
}

struct Evaluation<'a> {
    model: &'a Path,
    gpu: Option<&'a Gpu>,
    args: &'a EvalArgs,
    rows: &'a [Vec<u32>],
    stop: &'a StopFlag,
    ui: &'a Ui,
}

impl Evaluation<'_> {
    fn run(&self, source: &ModelSource, reference: Option<&ModelSource>) -> Result<KlScore> {
        let spec = source.spec();
        if let Some(other) = reference
            .map(|r| r.spec())
            .filter(|r| r.vocab != spec.vocab)
        {
            bail!(
                "--reference: its vocabulary has {} tokens, that of {} has {}: they cannot be compared",
                other.vocab,
                self.model.display(),
                spec.vocab
            );
        }
        // The reference is always exact: whole rows, cache in 32 bits.
        let whole = Steps {
            cache: KvType::F32,
            seqs: 1,
            rows: chunk_rows(spec.vocab).min(self.length()),
        };
        let steps = match self.args.cache {
            Some(cache) => {
                let seqs = self.batch(spec.vocab);
                let rows = seqs;
                Steps { cache, seqs, rows }
            }
            None => whole,
        };
        let mut need = self.memory(source, &steps)?;
        if let Some(reference) = reference {
            need = need.plus(&self.memory(reference, &whole)?);
        }
        let name = self.model.display();
        let what = format!("evaluating {name} in rows of {} tokens", self.length());
        memory::check(&need, &what, "--length", self.gpu)?;
        let mut right = match reference {
            Some(source) => Some(self.runner(source, &whole)?),
            None => None,
        };
        let mut judged = self.runner(source, &steps)?;
        let mut progress = self.ui.steps("evaluating", self.rows.len() as u64);
        let mut score = KlScore::new();
        for (step, rows) in self.rows.chunks(steps.seqs).enumerate() {
            let first = step * steps.seqs;
            if self.args.cache.is_some() {
                self.token_by_token((first, rows), &mut judged, right.as_mut(), &mut score)?;
            } else {
                self.row(
                    (first, &rows[0]),
                    Judged::Runner(&mut judged),
                    right.as_mut(),
                    &mut score,
                )?;
            }
            progress.add(rows.len() as u64);
        }
        Ok(score)
    }

    /// A loaded model that can take these steps.
    fn runner(&self, source: &ModelSource, steps: &Steps) -> Result<Runner> {
        let loaded = session::load(source, self.gpu, self.stop, self.ui)?;
        Ok(Runner::new(loaded.model, self.options(steps))?)
    }

    fn options(&self, steps: &Steps) -> RunnerOptions {
        RunnerOptions {
            pages: steps.seqs * self.length().div_ceil(PAGE_TOKENS),
            max_rows: steps.rows,
            max_seqs: steps.seqs,
            out_rows: steps.rows,
            ..session::runner_options(&self.args.compute, steps.cache, self.gpu)
        }
    }

    /// Tokens of a row.
    fn length(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// What a model takes for these steps.
    fn memory(&self, source: &ModelSource, steps: &Steps) -> Result<MemoryUse> {
        memory::needed(source, &self.options(steps).memory_request(), self.gpu)
    }

    /// Rows whose logits are kept at once when they go side by side.
    fn batch(&self, vocab: usize) -> usize {
        let fit = (LOGITS_BYTES * 4) / (4 * vocab * self.length());
        fit.clamp(1, CACHED_ROWS).min(self.rows.len().max(1))
    }

    /// Several rows side by side, one token of each per step, as decoding does.
    fn token_by_token(
        &self,
        (first, rows): (usize, &[Vec<u32>]),
        judged: &mut Runner,
        mut right: Option<&mut Runner>,
        score: &mut KlScore,
    ) -> Result<()> {
        let vocab = judged.model().spec().vocab;
        let length = rows[0].len();
        let tables: Vec<Vec<u32>> = (0..rows.len()).map(|i| pages(i, length)).collect();
        let mut logits = vec![Vec::with_capacity(length * vocab); rows.len()];
        for start in 0..length {
            self.check()?;
            let slices: Vec<SeqSlice<'_>> = rows
                .iter()
                .zip(&tables)
                .map(|(row, pages)| SeqSlice {
                    tokens: &row[start..=start],
                    start,
                    pages,
                    logits: LogitRows::All,
                    extras: Default::default(),
                })
                .collect();
            let out = judged.step(&slices)?;
            for (all, one) in logits.iter_mut().zip(out.chunks(vocab)) {
                all.extend_from_slice(one);
            }
        }
        for (i, (row, judged)) in rows.iter().zip(&logits).enumerate() {
            let row = (first + i, row.as_slice());
            self.row(row, Judged::Known(judged), right.as_deref_mut(), score)?;
        }
        Ok(())
    }

    /// Scores one row in chunks of positions.
    fn row(
        &self,
        (number, row): (usize, &[u32]),
        mut judged: Judged<'_>,
        mut right: Option<&mut Runner>,
        score: &mut KlScore,
    ) -> Result<()> {
        let vocab = judged.vocab(row.len());
        let chunk = chunk_rows(vocab);
        let pages = pages(0, row.len());
        for start in (0..row.len()).step_by(chunk) {
            self.check()?;
            let end = row.len().min(start + chunk);
            let slice = SeqSlice {
                tokens: &row[start..end],
                start,
                pages: &pages,
                logits: LogitRows::All,
                extras: Default::default(),
            };
            let quantized = match &mut judged {
                Judged::Runner(runner) => runner.step(&[slice])?,
                Judged::Known(logits) => &logits[start * vocab..end * vocab],
            };
            let reference = match &mut right {
                Some(runner) => runner.step(&[slice])?,
                // Perplexity needs no reference; the divergence is not reported then.
                None => quantized,
            };
            check_finite(self.model, (number, start), quantized, vocab)?;
            if let Some(dir) = &self.args.reference {
                check_finite(dir, (number, start), reference, vocab)?;
            }
            score.add(
                reference,
                quantized,
                vocab,
                &row[start + 1..row.len().min(end + 1)],
            );
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.stop.is_set() {
            return Err(Interrupted("the evaluation was not finished".to_owned()).into());
        }
        Ok(())
    }
}

/// Tokens of a row that one step takes, all with logits.
fn chunk_rows(vocab: usize) -> usize {
    (LOGITS_BYTES / (4 * vocab)).clamp(1, CHUNK_ROWS)
}

/// A score of NaN says nothing. `logits` are those of a row from position `start` on.
fn check_finite(
    dir: &Path,
    (row, start): (usize, usize),
    logits: &[f32],
    vocab: usize,
) -> Result<()> {
    let Some(at) = logits.iter().position(|v| !v.is_finite()) else {
        return Ok(());
    };
    bail!(
        "{}: the logit of token {} is {} at position {} of row {row}: the model's weights are damaged",
        dir.display(),
        at % vocab,
        logits[at],
        start + at / vocab
    )
}

/// Pages of the `index`-th row of a step.
fn pages(index: usize, length: usize) -> Vec<u32> {
    let n = length.div_ceil(PAGE_TOKENS);
    (0..n).map(|p| (index * n + p) as u32).collect()
}
