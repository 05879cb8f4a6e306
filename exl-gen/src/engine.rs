//! The engine: one thread that batches all jobs over one backend.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use exl_cache::{CacheEvent, PAGE_TOKENS, pages_for};

use crate::job::{Extras, Job, Wires};
use crate::request::{JobId, Request};
use crate::stats::{Load, Stats};
use crate::{AdapterInfo, Backend, DraftModel, Error, Result, Tokenizer};

mod disk;
mod draft;
mod pages;
mod queue;
mod step;
mod stream;
#[cfg(test)]
mod tests;
mod worker;

use disk::Disk;
pub use disk::DiskOptions;
use draft::Drafter;
pub use stream::{Answer, JobStream};
use worker::{Command, Worker};

/// Settings of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Most prompt tokens of one step.
    pub chunk_rows: usize,
    /// Most jobs that wait; a submit beyond is refused.
    pub max_waiting: usize,
    /// Most tokens of one sequence; the cache's size when absent.
    pub max_seq_len: Option<usize>,
    /// Texts that begin alike share pages of the cache, and a text that was there is found again.
    pub prefix_reuse: bool,
    /// Is told which pages can be found in the cache.
    pub cache_events: Option<Sender<CacheEvent>>,
    /// Keeps full pages of the cache on disk and finds them there again; needs `prefix_reuse`.
    pub disk: Option<DiskOptions>,
}

impl Default for EngineOptions {
    /// Chunks of 512 tokens, 1024 waiting jobs, sequences as long as the cache, reuse of prefixes.
    fn default() -> Self {
        Self {
            chunk_rows: 512,
            max_waiting: 1024,
            max_seq_len: None,
            prefix_reuse: true,
            cache_events: None,
            disk: None,
        }
    }
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Starts the engine's thread. The engine ends when it is drained, or when all handles are
    /// gone and its jobs are done.
    ///
    /// # Errors
    /// [`Error::Backend`] for a backend without room or whose cache cannot be kept on disk,
    /// [`Error::Cache`], [`Error::Io`] for the folder on disk.
    pub fn start(
        backend: Box<dyn Backend>,
        tokenizer: Arc<Tokenizer>,
        options: EngineOptions,
    ) -> Result<EngineHandle> {
        Self::launch(backend, None, tokenizer, &options)
    }

    /// As [`Engine::start`], with a model that guesses for jobs that want it
    /// ([`crate::Speculation::model`]).
    ///
    /// # Errors
    /// As [`Engine::start`]; [`Error::DraftModel`] when the draft model has another vocabulary.
    pub fn start_with_draft(
        backend: Box<dyn Backend>,
        draft: DraftModel,
        tokenizer: Arc<Tokenizer>,
        options: EngineOptions,
    ) -> Result<EngineHandle> {
        draft.check(&tokenizer, backend.vocab_size())?;
        Self::launch(backend, Some(draft), tokenizer, &options)
    }

    fn launch(
        backend: Box<dyn Backend>,
        draft: Option<DraftModel>,
        tokenizer: Arc<Tokenizer>,
        options: &EngineOptions,
    ) -> Result<EngineHandle> {
        let refuse = |reason: &str| Error::Backend {
            reason: reason.to_owned(),
        };
        if backend.max_rows() == 0 || backend.max_seqs() == 0 || options.chunk_rows == 0 {
            return Err(refuse("a step or a prompt chunk takes no token"));
        }
        let lanes = worker::max_lanes(backend.as_ref());
        let table = pages::table(backend.as_ref(), lanes, options.prefix_reuse)?;
        let disk = options.disk.as_ref().filter(|_| options.prefix_reuse);
        let disk = disk
            .map(|disk| Disk::open(disk, backend.as_ref()))
            .transpose()?;
        let draft_vocab = draft.as_ref().map(|draft| draft.backend.vocab_size());
        let drafter = draft
            .map(|draft| Drafter::new(draft, options.chunk_rows, options.prefix_reuse))
            .transpose()?;
        let capacity = table.capacity() * PAGE_TOKENS;
        let shared = Arc::new(Shared {
            next: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            stats: Mutex::new(Stats {
                load: Load {
                    free_pages: table.free_pages(),
                    pages: table.capacity(),
                    free_window_pages: table.window_pages().1,
                    window_pages: table.window_pages().0,
                    ..Load::default()
                },
                ..Stats::default()
            }),
            ended: Mutex::new(false),
            end: Condvar::new(),
        });
        let inner = Inner {
            vocab: backend.vocab_size(),
            draft_vocab,
            adapters: backend.adapters(),
            hidden_size: backend.hidden_size(),
            max_lanes: lanes,
            limit: options.max_seq_len.unwrap_or(capacity).min(capacity),
            max_waiting: options.max_waiting,
            tokenizer: Arc::clone(&tokenizer),
            shared: Arc::clone(&shared),
            commands: {
                let (sender, receiver) = channel();
                let pages = (table, disk);
                let worker = Worker::new(backend, tokenizer, pages, drafter, options, shared);
                std::thread::Builder::new()
                    .name("exl-engine".to_owned())
                    .spawn(move || worker.run(&receiver))
                    .map_err(|error| refuse(&error.to_string()))?;
                sender
            },
        };
        Ok(EngineHandle {
            inner: Arc::new(inner),
        })
    }
}

/// State both sides see.
#[derive(Debug)]
struct Shared {
    next: AtomicU64,
    waiting: AtomicUsize,
    closed: AtomicBool,
    stats: Mutex<Stats>,
    ended: Mutex<bool>,
    end: Condvar,
}

