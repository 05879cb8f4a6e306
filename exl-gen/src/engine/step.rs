//! One step: what goes into the backend and what comes out of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use exl_cache::PageTable;

use super::worker::{Worker, message};
use crate::backend::Chooser;
use crate::grammar::MaskThread;
use crate::job::{Job, Outcome};
use crate::request::DoneReason;
use crate::schedule::{Share, share};
use crate::{Backend, BackendError, Draw, LogitRows, SeqSlice, SliceExtras, Tokenizer};

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
            let job = &mut self.running[one.job];
            job.lanes[0].trim_draft(one.rows - 1);
            job.prepare_draw();
        }
        self.prepare_masks(shares);
        self.reserve_windows(shares)?;
        let windows = windows(&self.running, &self.table, shares)?;
        let slices = slices(&self.running, &self.table, shares, &windows)?;
        let draws: Vec<Option<Draw<'_>>> = shares
            .iter()
            .filter(|one| draws(&self.running[one.job], one))
            .flat_map(|one| {
                let job = &self.running[one.job];
                (0..=job.lanes[one.lane].draft().len()).map(|drafted| job.draw(drafted))
            })
            .collect();
        let tokens = self.tokenizer.vocab_size();
        let rows = run(self.backend.as_mut(), &slices, draws, tokens)?;
        let busy = begin.elapsed();
        let hidden: Vec<(usize, usize)> = shares
            .iter()
            .filter(|one| one.lane == 0)
            .map(|one| (one.job, self.running[one.job].hidden_in(one.rows)))
            .collect();
        let mut choice = Choice {
            rows,
            next: 0,
            table: &mut self.table,
            row: &mut self.row,
            tokenizer: &self.tokenizer,
        };
        let mut ends = Vec::new();
        let mut counts = Counts::default();
        for one in shares {
            let job = &mut self.running[one.job];
            match choice.follow(job, one, &mut counts)? {
                Outcome::Done(reason) => ends.push((one.job, reason)),
                Outcome::Next | Outcome::Rewound(_) => {}
            }
        }
        self.tell_hidden(&hidden)?;
        let mut stats = self.shared.stats();
        stats.steps += 1;
        stats.busy += busy;
        stats.prompt_tokens += counts.prompt as u64;
        stats.new_tokens += counts.new as u64;
        stats.drafted_tokens += counts.drafted as u64;
        stats.accepted_tokens += counts.accepted as u64;
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

/// Tokens of a step.
#[derive(Default)]
struct Counts {
    prompt: usize,
    new: usize,
    drafted: usize,
    accepted: usize,
}

/// What becomes of a step, job by job.
struct Choice<'a> {
    rows: Rows<'a>,
    /// The next row of them.
    next: usize,
    table: &'a mut PageTable,
    /// For scratch.
    row: &'a mut Vec<f32>,
    tokenizer: &'a Tokenizer,
}

impl Choice<'_> {
    /// Notes what a share has put into the cache, and draws the job's next tokens if they can be drawn:
    /// one, and one more for each that is the one of its draft.
    fn follow(
        &mut self,
        job: &mut Job,
        one: &Share,
        counts: &mut Counts,
    ) -> Result<Outcome, BackendError> {
        let draft = job.lanes[one.lane].take_draft();
        let rows = one.rows - draft.len();
        self.commit(job, one.lane, rows)?;
        counts.prompt += job.advance(one.lane, rows);
        if !job.is_ready() {
            return Ok(Outcome::Next);
        }
        let first = self.next;
        self.next += job.lanes.len() + draft.len();
        let drawn = job.draw(0).is_some();
        job.count_step();
        let before = job.new_tokens();
        let mut right = 0;
        let outcome = loop {
            let row = first + right;
            job.prepare_draw();
            job.judge(&draft, right);
            let length = job.lanes[0].tokens.len();
            let outcome = match self.rows.token(row).filter(|_| drawn) {
                Some(token) => job.take_drawn(token, self.tokenizer),
                None => {
                    let rows = self.rows.logits(row, job.lanes.len());
                    job.sample(&rows, self.row, self.tokenizer)
                }
            };
            if matches!(outcome, Outcome::Rewound(_)) {
                rewind(self.table, job)?;
                break outcome;
            }
            let fresh = &job.lanes[0].tokens[length..];
            let pairs = fresh.iter().zip(&draft[right..]);
            let agreed = pairs.take_while(|(a, b)| a == b).count();
            right += agreed;
            if outcome != Outcome::Next {
                break outcome;
            }
            // What the draft guessed is in the cache already; the next row follows it.
            let all = agreed == fresh.len() && agreed > 0;
            if agreed > 0 {
                self.commit(job, 0, agreed)?;
                job.advance(0, agreed);
            }
            if !all {
                break outcome;
            }
        };
        job.note_draft(draft.len(), right);
        counts.new += job.new_tokens().saturating_sub(before);
        counts.drafted += draft.len();
        counts.accepted += right;
        Ok(outcome)
    }

    fn commit(&mut self, job: &Job, lane: usize, rows: usize) -> Result<(), BackendError> {
        let lane = &job.lanes[lane];
        let seq = lane.seq.ok_or_else(|| without_pages(job))?;
        self.table
            .commit(seq, &lane.tokens[lane.cached..lane.cached + rows])
            .map_err(BackendError::of)
    }
}

