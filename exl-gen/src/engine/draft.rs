//! Guesses for the next step: who makes them, and the draft model's cache.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use exl_cache::{Error as CacheError, PageTable, Prefix, SeqId};

use super::pages::{claim, copy_pages, table};
use super::step::run;
use super::worker::{Worker, message};
use crate::job::{Job, Trail};
use crate::request::{DoneReason, JobId};
use crate::schedule::Demand;
use crate::speculation::Cost;
use crate::{
    Backend, BackendError, DraftModel, Draw, LogitRows, Result, SeqSlice, SliceExtras, Tokenizer,
};

impl Worker {
    /// Guesses tokens for the jobs that are about to draw one.
    pub(super) fn draft(&mut self) {
        if !self.running.iter().any(Job::speculates) {
            return;
        }
        let begin = Instant::now();
        let decodes = |job: &&Job| matches!(job.demand(), Demand::Decode { .. });
        let mut cost = Cost {
            jobs: self.running.iter().filter(decodes).count(),
            row: f64::from(self.backend.row_cost()),
            guess: 0.0,
        };
        for job in &mut self.running {
            job.look_up(&cost, &self.tokenizer);
        }
        let mut steps = 0;
        if let Some(drafter) = &mut self.drafter {
            cost.guess = drafter.cost;
            let before = drafter.steps;
            let (jobs, tokenizer) = (&mut self.running, &self.tokenizer);
            let guess = || drafter.guess(jobs, &cost, tokenizer);
            let why = match catch_unwind(AssertUnwindSafe(guess)) {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("the draft model failed: {error}")),
                Err(panic) => Some(format!("the draft model panicked: {}", message(&*panic))),
            };
            steps = drafter.steps - before;
            if let Some(why) = why {
                self.fail_guessing(&why);
            }
        }
        let mut stats = self.shared.stats();
        stats.draft_steps += steps;
        stats.drafting += begin.elapsed();
    }

    /// Ends the jobs that the draft model guesses for.
    fn fail_guessing(&mut self, why: &str) {
        let guessing = |job: &Job| job.wants_model();
        while let Some(at) = self.running.iter().position(guessing) {
            let job = self.running.remove(at);
            self.end(job, DoneReason::Error(why.to_owned()));
        }
    }

    /// Gives the pages back that a job has in the draft model's cache.
    pub(super) fn forget_draft(&mut self, job: JobId) {
        if let Some(drafter) = &mut self.drafter {
            drafter.forget(job);
        }
    }
}

/// A draft model with its cache.
pub(super) struct Drafter {
    backend: Box<dyn Backend>,
    table: PageTable,
    /// What jobs have in the cache.
    held: HashMap<JobId, Held>,
    /// Time of a step as a share of that of the engine's model.
    cost: f64,
    /// Most tokens of texts that are new to it in one turn.
    chunk: usize,
    steps: u64,
    /// One row of logits, for scratch.
    row: Vec<f32>,
}

/// A job's text in the draft model's cache.
struct Held {
    seq: SeqId,
    /// Guesses that were computed behind the text.
    guesses: Vec<u32>,
}

/// A job in a turn of guessing.
struct Turn {
    job: usize,
    seq: SeqId,
    trail: Trail,
    /// Tokens in the cache.
    done: usize,
    /// Tokens of the next step. Where they end before the text does, nothing is guessed in this turn.
    rows: usize,
}

impl Turn {
    /// Whether the next step ends with the token that the next guess follows.
    fn draws(&self) -> bool {
        self.done + self.rows == self.trail.text.len()
    }

