//! Runs steps of a model: plans by shape, the KV cache, the executor.

mod adapted;
mod centers;
mod draw;
mod extras;
mod pages;
mod plans;
mod positions;

use std::borrow::Cow;
use std::sync::Arc;

use exl_tensor::{
    Activations, Bound, Cpu, CpuOptions, CudaExecutor, CudaOptions, Executor, Gpu, HostExecutor,
    Isa, KvBuffers, KvType, PAGE_TOKENS, PartTime, Phase, PlanKey, SampleShape, StepSeq,
};

use crate::model::{MemoryRequest, MemoryUse, Model, WindowPages};
use crate::{Adapter, Error, Result};
use adapted::Adapted;
use pages::PageUses;
use plans::PlanCache;

pub use draw::{Draw, SampleParams};
pub use extras::{SliceExtras, Vectors};

/// Which rows of a slice get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct SeqSlice<'a> {
    /// New tokens, at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them; everything before it is in the cache.
    pub start: usize,
    /// Pages of the sequence in order, enough for `start + tokens.len()`. Sequences
    /// may share pages that the step only reads. Where layers with a window have pages of their own
    /// ([`WindowPages::Needed`]) the extras name those as well.
    pub pages: &'a [u32],
    /// Rows that get logits.
    pub logits: LogitRows,
    /// What only some sequences have; nothing by default.
    pub extras: SliceExtras<'a>,
}

/// Kernels that run the plans.
#[derive(Clone, Debug, Default)]
pub enum Backend {
    /// SIMD kernels of the CPU.
    #[default]
    Cpu,
    /// The f64 reference kernels: slow, for checking.
    Reference,
    /// A GPU, which must hold the model's weights ([`crate::ModelSource::load_onto`]).
    Cuda(Gpu, CudaOptions),
}

/// Settings of a [`Runner`].
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// Pages of [`PAGE_TOKENS`] tokens in the cache.
    pub pages: usize,
    /// Pages of layers with a window; by default all.
    pub window_pages: WindowPages,
    /// Storage of the cache.
    pub kv_type: KvType,
    /// Most token rows of one step.
    pub max_rows: usize,
    /// Most sequences of one step.
    pub max_seqs: usize,
    /// Rows with logits of one step that memory is computed for, where they are more than one of each
    /// sequence. Still more take their memory when they are asked for.
    pub out_rows: usize,
    /// CPU threads, 0 for all.
    pub threads: usize,
    /// Instruction set, the best one by default.
    pub isa: Option<Isa>,
    /// Precision of activations at quantized weights.
    pub activations: Activations,
    /// Kernels.
    pub backend: Backend,
    /// Plans kept ready; the least recently used one goes first.
    pub plans: usize,
    /// Adapters that sequences may use, by their number here.
    pub adapters: Vec<Arc<Adapter>>,
}

impl Default for RunnerOptions {
    /// One sequence of 2048 tokens in a cache of 16-bit floats, all threads.
    fn default() -> Self {
        Self {
            pages: 2048 / PAGE_TOKENS,
            window_pages: WindowPages::All,
            kv_type: KvType::F16,
            max_rows: 512,
            max_seqs: 64,
            out_rows: 0,
            threads: 0,
            isa: None,
            activations: Activations::Exact16,
            backend: Backend::Cpu,
            plans: 32,
            adapters: Vec::new(),
        }
    }
}

impl RunnerOptions {
    /// What memory is computed for: one sequence may have the whole cache.
    pub fn memory_request(&self) -> MemoryRequest {
        MemoryRequest {
            context: self.pages.saturating_mul(PAGE_TOKENS),
            seqs: self.max_seqs,
            pages: self.pages,
            window_pages: self.window_pages,
            kv_type: self.kv_type,
            rows: self.max_rows,
            out_rows: self.out_rows,
        }
    }
}

/// A model with a cache and an executor.
#[derive(Debug)]
pub struct Runner {
    model: Adapted,
    options: RunnerOptions,
    executor: Box<dyn Executor>,
    kv: KvBuffers,
    plans: PlanCache,
    uses: PageUses,
    /// Shape of the last step.
    last: Option<PlanKey>,
    /// Of the last step, while parts are timed.
    times: Option<Vec<PartTime>>,
}

