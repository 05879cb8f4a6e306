//! The engine's thread: an explicit loop over commands and steps.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice::{ChunksExact, Iter};
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use exl_cache::PageTable;

use super::{EngineOptions, Shared};
use crate::backend::Chooser;
use crate::grammar::MaskThread;
use crate::job::Job;
use crate::request::{DoneReason, JobId};
use crate::schedule::{Limits, next_start, share};
use crate::{Backend, BackendError, Draw, LogitRows, SeqSlice, Tokenizer};

/// All the engine can be told.
pub(super) enum Command {
    /// A new job.
    Submit(Box<Job>),
    /// End this job.
    Abort(JobId),
    /// Look at the jobs' cancel flags.
    Wake,
    /// End when all jobs are done.
    Drain,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Submit(job) => write!(f, "Submit({})", job.id),
            Self::Abort(id) => write!(f, "Abort({id})"),
            Self::Wake => f.write_str("Wake"),
            Self::Drain => f.write_str("Drain"),
        }
    }
}

pub(super) struct Worker {
    backend: Box<dyn Backend>,
    tokenizer: Arc<Tokenizer>,
    table: PageTable,
    limits: Limits,
    max_running: usize,
    waiting: VecDeque<Job>,
    running: Vec<Job>,
    shared: Arc<Shared>,
    draining: bool,
    /// One row of logits; sampling changes it.
    row: Vec<f32>,
    /// Started with the first job that has a grammar.
    masks: Option<MaskThread>,
}