    /// The next step, with the window pages of the sequence.
    fn slice<'a>(
        &'a self,
        table: &'a PageTable,
        window_pages: &'a [u32],
    ) -> Result<SeqSlice<'a>, BackendError> {
        Ok(SeqSlice {
            tokens: &self.trail.text[self.done..self.done + self.rows],
            start: self.done,
            pages: table.block_table(self.seq).map_err(BackendError::of)?,
            logits: match self.draws() {
                true => LogitRows::Last,
                false => LogitRows::None,
            },
            extras: SliceExtras {
                window_pages,
                ..SliceExtras::default()
            },
        })
    }

    /// Where the tokens end that are computed in this turn.
    fn end(&self) -> usize {
        match self.draws() {
            true => self.trail.end(),
            false => self.done + self.rows,
        }
    }
}

impl Drafter {
    /// # Errors
    /// [`crate::Error::Cache`] for a cache without pages.
    pub(super) fn new(model: DraftModel, chunk: usize, reuse: bool) -> Result<Self> {
        Ok(Self {
            table: {
                let backend = model.backend.as_ref();
                table(backend, backend.max_seqs(), reuse)?
            },
            held: HashMap::new(),
            cost: f64::from(model.cost),
            chunk: chunk.min(model.backend.max_rows()),
            backend: model.backend,
            steps: 0,
            row: Vec::new(),
        })
    }

    /// Pages that jobs own.
    pub(super) fn used_pages(&self) -> usize {
        self.table.used_pages()
    }

    fn forget(&mut self, job: JobId) {
        if let Some(held) = self.held.remove(&job)
            && let Err(error) = self.table.release(held.seq)
        {
            tracing::error!(%error, "a sequence of the draft model was released twice");
        }
    }

    /// Guesses for all jobs for which it pays.
    fn guess(
        &mut self,
        jobs: &mut [Job],
        cost: &Cost,
        tokenizer: &Tokenizer,
    ) -> Result<(), BackendError> {
        let mut turns = Vec::new();
        let mut left = self.chunk;
        let mut writing = HashSet::new();
        for (at, job) in jobs.iter_mut().enumerate() {
            if turns.len() == self.backend.max_seqs() || left == 0 {
                break;
            }
            let Some(mut trail) = job.begin_trail(cost) else {
                continue;
            };
            match self.place(job, &trail) {
                Ok((seq, done)) => {
                    let pages = self.table.block_table(seq).ok();
                    let rows = claim(pages, done, left.min(trail.before - done), &mut writing);
                    let mut turn = Turn {
                        job: at,
                        seq,
                        trail,
                        done,
                        rows,
                    };
                    match self.table.reserve_window(seq, turn.end()) {
                        Ok(()) => {
                            left -= rows;
                            turns.push(turn);
                        }
                        Err(CacheError::OutOfPages { .. }) => {
                            job.end_trail(&mut turn.trail);
                            self.forget(job.id);
                        }
                        Err(error) => return Err(BackendError::of(error)),
                    }
                }
                // Other texts have all pages; this job draws without guesses.
                Err(Trouble::OutOfPages) => {
                    job.end_trail(&mut trail);
                    self.forget(job.id);
                }
                Err(Trouble::Failed(error)) => return Err(error),
            }
        }
        self.run(&mut turns, jobs, tokenizer)?;
        for mut turn in turns {
            self.table.move_window(turn.seq).map_err(BackendError::of)?;
            let (job, trail) = (&mut jobs[turn.job], &mut turn.trail);
            job.end_trail(trail);
            if let Some(held) = self.held.get_mut(&job.id) {
                let computed = trail.before..turn.done.max(trail.before);
                held.guesses = trail.text[computed].to_vec();
            }
        }
        Ok(())
    }

