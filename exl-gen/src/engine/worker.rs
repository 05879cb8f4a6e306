//! The engine's thread: an explicit loop over commands and steps.

use std::any::Any;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use exl_cache::{CacheEvent, PageTable};

use super::disk::Disk;
use super::draft::Drafter;
use super::queue::Queue;
use super::{EngineOptions, Shared};
use crate::grammar::MaskThread;
use crate::job::Job;
use crate::request::{DoneReason, JobId};
use crate::schedule::Limits;
use crate::{Backend, Tokenizer};

/// All the engine can be told.
pub(super) enum Command {
    /// A new job.
    Submit(Box<Job>),
    /// End this job.
    Abort(JobId),
    /// Look at the jobs' cancel flags.
    Wake,
    /// Forget what free pages of the cache hold.
    Clear,
    /// End when all jobs are done.
    Drain,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Submit(job) => write!(f, "Submit({})", job.id),
            Self::Abort(id) => write!(f, "Abort({id})"),
            Self::Wake => f.write_str("Wake"),
            Self::Clear => f.write_str("Clear"),
            Self::Drain => f.write_str("Drain"),
        }
    }
}

pub(super) struct Worker {
    pub(super) backend: Box<dyn Backend>,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) table: PageTable,
    pub(super) disk: Option<Disk>,
    pub(super) limits: Limits,
    /// Most sequences of running jobs.
    pub(super) max_lanes: usize,
    pub(super) queue: Queue,
    /// Jobs in the batch, the most important first once a step begins.
    pub(super) running: Vec<Job>,
    pub(super) shared: Arc<Shared>,
    draining: bool,
    /// Who wants to know what the cache holds.
    listener: Option<Sender<CacheEvent>>,
    /// One row of logits; sampling changes it.
    pub(super) row: Vec<f32>,
    /// Started with the first job that has a grammar.
    pub(super) masks: Option<MaskThread>,
    /// The draft model.
    pub(super) drafter: Option<Drafter>,
}

impl Worker {
    pub(super) fn new(
        backend: Box<dyn Backend>,
        tokenizer: Arc<Tokenizer>,
        (mut table, disk): (PageTable, Option<Disk>),
        drafter: Option<Drafter>,
        options: &EngineOptions,
        shared: Arc<Shared>,
    ) -> Self {
        let rows = backend.max_rows();
        if options.cache_events.is_some() || disk.is_some() {
            table.record_events();
        }
        Self {
            limits: Limits {
                rows,
                chunk: options.chunk_rows,
            },
            max_lanes: max_lanes(backend.as_ref()),
            backend,
            tokenizer,
            table,
            disk,
            queue: Queue::default(),
            running: Vec::new(),
            shared,
            draining: false,
            listener: options.cache_events.clone(),
            row: Vec::new(),
            masks: None,
            drafter,
        }
    }

    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        // Waiters on the end are told even when this thread panics.
        let _ended = Ended(Arc::clone(&self.shared));
        while self.take_commands(commands) {
            self.reap();
            self.admit();
            self.reuse();
            self.grow();
            self.draft();
            self.step();
            self.report();
            self.save(false);
            self.publish();
        }
        self.save(true);
        if let Some(disk) = &mut self.disk {
            disk.close();
        }
        self.publish();
    }

    /// Takes what was said; sleeps while there is nothing to do. False at the end.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let idle = self.running.is_empty() && self.queue.is_empty();
            let command = match commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) if !idle => return true,
                Err(TryRecvError::Empty) if !self.draining => {
                    // There is time for it now.
                    self.save(true);
                    match commands.recv() {
                        Ok(command) => command,
                        Err(_) => return false,
                    }
                }
                Err(_) if idle => return false,
                Err(_) => return true,
            };
            match command {
                Command::Submit(job) => self.queue.push(*job),
                Command::Abort(id) => self.stop(id, DoneReason::Aborted),
                Command::Wake => {}
                Command::Clear => {
                    self.table.clear();
                    self.report();
                }
                Command::Drain => {
                    self.draining = true;
                    self.shared.closed.store(true, Ordering::Release);
                }
            }
        }
    }

    fn stop(&mut self, id: JobId, reason: DoneReason) {
        if let Some(job) = self.queue.take(id) {
            self.leave_queue();
            self.end(job, reason);
        } else if let Some(at) = self.running.iter().position(|job| job.id == id) {
            let job = self.running.remove(at);
            self.end(job, reason);
        }
    }

    /// Ends jobs whose callers are gone or want no more, and those that take too long.
    fn reap(&mut self) {
        let now = Instant::now();
        let over = |job: &Job| {
            let reason = match (job.is_cancelled(), job.is_late(now)) {
                (true, _) => DoneReason::Aborted,
                (_, true) => DoneReason::Deadline,
                _ => return None,
            };
            Some((job.id, reason))
        };
        let jobs = self.queue.iter().chain(&self.running);
        let over: Vec<(JobId, DoneReason)> = jobs.filter_map(over).collect();
        for (id, reason) in over {
            self.stop(id, reason);
        }
    }

    pub(super) fn leave_queue(&self) {
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn enter_queue(&self) {
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
    }

    /// Gives back the job's pages and tells its caller. In this order, so that a caller who reads
    /// the statistics after the last event finds them settled.
    pub(super) fn end(&mut self, mut job: Job, reason: DoneReason) {
        let failed = matches!(reason, DoneReason::Error(_));
        for lane in &mut job.lanes {
            self.release(lane, failed);
        }
        self.forget_draft(job.id);
        {
            let mut stats = self.shared.stats();
            stats.masks.add(job.mask_times());
            match reason {
                DoneReason::Aborted | DoneReason::Deadline => stats.aborted += 1,
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
        stats.load.kept_pages = self.table.kept_pages();
        stats.load.free_window_pages = self.table.window_pages().1;
        stats.load.draft_pages = self.drafter.as_ref().map_or(0, Drafter::used_pages);
    }

    /// Tells who wants to know what changed in the cache.
    fn report(&mut self) {
        let events = self.table.take_events();
        if let Some(disk) = &mut self.disk {
            disk.note(&events);
        }
        let Some(listener) = &self.listener else {
            return;
        };
        let sent = events
            .into_iter()
            .try_for_each(|event| listener.send(event));
        if sent.is_err() {
            self.listener = None;
        }
    }

    /// Keeps pages on disk: as many as there is time for, or all.
    fn save(&mut self, all: bool) {
        if let Some(disk) = &mut self.disk {
            disk.save(&self.table, self.backend.as_mut(), all);
        }
    }
}

/// Sequences that may run at once. Half of the rows stay free for prompts, so decoding jobs cannot
/// shut them out.
pub(super) fn max_lanes(backend: &dyn Backend) -> usize {
    backend.max_seqs().min(backend.max_rows().div_ceil(2))
}

pub(super) fn message(panic: &(dyn Any + Send)) -> &str {
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