impl Shared {
    /// Numbers stay usable even if a thread died while it held them.
    fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Inner {
    vocab: usize,
    /// Rows of the draft model's head, if there is one.
    draft_vocab: Option<usize>,
    adapters: Vec<AdapterInfo>,
    hidden_size: usize,
    /// Most sequences of one job.
    max_lanes: usize,
    limit: usize,
    max_waiting: usize,
    tokenizer: Arc<Tokenizer>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The thread may be gone already, which is just as well.
        let _ = self.commands.send(Command::Drain);
    }
}

/// A running engine. Clones are handles of the same engine.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

impl EngineHandle {
    /// Queues a request. Its events come through the stream; dropping that aborts the job.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`], [`Error::UnknownToken`], [`Error::NoRow`],
    /// [`Error::Setting`], [`Error::UnknownAdapter`], [`Error::Extras`], [`Error::DraftModel`] where
    /// there is none, [`Error::QueueFull`], and [`Error::Closed`] while draining.
    pub fn submit(&self, request: Request) -> Result<JobStream> {
        let inner = &*self.inner;
        // Before the queue's room: a drained engine is closed even when its queue is full.
        if inner.shared.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        let rows = self.check(&request)?;
        let extras = Extras::new(&request, &inner.adapters, inner.hidden_size)?;
        let id = JobId(inner.shared.next.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let prompt = request.prompt.len();
        let job = Job::new(
            id,
            request,
            &inner.tokenizer,
            Wires {
                events: sender,
                cancelled: Arc::clone(&cancelled),
            },
        )?
        .with_rows(rows)
        .with_extras(extras);
        let full = |waiting| (waiting < inner.max_waiting).then_some(waiting + 1);
        inner
            .shared
            .waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, full)
            .map_err(|waiting| Error::QueueFull { waiting })?;
        if inner.commands.send(Command::Submit(Box::new(job))).is_err() {
            inner.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::Closed);
        }
        Ok(JobStream::new(
            id,
            prompt,
            receiver,
            cancelled,
            inner.commands.clone(),
        ))
    }

    /// Refuses what can never run; gives how many tokens the models know that will see it.
    fn check(&self, request: &Request) -> Result<usize> {
        let inner = &*self.inner;
        let (prompt, new) = (request.prompt.len(), request.max_new_tokens);
        if prompt == 0 {
            return Err(Error::EmptyPrompt);
        }
        let negative = request.guidance.as_ref().map(|guidance| &guidance.negative);
        let mut pages = 0;
        for prompt in std::iter::once(&request.prompt).chain(negative) {
            let (prompt, limit) = (prompt.len(), inner.limit);
            pages += pages_for(prompt.saturating_add(new));
            if prompt.saturating_add(new) > limit || pages > inner.shared.stats().load.pages {
                return Err(Error::PromptTooLong { prompt, new, limit });
            }
        }
        let lanes = 1 + usize::from(negative.is_some());
        if lanes > inner.max_lanes {
            let reason = "guidance needs two sequences in one step".to_owned();
            return Err(Error::Backend { reason });
        }
        let guessing = request.speculation.as_ref().is_some_and(|s| s.model);
        let vocab = match (guessing, inner.draft_vocab) {
            (true, None) => {
                let reason = "the engine has none".to_owned();
                return Err(Error::DraftModel { reason });
            }
            (true, Some(vocab)) => vocab.min(inner.vocab),
            (false, _) => inner.vocab,
        };
        // What stands where vectors are does not matter.
        let replaced = |at: &usize| request.vectors.iter().any(|v| v.positions().contains(at));
        let prompt = request.prompt.iter().enumerate();
        let prompt = prompt.filter(|(at, _)| !replaced(at)).map(|(_, id)| id);
        let tokens = prompt.chain(&request.prefix);
        let mut tokens = tokens.chain(negative.into_iter().flatten());
        match tokens.find(|&&id| id as usize >= vocab) {
            Some(&id) => inner.tokenizer.check(&[id], vocab).map(|()| vocab),
            None => Ok(vocab),
        }
    }

    /// Forgets what free pages of the cache hold.
    pub fn clear_cache(&self) {
        // A thread that is gone has no cache left.
        let _ = self.inner.commands.send(Command::Clear);
    }

    /// Ends a job as soon as the current step is over. Unknown and ended jobs are ignored.
    pub fn abort(&self, job: JobId) {
        // A thread that is gone has no job left to abort.
        let _ = self.inner.commands.send(Command::Abort(job));
    }

    /// Takes no more requests and waits until every job is done and the engine has ended.
    pub fn drain(&self) {
        self.inner.shared.closed.store(true, Ordering::Release);
        let _ = self.inner.commands.send(Command::Drain);
        let shared = &self.inner.shared;
        let mut ended = shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            ended = shared
                .end
                .wait(ended)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        let mut stats = *self.inner.shared.stats();
        stats.load = self.load();
        stats
    }

    /// What goes on now.
    pub fn load(&self) -> Load {
        Load {
            waiting: self.inner.shared.waiting.load(Ordering::Acquire),
            ..self.inner.shared.stats().load
        }
    }

    /// Most tokens of prompt and answer together.
    pub fn max_tokens(&self) -> usize {
        self.inner.limit
    }

    /// The tokenizer prompts are made with.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.inner.tokenizer
    }
}