    /// The sequence of a job, with pages of its own for the rest of its text and the guesses, and how
    /// many tokens of the text it has: all but one at most.
    fn place(&mut self, job: &mut Job, trail: &Trail) -> Result<(SeqId, usize), Trouble> {
        let text = &trail.text[..trail.before];
        let last = text.len() - 1;
        let stable = job.stable_for_model();
        let table = &mut self.table;
        let seq = match self.held.get_mut(&job.id) {
            Some(held) => {
                let (seq, guesses) = (held.seq, std::mem::take(&mut held.guesses));
                let filled = table.filled(seq)?;
                if stable < filled || last < filled {
                    table.truncate(seq, stable.min(last))?;
                } else {
                    let pairs = text[filled..last].iter().zip(&guesses);
                    let right = pairs.take_while(|(a, b)| a == b).count();
                    table.commit(seq, &text[filled..filled + right])?;
                    table.catch_up(seq)?;
                }
                seq
            }
            None => {
                let seq = table.admit(&Prefix::new(None, text))?;
                let guesses = Vec::new();
                self.held.insert(job.id, Held { seq, guesses });
                seq
            }
        };
        let done = table.filled(seq)?;
        table.extend(seq, trail.end())?;
        for copy in table.prepare_write(seq, done, trail.end())? {
            copy_pages(self.backend.as_mut(), copy).map_err(Trouble::Failed)?;
        }
        Ok((seq, done))
    }

    /// Steps of the model until every turn has its guesses.
    fn run(
        &mut self,
        turns: &mut [Turn],
        jobs: &mut [Job],
        tokenizer: &Tokenizer,
    ) -> Result<(), BackendError> {
        let mut active: Vec<&mut Turn> = turns.iter_mut().filter(|turn| turn.rows > 0).collect();
        while !active.is_empty() {
            self.step(&mut active, jobs, tokenizer)?;
            let mut room = self.backend.max_rows();
            active.retain_mut(|turn| {
                turn.rows = turn.trail.text.len() - turn.done;
                let guesses = !turn.trail.draft().is_empty() && turn.trail.goes_on();
                let goes_on = guesses && turn.rows <= room;
                room -= if goes_on { turn.rows } else { 0 };
                goes_on
            });
        }
        Ok(())
    }

    /// One step, and a guess for every turn that has all of its text in the cache then.
    fn step(
        &mut self,
        turns: &mut [&mut Turn],
        jobs: &mut [Job],
        tokenizer: &Tokenizer,
    ) -> Result<(), BackendError> {
        let table = &mut self.table;
        let windows = turns.iter().map(|turn| table.window_table(turn.seq));
        let windows = windows.collect::<exl_cache::Result<Vec<_>>>();
        let windows = windows.map_err(BackendError::of)?;
        let slices = turns.iter().zip(&windows);
        let slices = slices.map(|(turn, window)| turn.slice(table, window));
        let slices: Vec<SeqSlice<'_>> = slices.collect::<Result<_, BackendError>>()?;
        let drawing = turns.iter().filter(|turn| turn.draws());
        let draws = drawing.map(|turn| jobs[turn.job].guess_draw(&turn.trail));
        let draws: Vec<Option<Draw<'_>>> = draws.collect();
        let rows = run(
            self.backend.as_mut(),
            &slices,
            draws,
            tokenizer.vocab_size(),
        )?;
        self.steps += 1;
        let mut row = 0;
        for turn in turns {
            let draws = turn.draws();
            let text = turn.done.min(turn.trail.before)..turn.trail.before;
            let text = &turn.trail.text[text];
            let text = &text[..text.len().min(turn.rows)];
            table.commit(turn.seq, text).map_err(BackendError::of)?;
            turn.done += turn.rows;
            if !draws {
                continue;
            }
            let (job, trail) = (&mut jobs[turn.job], &mut turn.trail);
            let drawn = job.guess_draw(trail).is_some();
            match rows.token(row).filter(|_| drawn) {
                Some(token) => job.take_guess(token, trail),
                None => {
                    for logits in rows.logits(row, 1) {
                        job.guess(logits, &mut self.row, trail, tokenizer);
                    }
                }
            }
            row += 1;
        }
        Ok(())
    }
}

/// Why a job has no guesses.
enum Trouble {
    OutOfPages,
    Failed(BackendError),
}

impl From<CacheError> for Trouble {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::OutOfPages { .. } | CacheError::NeverFits { .. } => Self::OutOfPages,
            error => Self::Failed(BackendError::of(error)),
        }
    }
}