impl Runner {
    /// Allocates the cache and starts the threads; on a GPU it takes the memory of the largest steps
    /// ([`MemoryRequest::steps`]), so that a lack of it shows here. With keys of four bits it runs some tokens,
    /// to learn what keys have in common.
    ///
    /// # Errors
    /// [`Error::Step`] on impossible options, out of memory.
    pub fn new(model: Arc<Model>, options: RunnerOptions) -> Result<Self> {
        if options.pages == 0 || options.max_rows == 0 || options.max_seqs == 0 {
            return Err(Error::Step(format!(
                "{} pages, {} rows and {} sequences; at least one of each is needed",
                options.pages, options.max_rows, options.max_seqs
            )));
        }
        let gpu = match &options.backend {
            Backend::Cuda(gpu, _) => Some(gpu),
            Backend::Cpu | Backend::Reference => None,
        };
        let shape = model.kv_shape(options.kv_type);
        let pages = options.memory_request().kv_pages(&shape);
        let model = Adapted::new(model, &options.adapters, gpu)?;
        let mut kv = match &options.backend {
            Backend::Cuda(gpu, _) => KvBuffers::on_gpu(gpu, shape, pages)?,
            Backend::Cpu | Backend::Reference => KvBuffers::new(shape, pages)?,
        };
        let executor: Box<dyn Executor> = match &options.backend {
            Backend::Reference => Box::new(HostExecutor::reference()?),
            Backend::Cpu => Box::new(HostExecutor::cpu(Cpu::new(CpuOptions {
                threads: options.threads,
                isa: options.isa,
                activations: options.activations,
            }))?),
            Backend::Cuda(gpu, how) => Box::new(on_gpu((gpu, *how), &model, &options, &mut kv)?),
        };
        let plans = PlanCache::new(options.plans);
        let uses = PageUses::new(pages, shape.sliding.window);
        let mut runner = Self {
            model,
            options,
            executor,
            kv,
            plans,
            uses,
            last: None,
            times: None,
        };
        centers::set(&mut runner)?;
        Ok(runner)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        self.model.base()
    }

    /// The settings.
    pub fn options(&self) -> &RunnerOptions {
        &self.options
    }

    /// The executor, for its name and counters.
    pub fn executor(&self) -> &dyn Executor {
        self.executor.as_ref()
    }

    /// The cache.
    pub fn kv(&self) -> &KvBuffers {
        &self.kv
    }

    /// The cache, for copying pages.
    pub fn kv_mut(&mut self) -> &mut KvBuffers {
        &mut self.kv
    }

    /// Times the parts of every further step, one after the other: for looking closely, not for speed.
    pub fn time_parts(&mut self, on: bool) {
        self.times = on.then(Vec::new);
    }

    /// How long the parts of the last step took, in their order; none unless they are timed.
    pub fn part_times(&self) -> &[PartTime] {
        self.times.as_deref().unwrap_or(&[])
    }

    /// Memory held: weights, cache, and what the largest steps so far needed.
    pub fn memory(&self) -> MemoryUse {
        MemoryUse {
            weights: self.model.weights().bytes() as u64,
            cache: self.kv.bytes() as u64,
            arena: self.executor.arena_bytes() as u64,
            scratch: self.executor.scratch_bytes() as u64,
            step: self.plans.step_bytes() as u64,
        }
    }