/// Takes back in the cache what a job took back. What it would see of that may be gone from window
/// pages: then it is computed again.
fn rewind(table: &mut PageTable, job: &mut Job) -> Result<(), BackendError> {
    for at in 0..job.lanes.len() {
        let lane = &job.lanes[at];
        let seq = lane.seq.ok_or_else(|| without_pages(job))?;
        let left = table
            .truncate(seq, lane.cached)
            .and_then(|()| table.filled(seq));
        job.lanes[at].cached = left.map_err(BackendError::of)?;
    }
    Ok(())
}

/// What a step gives for each row that is followed by a draw: logits, to be sampled here, a token
/// drawn by the backend, or both. Their numbers were checked.
pub(super) struct Rows<'a> {
    tokens: &'a [i32],
    logits: &'a [f32],
    vocab: usize,
}

impl<'a> Rows<'a> {
    /// The token that the backend drew for a row, if it did.
    pub(super) fn token(&self, row: usize) -> Option<i32> {
        self.tokens.get(row).copied()
    }

    /// The logits of `count` rows.
    pub(super) fn logits(&self, row: usize, count: usize) -> Vec<&'a [f32]> {
        let logits = &self.logits[row * self.vocab..(row + count) * self.vocab];
        logits.chunks_exact(self.vocab).collect()
    }
}

/// One step of the backend, which draws the tokens it can: `draws` has an entry for each row with
/// logits, none where it cannot.
pub(super) fn run<'a>(
    backend: &'a mut dyn Backend,
    slices: &[SeqSlice<'_>],
    draws: Vec<Option<Draw<'_>>>,
    tokens: usize,
) -> Result<Rows<'a>, BackendError> {
    let (wanted, vocab) = (draws.len(), backend.vocab_size());
    let complete = |found: usize, one: usize, what: &str| match found == wanted * one {
        true => Ok(()),
        false if one == 1 => Err(BackendError(format!("{found} {what} for {wanted} rows"))),
        false => Err(BackendError(format!(
            "{found} {what} for {wanted} rows of {one}"
        ))),
    };
    let mut rows = Rows {
        tokens: &[],
        logits: &[],
        vocab: vocab.max(1),
    };
    match Chooser::of(backend.draws(), draws.iter().map(Option::is_some)) {
        Chooser::Host => {
            rows.logits = backend.step(slices)?;
            complete(rows.logits.len(), vocab, "logits")?;
        }
        Chooser::Device => {
            let draws: Vec<Draw<'_>> = draws.into_iter().flatten().collect();
            rows.tokens = backend.step_drawn(slices, &draws, tokens)?;
            complete(rows.tokens.len(), 1, "tokens")?;
        }
        Chooser::Both => {
            let mixed = backend.step_mixed(slices, &draws, tokens)?;
            (rows.tokens, rows.logits) = (mixed.tokens, mixed.logits);
            complete(rows.tokens.len(), 1, "tokens")?;
            complete(rows.logits.len(), vocab, "logits")?;
        }
    }
    Ok(rows)
}

/// Whether a share has all of a text that the next token of its job is drawn after. The lanes of a job
/// come to that in one step.
fn draws(job: &Job, one: &Share) -> bool {
    one.rows >= job.lanes[one.lane].pending()
}

/// Window pages of each share, in the places of its pages.
fn windows(
    running: &[Job],
    table: &PageTable,
    shares: &[Share],
) -> Result<Vec<Vec<u32>>, BackendError> {
    let window = |one: &Share| {
        let job = &running[one.job];
        let seq = job.lanes[one.lane].seq;
        let pages = seq.and_then(|seq| table.window_table(seq).ok());
        pages.ok_or_else(|| without_pages(job))
    };
    shares.iter().map(window).collect()
}

fn slices<'a>(
    running: &'a [Job],
    table: &'a PageTable,
    shares: &[Share],
    windows: &'a [Vec<u32>],
) -> Result<Vec<SeqSlice<'a>>, BackendError> {
    let slice = |(one, window_pages): (&Share, &'a Vec<u32>)| {
        let job = &running[one.job];
        let lane = &job.lanes[one.lane];
        let pages = lane.seq.map(|seq| table.block_table(seq));
        let pages = pages
            .and_then(Result::ok)
            .ok_or_else(|| without_pages(job))?;
        Ok(SeqSlice {
            tokens: lane.rows(one.rows),
            start: lane.cached,
            pages,
            logits: match draws(job, one) {
                true if !lane.draft().is_empty() => LogitRows::All,
                true => LogitRows::Last,
                false => LogitRows::None,
            },
            extras: SliceExtras {
                window_pages,
                ..job.slice_extras(one.lane)
            },
        })
    };
    shares.iter().zip(windows).map(slice).collect()
}

pub(super) fn without_pages(job: &Job) -> BackendError {
    BackendError(format!("job {} runs without pages", job.id))
}

fn fail(shares: &[Share], why: &str) -> Vec<(usize, DoneReason)> {
    let failed = |one: &Share| (one.job, DoneReason::Error(why.to_owned()));
    shares.iter().map(failed).collect()
}
