//! One step: what goes into the backend and what comes out of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice::{ChunksExact, Iter};
use std::time::Instant;

use exl_cache::PageTable;

use super::worker::{Worker, message};
use crate::backend::Chooser;
use crate::grammar::MaskThread;
use crate::job::{Job, Outcome};
use crate::request::DoneReason;
use crate::schedule::{Share, share};
use crate::{Backend, BackendError, Draw, LogitRows, SeqSlice};

impl Worker {
    /// One step of the backend for all running jobs, and a draw for each that is ready.
    pub(super) fn step(&mut self) {
        let shares = share(&self.demands(), self.limits);
        if shares.is_empty() {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.forward(&shares)));
        let mut ends = match outcome {
            Ok(Ok(ends)) => ends,
            Ok(Err(error)) => fail(&shares, &format!("the step failed: {error}")),
            Err(panic) => fail(&shares, &format!("the step panicked: {}", message(&*panic))),
        };
        // From the back, so that the places of the others stay right; a job has up to two shares.
        ends.sort_by_key(|end| std::cmp::Reverse(end.0));
        ends.dedup_by_key(|end| end.0);
        for (at, reason) in ends {
            let job = self.running.remove(at);
            self.end(job, reason);
        }
    }

    /// Runs the shares; gives the jobs that ended with the reason.
    fn forward(&mut self, shares: &[Share]) -> Result<Vec<(usize, DoneReason)>, BackendError> {
        let begin = Instant::now();
        for one in shares.iter().filter(|one| one.lane == 0) {
            self.running[one.job].prepare_draw();
        }
        self.prepare_masks(shares);
        let tokens = self.tokenizer.vocab_size();
        let mut rows = step(
            self.backend.as_mut(),
            (&self.running, shares),
            &self.table,
            tokens,
        )?;
        let busy = begin.elapsed();
        let hidden: Vec<(usize, usize)> = shares
            .iter()
            .filter(|one| one.lane == 0)
            .map(|one| (one.job, self.running[one.job].hidden_in(one.rows)))
            .collect();
        let mut ends = Vec::new();
        let (mut prompt, mut new) = (0, 0);
        for one in shares {
            let job = &mut self.running[one.job];
            let lane = &job.lanes[one.lane];
            let written = &lane.tokens[lane.cached..lane.cached + one.rows];
            let seq = lane.seq.ok_or_else(|| without_pages(job))?;
            self.table
                .commit(seq, written)
                .map_err(|error| BackendError(error.to_string()))?;
            prompt += job.advance(one.lane, one.rows);
            if !job.is_ready() {
                continue;
            }
            let before = job.new_tokens();
            let outcome = match rows.next(job) {
                Row::Logits(rows) => job.sample(&rows, &mut self.row, &self.tokenizer),
                Row::Token(token) => job.take_drawn(token, &self.tokenizer),
            };
            new += job.new_tokens().saturating_sub(before);
            match outcome {
                Outcome::Next => {}
                Outcome::Done(reason) => ends.push((one.job, reason)),
                Outcome::Rewound(_) => rewind(&mut self.table, job)?,
            }
        }
        self.tell_hidden(&hidden)?;
        let mut stats = self.shared.stats();
        stats.steps += 1;
        stats.busy += busy;
        stats.prompt_tokens += prompt as u64;
        stats.new_tokens += new as u64;
        Ok(ends)
    }

    /// Passes on the hidden states of a step: by job, how many it wants.
    fn tell_hidden(&mut self, wanted: &[(usize, usize)]) -> Result<(), BackendError> {
        let count: usize = wanted.iter().map(|(_, count)| count).sum();
        if count == 0 {
            return Ok(());
        }
        let width = self.backend.hidden_size();
        let mut values = self.backend.hidden()?;
        if values.len() != count * width {
            let found = values.len();
            let what = format!("{found} values for {count} hidden states of {width}");
            return Err(BackendError(what));
        }
        for &(job, count) in wanted {
            let (own, rest) = values.split_at(count * width);
            self.running[job].tell_hidden(count, own);
            values = rest;
        }
        Ok(())
    }

    /// Begins the masks of the jobs that will choose a token after this step.
    fn prepare_masks(&mut self, shares: &[Share]) {
        for one in shares.iter().filter(|one| one.lane == 0) {
            let job = &mut self.running[one.job];
            if !job.is_guided() || !draws(job, one) {
                continue;
            }
            if self.masks.is_none() {
                // Without the thread the sampler computes masks itself.
                self.masks = MaskThread::start().ok();
            }
            if let Some(thread) = &self.masks {
                job.prepare_mask(thread);
            }
        }
    }
}