    /// Runs one step: appends every slice's tokens to its sequence and returns the logits asked
    /// for, `[rows, vocab]`, slice by slice and token by token; valid until the next step.
    ///
    /// # Errors
    /// [`Error::Step`] when a token, a page or a length is out of range, or a page that the step
    /// writes is used in two places.
    pub fn step(&mut self, slices: &[SeqSlice<'_>]) -> Result<&[f32]> {
        let key = self.key(slices, None)?;
        self.run(&key, slices, &[])?;
        let ready = self.plans.ready(&self.model, &key)?;
        match ready.logits {
            Some(slot) => Ok(self.executor.values(&ready.bound, slot)?),
            None => Ok(&[]),
        }
    }

    /// As [`Runner::step`], and also draws the next token of every row that gets logits, where the
    /// logits are; they are not copied. `draws` has one entry for each of these rows, slice by slice
    /// and token by token. Tokens from `tokens` on do not exist, whatever the head says. Gives the
    /// tokens in the same order, -1 for a row where a logit is NaN or no token is left; valid until
    /// the next step.
    ///
    /// # Errors
    /// As [`Runner::step`]; [`Error::Step`] when `draws` has another length, or without tokens.
    pub fn step_drawn(
        &mut self,
        slices: &[SeqSlice<'_>],
        draws: &[Draw<'_>],
        tokens: usize,
    ) -> Result<&[i32]> {
        let shape = draw::shape(draws, tokens.min(self.model().spec().vocab))?;
        let key = self.key(slices, Some(shape))?;
        self.run(&key, slices, draws)?;
        let ready = self.plans.ready(&self.model, &key)?;
        match ready.tokens {
            Some(slot) => Ok(self.executor.integers(&ready.bound, slot)?),
            None => Ok(&[]),
        }
    }

    /// As [`Runner::step_drawn`] for a step in which some rows are for the caller to choose from:
    /// those without a draw. `drawn` takes the tokens of all rows, where rows without a draw have
    /// one without meaning. Gives the logits of all rows, `[rows, vocab]`; those of rows with a draw
    /// are changed by its penalties.
    ///
    /// # Errors
    /// As [`Runner::step_drawn`].
    pub fn step_mixed(
        &mut self,
        slices: &[SeqSlice<'_>],
        draws: &[Option<Draw<'_>>],
        tokens: usize,
        drawn: &mut Vec<i32>,
    ) -> Result<&[f32]> {
        // Greedy and without penalties, a draw leaves the logits as they are.
        let nothing = Draw {
            params: SampleParams::default(),
            recent: &[],
            blocked: &[],
        };
        let all: Vec<Draw<'_>> = draws.iter().map(|draw| draw.unwrap_or(nothing)).collect();
        let chosen = self.step_drawn(slices, &all, tokens)?;
        drawn.clear();
        drawn.extend_from_slice(chosen);
        let shape = draw::shape(&all, tokens.min(self.model().spec().vocab))?;
        let key = self.key(slices, Some(shape))?;
        let ready = self.plans.ready(&self.model, &key)?;
        match ready.logits {
            Some(slot) => Ok(self.executor.values(&ready.bound, slot)?),
            None => Ok(&[]),
        }
    }

    /// Last hidden states of the last step, `[rows, hidden]`, behind the final norm: of the rows that
    /// asked for them ([`SliceExtras::hidden`]), slice by slice; valid until the next step.
    ///
    /// # Errors
    /// [`Error::Exec`] when they cannot be copied from the device.
    pub fn hidden(&mut self) -> Result<&[f32]> {
        let Some(key) = self.last.clone() else {
            return Ok(&[]);
        };
        let ready = self.plans.ready(&self.model, &key)?;
        match ready.hidden {
            Some(slot) => Ok(self.executor.values(&ready.bound, slot)?),
            None => Ok(&[]),
        }
    }

    fn run(&mut self, key: &PlanKey, slices: &[SeqSlice<'_>], draws: &[Draw<'_>]) -> Result<()> {
        self.uses.check(slices)?;
        let ready = self.plans.ready(&self.model, key)?;
        if let Some(limit) = ready.position_limit {
            positions::check_limit(slices, limit)?;
        }
        let tokens: Vec<Cow<'_, [u32]>> = slices.iter().map(extras::tokens).collect();
        let pairs = slices.iter().zip(&tokens);
        let seqs: Vec<StepSeq<'_>> = pairs.map(|(s, tokens)| step_seq(s, tokens)).collect();
        let rows: Vec<_> = slices.iter().map(extras::rows).collect();
        let extras: Vec<_> = slices.iter().zip(&rows).map(extras::of_step).collect();
        ready.step.fill_all(&seqs, draws, &extras)?;
        self.executor.prepare(&ready.bound)?;
        if let Some(slot) = ready.vectors {
            let values = extras::vectors(slices, ready.bound.plan().slot(slot).dim);
            self.executor.write(&ready.bound, slot, &values)?;
        }
        self.last = Some(key.clone());
        let (bound, step) = (&ready.bound, &ready.step);
        match &mut self.times {
            Some(times) => *times = self.executor.profile(bound, step, &mut self.kv)?,
            None => self.executor.run(bound, step, &mut self.kv)?,
        }
        Ok(())
    }

    /// The shape of a step: exact rows and sequences, pages rounded up to a power of two. Without
    /// logits nothing is drawn.
    fn key(&self, slices: &[SeqSlice<'_>], sample: Option<SampleShape>) -> Result<PlanKey> {
        for (i, slice) in slices.iter().enumerate() {
            self.check(i, slice)?;
        }
        let rows = slices.iter().map(|s| s.tokens.len()).sum();
        let o = &self.options;
        if slices.is_empty() || slices.len() > o.max_seqs || rows > o.max_rows {
            return Err(Error::Step(format!(
                "{} sequences with {rows} tokens, the runner takes 1 to {} with up to {}",
                slices.len(),
                o.max_seqs,
                o.max_rows
            )));
        }
        let pages = slices.iter().map(|s| pages_needed(s)).max().unwrap_or(1);
        let single = slices.iter().all(|s| s.tokens.len() == 1);
        let out_rows = slices.iter().map(|s| out_rows(s)).sum();
        let window_pages = self.kv.pages().window.is_some();
        Ok(PlanKey {
            phase: if single {
                Phase::Decode
            } else {
                Phase::Prefill
            },
            rows,
            seqs: slices.len(),
            pages_per_seq: pages.next_power_of_two(),
            out_rows,
            sample: sample.filter(|_| out_rows > 0),
            extras: extras::of_key(slices, window_pages),
        })
    }

    fn check(&self, index: usize, slice: &SeqSlice<'_>) -> Result<()> {
        let refuse = |what: String| Err(Error::Step(format!("sequence {index}: {what}")));
        let spec = self.model().spec();
        let vocab = spec.vocab;
        if slice.tokens.is_empty() {
            return refuse("no tokens".to_owned());
        }
        if let Err(what) = extras::check(slice, spec, self.options.adapters.len()) {
            return refuse(what);
        }
        let tokens = extras::tokens(slice);
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return refuse(format!("token {token}, the vocabulary has {vocab}"));
        }
        pages::check(slice, self.kv.pages()).or_else(refuse)
    }
}

/// An executor with memory for all steps.
fn on_gpu(
    (gpu, how): (&Gpu, CudaOptions),
    model: &Adapted,
    options: &RunnerOptions,
    kv: &mut KvBuffers,
) -> Result<CudaExecutor> {
    let mut executor = CudaExecutor::new(gpu, how)?;
    let vocab = model.base().spec().vocab;
    let shape = kv.shape();
    for mut key in options.memory_request().steps(&shape, Some(vocab)) {
        key.extras.adapters = (0..options.adapters.len() as u32).collect();
        let plan = Arc::new(model.plan(&key));
        executor.reserve(&Bound::new(plan, model.weights())?, kv)?;
    }
    Ok(executor)
}

fn pages_needed(slice: &SeqSlice<'_>) -> usize {
    let end = slice.start.saturating_add(slice.tokens.len());
    end.div_ceil(PAGE_TOKENS)
}

fn out_rows(slice: &SeqSlice<'_>) -> usize {
    match slice.logits {
        LogitRows::None => 0,
        LogitRows::Last => 1,
        LogitRows::All => slice.tokens.len(),
    }
}

fn step_seq<'a>(slice: &SeqSlice<'a>, tokens: &'a [u32]) -> StepSeq<'a> {
    let n = slice.tokens.len();
    StepSeq {
        tokens,
        start: slice.start,
        // Pages beyond those in use may not fit the plan's block table.
        pages: &slice.pages[..pages_needed(slice)],
        logits: (n - out_rows(slice), n),
    }
}