impl Worker {
    pub(super) fn new(
        backend: Box<dyn Backend>,
        tokenizer: Arc<Tokenizer>,
        table: PageTable,
        options: &EngineOptions,
        shared: Arc<Shared>,
    ) -> Self {
        let rows = backend.max_rows();
        Self {
            limits: Limits {
                rows,
                chunk: options.chunk_rows,
            },
            // Half of the rows stay free for prompts, so decoding jobs cannot shut them out.
            max_running: backend.max_seqs().min(rows.div_ceil(2)),
            backend,
            tokenizer,
            table,
            waiting: VecDeque::new(),
            running: Vec::new(),
            shared,
            draining: false,
            row: Vec::new(),
            masks: None,
        }
    }

    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        // Waiters on the end are told even when this thread panics.
        let _ended = Ended(Arc::clone(&self.shared));
        while self.take_commands(commands) {
            self.reap();
            self.admit();
            self.step();
            self.publish();
        }
        self.publish();
    }

    /// Takes what was said; sleeps while there is nothing to do. False at the end.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let command = match commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) if !idle => return true,
                Err(TryRecvError::Empty) if !self.draining => match commands.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                },
                Err(_) if idle => return false,
                Err(_) => return true,
            };
            match command {
                Command::Submit(job) => self.waiting.push_back(*job),
                Command::Abort(id) => self.abort(id),
                Command::Wake => {}
                Command::Drain => {
                    self.draining = true;
                    self.shared.closed.store(true, Ordering::Release);
                }
            }
        }
    }

    fn abort(&mut self, id: JobId) {
        if let Some(at) = self.waiting.iter().position(|job| job.id == id)
            && let Some(job) = self.waiting.remove(at)
        {
            self.leave_queue();
            self.end(job, DoneReason::Aborted);
        } else if let Some(at) = self.running.iter().position(|job| job.id == id) {
            let job = self.running.remove(at);
            self.end(job, DoneReason::Aborted);
        }
    }

    /// Ends jobs whose callers are gone or want no more.
    fn reap(&mut self) {
        let cancelled: Vec<JobId> = self
            .waiting
            .iter()
            .chain(&self.running)
            .filter(|job| job.is_cancelled())
            .map(|job| job.id)
            .collect();
        for id in cancelled {
            self.abort(id);
        }
    }

    /// Starts waiting jobs while pages and the batch have room.
    fn admit(&mut self) {
        while self.running.len() < self.max_running {
            let reserve: Vec<usize> = self.waiting.iter().map(Job::reserve).collect();
            let mut skips: Vec<&mut usize> =
                self.waiting.iter_mut().map(|job| &mut job.skips).collect();
            let table = &self.table;
            // What can never fit is taken out as well, to fail below.
            let fits = |at: usize| table.fits_now(reserve[at]).unwrap_or(true);
            let Some(at) = next_start(&mut skips, fits) else {
                return;
            };
            let Some(mut job) = self.waiting.remove(at) else {
                return;
            };
            self.leave_queue();
            match self.table.admit(job.reserve()) {
                Ok(seq) => {
                    job.start(seq);
                    self.running.push(job);
                }
                Err(error) => self.end(job, DoneReason::Error(error.to_string())),
            }
        }
    }

    fn leave_queue(&self) {
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    /// One step of the backend for all running jobs, and a draw for each that is ready.
    fn step(&mut self) {
        let pending: Vec<usize> = self.running.iter().map(Job::pending).collect();
        let shares = share(&pending, self.limits);
        if shares.is_empty() {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.forward(&shares)));
        let ends = match outcome {
            Ok(Ok(ends)) => ends,
            Ok(Err(error)) => fail(&shares, &format!("the step failed: {error}")),
            Err(panic) => fail(&shares, &format!("the step panicked: {}", message(&*panic))),
        };
        // From the back, so that the places of the others stay right.
        let mut ends = ends;
        ends.sort_by_key(|end| std::cmp::Reverse(end.0));
        for (at, reason) in ends {
            let job = self.running.remove(at);
            self.end(job, reason);
        }
    }

    /// Runs the shares; gives the jobs that ended with the reason.
    fn forward(
        &mut self,
        shares: &[(usize, usize)],
    ) -> Result<Vec<(usize, DoneReason)>, BackendError> {
        self.prepare_masks(shares);
        let begin = Instant::now();
        let tokens = self.tokenizer.vocab_size();
        let mut rows = step(
            self.backend.as_mut(),
            (&self.running, shares),
            &self.table,
            tokens,
        )?;
        let busy = begin.elapsed();
        let mut ends = Vec::new();
        let (mut prompt, mut new) = (0, 0);
        for &(at, count) in shares {
            let job = &mut self.running[at];
            prompt += job.prompt.saturating_sub(job.cached).min(count);
            job.advance(count);
            if job.pending() > 0 {
                continue;
            }
            let before = job.new_tokens();
            let end = match rows.next(job) {
                Some(Row::Logits(row)) => {
                    self.row.clear();
                    self.row.extend_from_slice(row);
                    job.sample(&mut self.row, &self.tokenizer)
                }
                Some(Row::Token(token)) => job.take_drawn(token, &self.tokenizer),
                None => None,
            };
            ends.extend(end.map(|reason| (at, reason)));
            new += job.new_tokens() - before;
        }
        let mut stats = self.shared.stats();
        stats.steps += 1;
        stats.busy += busy;
        stats.prompt_tokens += prompt as u64;
        stats.new_tokens += new as u64;
        Ok(ends)
    }

    /// Begins the masks of the jobs that will choose a token after this step.
    fn prepare_masks(&mut self, shares: &[(usize, usize)]) {
        for &(at, count) in shares {
            let job = &mut self.running[at];
            if !job.is_guided() || count < job.pending() {
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

    /// Gives back the job's pages and tells its caller. In this order, so that a caller who reads
    /// the statistics after the last event finds them settled.
    fn end(&mut self, mut job: Job, reason: DoneReason) {
        if let Some(seq) = job.seq.take()
            && let Err(error) = self.table.release(seq)
        {
            tracing::error!(job = %job.id, %error, "a sequence was released twice");
        }
        {
            let mut stats = self.shared.stats();
            stats.masks.add(job.mask_times());
            match reason {
                DoneReason::Aborted => stats.aborted += 1,
                DoneReason::Error(_) => stats.failed += 1,
                _ => stats.finished += 1,
            }
        }
        self.publish();
        job.finish(reason);
    }

    fn publish(&self) {
        let mut stats = self.shared.stats();
        stats.load.running = self.running.len();
        stats.load.free_pages = self.table.free_pages();
    }
}

/// What a step gives for each job that is ready for its next token.
enum Rows<'a> {
    /// A row of logits, to be sampled here.
    Logits(ChunksExact<'a, f32>),
    /// A token drawn by the backend.
    Tokens(Iter<'a, i32>),
    /// Both, of which each job takes what it can.
    Both(Iter<'a, i32>, ChunksExact<'a, f32>),
}

/// What one job chooses from.
enum Row<'a> {
    Logits(&'a [f32]),
    Token(i32),
}

impl<'a> Rows<'a> {
    fn next(&mut self, job: &Job) -> Option<Row<'a>> {
        match self {
            Self::Logits(rows) => rows.next().map(Row::Logits),
            Self::Tokens(tokens) => tokens.next().copied().map(Row::Token),
            Self::Both(tokens, rows) => {
                let (token, row) = (*tokens.next()?, rows.next()?);
                Some(match job.draw() {
                    Some(_) => Row::Token(token),
                    None => Row::Logits(row),
                })
            }
        }
    }
}

/// One step of the backend, which draws the tokens it can.
fn step<'a>(
    backend: &'a mut dyn Backend,
    (running, shares): (&[Job], &[(usize, usize)]),
    table: &PageTable,
    tokens: usize,
) -> Result<Rows<'a>, BackendError> {
    let slices = slices(running, table, shares)?;
    let ready = |&(at, count): &(usize, usize)| {
        let job: &Job = &running[at];
        (count == job.pending()).then(|| job.draw())
    };
    let draws: Vec<Option<Draw<'_>>> = shares.iter().filter_map(ready).collect();
    let (wanted, vocab) = (draws.len(), backend.vocab_size());
    let complete = |found: usize, one: usize, what: &str| {
        (found == wanted * one)
            .then_some(())
            .ok_or_else(|| BackendError(format!("{found} {what} for {wanted} rows{}", of(one))))
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

fn of(one: usize) -> String {
    match one {
        1 => String::new(),
        one => format!(" of {one}"),
    }
}

fn slices<'a>(
    running: &'a [Job],
    table: &'a PageTable,
    shares: &[(usize, usize)],
) -> Result<Vec<SeqSlice<'a>>, BackendError> {
    let slice = |&(at, count): &(usize, usize)| {
        let job = &running[at];
        let pages = job.seq.map(|seq| table.block_table(seq));
        let pages = pages
            .and_then(Result::ok)
            .ok_or_else(|| BackendError(format!("job {} runs without pages", job.id)))?;
        let last = count == job.pending();
        Ok(SeqSlice {
            tokens: &job.tokens[job.cached..job.cached + count],
            start: job.cached,
            pages,
            logits: if last {
                LogitRows::Last
            } else {
                LogitRows::None
            },
        })
    };
    shares.iter().map(slice).collect()
}

fn fail(shares: &[(usize, usize)], why: &str) -> Vec<(usize, DoneReason)> {
    shares
        .iter()
        .map(|&(at, _)| (at, DoneReason::Error(why.to_owned())))
        .collect()
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

/// Says that the thread has ended, however it did.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        *self.0.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.end.notify_all();
    }
}