/// Takes back in the cache what a job took back.
fn rewind(table: &mut PageTable, job: &Job) -> Result<(), BackendError> {
    for lane in &job.lanes {
        let seq = lane.seq.ok_or_else(|| without_pages(job))?;
        table
            .truncate(seq, lane.cached)
            .map_err(|error| BackendError(error.to_string()))?;
    }
    Ok(())
}

/// What a step gives for each row that is followed by a draw.
enum Rows<'a> {
    /// Logits, to be sampled here.
    Logits(ChunksExact<'a, f32>),
    /// A token drawn by the backend.
    Tokens(Iter<'a, i32>),
    /// Both, of which each job takes what it can.
    Both(Iter<'a, i32>, ChunksExact<'a, f32>),
}

/// What one job chooses from.
enum Row<'a> {
    /// A row for each of its lanes.
    Logits(Vec<&'a [f32]>),
    Token(i32),
}

impl<'a> Rows<'a> {
    /// The numbers of rows were checked.
    fn next(&mut self, job: &Job) -> Row<'a> {
        let lanes = job.lanes.len();
        match self {
            Self::Logits(rows) => Row::Logits(rows.by_ref().take(lanes).collect()),
            Self::Tokens(tokens) => Row::Token(tokens.next().copied().unwrap_or(-1)),
            Self::Both(tokens, rows) => {
                let drawn = tokens.by_ref().take(lanes).last();
                let rows: Vec<&[f32]> = rows.by_ref().take(lanes).collect();
                match (job.draw(), drawn) {
                    (Some(_), Some(&token)) => Row::Token(token),
                    _ => Row::Logits(rows),
                }
            }
        }
    }
}

/// One step of the backend, which draws the tokens it can.
fn step<'a>(
    backend: &'a mut dyn Backend,
    (running, shares): (&[Job], &[Share]),
    table: &PageTable,
    tokens: usize,
) -> Result<Rows<'a>, BackendError> {
    let slices = slices(running, table, shares)?;
    let ready = shares.iter().filter(|one| draws(&running[one.job], one));
    let draws: Vec<Option<Draw<'_>>> = ready.map(|one| running[one.job].draw()).collect();
    let (wanted, vocab) = (draws.len(), backend.vocab_size());
    let complete = |found: usize, one: usize, what: &str| match found == wanted * one {
        true => Ok(()),
        false if one == 1 => Err(BackendError(format!("{found} {what} for {wanted} rows"))),
        false => Err(BackendError(format!(
            "{found} {what} for {wanted} rows of {one}"
        ))),
    };
    match Chooser::of(backend.draws(), draws.iter().map(Option::is_some)) {
        Chooser::Host => {
            let logits = backend.step(&slices)?;
            complete(logits.len(), vocab, "logits")?;
            Ok(Rows::Logits(logits.chunks_exact(vocab.max(1))))
        }
        Chooser::Device => {
            let draws: Vec<Draw<'_>> = draws.into_iter().flatten().collect();
            let drawn = backend.step_drawn(&slices, &draws, tokens)?;
            complete(drawn.len(), 1, "tokens")?;
            Ok(Rows::Tokens(drawn.iter()))
        }
        Chooser::Both => {
            let mixed = backend.step_mixed(&slices, &draws, tokens)?;
            complete(mixed.tokens.len(), 1, "tokens")?;
            complete(mixed.logits.len(), vocab, "logits")?;
            let rows = mixed.logits.chunks_exact(vocab.max(1));
            Ok(Rows::Both(mixed.tokens.iter(), rows))
        }
    }
}

/// Whether a share ends with a token that the next one of its job is drawn after. The lanes of a job
/// come to that in one step.
fn draws(job: &Job, one: &Share) -> bool {
    one.rows == job.lanes[one.lane].pending()
}

fn slices<'a>(
    running: &'a [Job],
    table: &'a PageTable,
    shares: &[Share],
) -> Result<Vec<SeqSlice<'a>>, BackendError> {
    let slice = |one: &Share| {
        let job = &running[one.job];
        let lane = &job.lanes[one.lane];
        let pages = lane.seq.map(|seq| table.block_table(seq));
        let pages = pages
            .and_then(Result::ok)
            .ok_or_else(|| without_pages(job))?;
        Ok(SeqSlice {
            tokens: &lane.tokens[lane.cached..lane.cached + one.rows],
            start: lane.cached,
            pages,
            logits: match draws(job, one) {
                true => LogitRows::Last,
                false => LogitRows::None,
            },
            extras: job.slice_extras(one.lane),
        })
    };
    shares.iter().map(slice).collect()
}

fn without_pages(job: &Job) -> BackendError {
    BackendError(format!("job {} runs without pages", job.id))
}

fn fail(shares: &[Share], why: &str) -> Vec<(usize, DoneReason)> {
    let failed = |one: &Share| (one.job, DoneReason::Error(why.to_owned()));
    shares.iter().map(failed).collect()
}
