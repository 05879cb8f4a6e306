//! From flags to a loaded model that can run.

use crate::args::{ActivationMode, CacheArgs, ComputeArgs, Device, DeviceArgs, LoadArgs, Lora};
use crate::failure::{Interrupted, Usage};
use crate::guessing::Guessing;
use crate::machine;
use crate::memory::{self, Taken};
use crate::signal::StopFlag;
use crate::ui::{self, Ui};
use anyhow::{Context, Result, anyhow, bail};
use exl_gen::{
    AdapterUse, Backend as _, DiskOptions, DraftModel, Engine, EngineHandle, EngineOptions,
    RunnerBackend, Tokenizer,
};
use exl_models::rope::RopeOptions;
use exl_models::{
    Adapter, Backend, LoadOptions, MemoryRequest, Model, ModelSource, Runner, RunnerOptions,
    WindowPages,
};
use exl_tensor::{Activations, CudaOptions, Gpu, KvType, PAGE_TOKENS};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Prompt tokens of one step on the CPU.
pub(crate) const PREFILL_ROWS: usize = 512;
/// Prompt tokens of one step on a GPU.
pub(crate) const GPU_PREFILL_ROWS: usize = 2048;

/// A model in memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    /// Bytes of its weights in the files.
    pub(crate) checkpoint_bytes: u64,
}

/// The GPU that computes, or `None` for the CPU. Says which one it is when nobody named it.
pub(crate) fn gpu(device: Device, ui: &Ui) -> Result<Option<Gpu>> {
    let ordinal = match device {
        Device::Cpu => return Ok(None),
        Device::Cuda(n) => n,
        Device::Auto => match exl_tensor::probe() {
            Ok(list) => match list.first() {
                Some(first) => first.ordinal,
                None => return Ok(None),
            },
            Err(error) => {
                tracing::info!("{error}");
                ui.note("no usable GPU found: using the CPU (exl doctor says why)");
                return Ok(None);
            }
        },
    };
    match (Gpu::open(ordinal), device) {
        (Ok(gpu), _) => Ok(Some(gpu)),
        (Err(error), Device::Auto) => {
            ui.note(&format!("{error}: using the CPU"));
            Ok(None)
        }
        (Err(error), _) => {
            let reason = match error {
                exl_tensor::Error::Gpu(reason) => reason.to_string(),
                other => other.to_string(),
            };
            bail!(
                "--device cuda:{ordinal} cannot be used: {reason} (use --device cpu, or leave the flag out)"
            )
        }
    }
}

/// Prompt tokens of one step: enough rows to keep the device busy.
pub(crate) fn prefill_rows(gpu: Option<&Gpu>) -> usize {
    match gpu {
        Some(_) => GPU_PREFILL_ROWS,
        None => PREFILL_ROWS,
    }
}

/// Threads that computing uses.
pub(crate) fn threads(device: &DeviceArgs) -> usize {
    if device.threads == 0 {
        machine::cores()
    } else {
        device.threads
    }
}

/// Name of the activation mode, as on the command line.
pub(crate) fn activations_name(compute: &ComputeArgs) -> &'static str {
    match compute.activations {
        ActivationMode::Exact16 => "exact16",
        ActivationMode::Fast8 => "fast8",
    }
}

/// The mode as the kernels know it.
pub(crate) fn activations(compute: &ComputeArgs) -> Activations {
    match compute.activations {
        ActivationMode::Exact16 => Activations::Exact16,
        ActivationMode::Fast8 => Activations::Fast8,
    }
}

/// Settings of a runner; the caller sets its sizes.
pub(crate) fn runner_options(
    compute: &ComputeArgs,
    cache: KvType,
    gpu: Option<&Gpu>,
) -> RunnerOptions {
    let cuda = CudaOptions {
        deterministic: compute.deterministic,
        ..CudaOptions::default()
    };
    RunnerOptions {
        backend: match gpu {
            Some(gpu) => Backend::Cuda(gpu.clone(), cuda),
            None => Backend::Cpu,
        },
        kv_type: cache,
        threads: threads(&compute.device),
        activations: activations(compute),
        ..RunnerOptions::default()
    }
}

/// Name of what computes, the instruction set included.
pub(crate) fn device_name(runner: &Runner) -> String {
    runner.executor().name()
}

/// Settings of opening a model.
pub(crate) fn load_options(
    load: LoadArgs,
    compute: &ComputeArgs,
    context: Option<usize>,
) -> LoadOptions {
    LoadOptions {
        rope: RopeOptions {
            context,
            ..RopeOptions::default()
        },
        assume_llama: load.assume_llama,
        threads: threads(&compute.device),
    }
}

/// Opens a model's files and passes on what they had to remark.
pub(crate) fn open(dir: &Path, options: &LoadOptions, ui: &Ui) -> Result<ModelSource> {
    let source = ModelSource::open(dir, options).map_err(|error| {
        // Most errors name a file of the directory; said twice, it is only longer.
        let named = error.to_string().contains(&dir.display().to_string());
        let error = anyhow::Error::new(error);
        if named {
            return error;
        }
        error.context(format!("cannot open the model in {}", dir.display()))
    })?;
    tracing::info!(
        "{}: {}, {} layers, {} in {} files",
        dir.display(),
        source.spec().architecture,
        source.spec().layers.len(),
        ui::bytes(source.total_bytes()),
        source.files().files().len()
    );
    for notice in source.files().notices() {
        ui.note(&format!("note: {notice}"));
    }
    Ok(source)
}

/// Loads an opened model, with progress; Ctrl-C ends it.
pub(crate) fn load(
    source: &ModelSource,
    gpu: Option<&Gpu>,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<Loaded> {
    let (total, start) = (source.total_bytes(), Instant::now());
    let progress = Mutex::new(ui.bytes("loading", total));
    let model = source.load_onto(gpu, &|at| {
        if let Ok(mut progress) = progress.lock() {
            progress.set(at.done);
        }
        if stop.is_set() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    drop(progress);
    let Some(model) = model else {
        return Err(Interrupted("stopped while loading".to_owned()).into());
    };
    tracing::info!(
        "loaded in {:.2} s, {} in memory",
        start.elapsed().as_secs_f64(),
        ui::bytes(model.weights().bytes() as u64)
    );
    Ok(Loaded {
        model: Arc::new(model),
        checkpoint_bytes: total,
    })
}

/// Says when a flag asks for more tokens than the model was trained for; refuses more than it has learned
/// positions for.
pub(crate) fn check_context(
    source: &ModelSource,
    flag: &str,
    tokens: usize,
    ui: &Ui,
) -> Result<()> {
    let max = source.spec().max_context;
    let learned = source.spec().embed.positions.as_ref();
    if let Some(learned) = learned.filter(|p| tokens > p.count) {
        let what = format!("{flag} {tokens}: the model has {} positions", learned.count);
        return Err(Usage(what).into());
    }
    if tokens > max {
        ui.note(&format!(
            "{flag} {tokens}: the model was trained for {max}, expect nonsense beyond"
        ));
    }
    Ok(())
}

/// What an engine must hold.
#[derive(Debug)]
pub(crate) struct Room {
    /// Sequences at once.
    pub(crate) seqs: usize,
    /// Tokens of each sequence, prompt and answer.
    pub(crate) lengths: Vec<usize>,
    pub(crate) cache: KvType,
    /// Where prefixes are kept, and how many bytes of them.
    pub(crate) disk: Option<(PathBuf, u64)>,
    /// Most tokens guessed for one step of a sequence.
    guesses: usize,
    /// A model that guesses, and how to open it.
    draft: Option<(PathBuf, LoadOptions)>,
    /// Adapters that requests may use.
    pub(crate) adapters: Vec<Lora>,
}

impl Room {
    /// For one sequence.
    pub(crate) fn one(tokens: usize, cache: KvType) -> Self {
        Self::of(vec![tokens], cache)
    }

    /// For sequences of these lengths.
    pub(crate) fn of(lengths: Vec<usize>, cache: KvType) -> Self {
        Self {
            seqs: lengths.len(),
            lengths,
            cache,
            disk: None,
            guesses: 0,
            draft: None,
            adapters: Vec::new(),
        }
    }

    /// With the folder that flags name.
    pub(crate) fn with_disk(mut self, args: &CacheArgs) -> Self {
        let bytes = (args.prefix_gb * 1e9) as u64;
        self.disk = args.prefix_dir.clone().map(|folder| (folder, bytes));
        self
    }

    /// With room for guesses, and for the draft model.
    pub(crate) fn with_guesses(mut self, guessing: &Guessing, options: &LoadOptions) -> Self {
        self.guesses = guessing.most();
        self.draft = guessing.draft.clone().map(|dir| (dir, options.clone()));
        self
    }

    /// With adapters that flags name.
    pub(crate) fn with_adapters(mut self, adapters: &[Lora]) -> Self {
        self.adapters = adapters.to_vec();
        self
    }

    /// What memory is computed for when prompts go in steps of `prefill_rows` tokens.
    pub(crate) fn memory_request(&self, prefill_rows: usize) -> MemoryRequest {
        let options = RunnerOptions {
            kv_type: self.cache,
            ..RunnerOptions::default()
        };
        self.sized(options, prefill_rows).memory_request()
    }

    /// A runner's settings with its sizes: the largest step is a part of a prompt beside one token of
    /// every sequence, and its guesses.
    fn sized(&self, options: RunnerOptions, prefill_rows: usize) -> RunnerOptions {
        let longest = self.lengths.iter().copied().max().unwrap_or(1);
        RunnerOptions {
            pages: self.pages(),
            window_pages: WindowPages::Needed,
            max_seqs: self.seqs,
            max_rows: prefill_rows.min(longest) + self.seqs * (1 + self.guesses),
            out_rows: match self.guesses {
                0 => 0,
                guesses => self.seqs * (1 + guesses),
            },
            ..options
        }
    }

    fn pages(&self) -> usize {
        self.lengths
            .iter()
            .map(|tokens| tokens.div_ceil(PAGE_TOKENS))
            .sum()
    }
}

/// Loads a model and starts an engine with just that much room.
pub(crate) fn engine(
    source: ModelSource,
    tokenizer: &Arc<Tokenizer>,
    room: &Room,
    compute: &ComputeArgs,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<EngineHandle> {
    let gpu = gpu(compute.device.device, ui)?;
    let gpu = gpu.as_ref();
    let prefill_rows = prefill_rows(gpu);
    let mut options = room.sized(runner_options(compute, room.cache, gpu), prefill_rows);
    let what = format!(
        "{} with {} tokens of context",
        source.files().dir().display(),
        room.pages() * PAGE_TOKENS
    );
    let draft = room.draft.as_ref();
    let draft = draft.map(|(dir, options)| Draft::open(dir, options, tokenizer, ui));
    let draft = draft.transpose()?;
    // The draft model has no part in the adapters.
    let plain = options.clone();
    for lora in &room.adapters {
        let refuse = |error| {
            anyhow!("--lora takes a folder of PEFT's files that were made for this model: {error}")
        };
        let adapter = Adapter::open(&lora.dir, source.spec()).map_err(refuse)?;
        options.adapters.push(Arc::new(adapter));
    }
    let mut need = memory::needed(&source, &options.memory_request(), gpu)?;
    let adapters = options.adapters.iter().map(|a| a.weights().bytes() as u64);
    need.weights += adapters.sum::<u64>();
    if let Some(draft) = &draft {
        let more = memory::needed(&draft.source, &plain.memory_request(), gpu)?;
        need = memory::sum(&need, &more);
    }
    memory::check(&need, &what, "--context", gpu)?;
    let loaded = load(&source, gpu, stop, ui)?;
    let draft = draft.map(|draft| draft.load(&loaded, &plain, gpu, (stop, ui)));
    let draft = draft.transpose()?;
    let disk = disk(&source, &options, room.disk.as_ref())?;
    // The files that were repacked need not stay mapped.
    drop(source);
    tracing::debug!(
        "cache of {} pages of {PAGE_TOKENS} tokens, {}; steps of up to {} rows",
        options.pages,
        options.kv_type,
        options.max_rows
    );
    let runner = Runner::new(loaded.model, options)?;
    if let Some(gpu) = gpu {
        let taken = Taken::now(gpu, &need)?;
        tracing::info!("device memory: {}", taken.text());
    }
    let options = EngineOptions {
        chunk_rows: prefill_rows,
        // Every sequence that there is room for may wait.
        max_waiting: room.seqs.max(1),
        disk,
        ..EngineOptions::default()
    };
    let backend = RunnerBackend::new(runner).with_adapter_names(room.adapters.iter().map(name));
    let (backend, tokenizer) = (Box::new(backend), Arc::clone(tokenizer));
    if let Some(draft) = &draft
        && draft.cost + backend.row_cost() >= 1.0
    {
        ui.note(&format!(
            "--draft: its weights are {:.0}% of the model's; so slow a model is not asked to guess",
            100.0 * draft.cost
        ));
    }
    Ok(match draft {
        Some(draft) => Engine::start_with_draft(backend, draft, tokenizer, options)?,
        None => Engine::start(backend, tokenizer, options)?,
    })
}

/// A draft model whose files are open.
struct Draft {
    source: ModelSource,
    tokenizer: Arc<Tokenizer>,
}

/// Least cost of a draft model's step: what is not the weights takes time as well.
const LEAST_COST: f32 = 0.05;

impl Draft {
    /// Refuses a model of another vocabulary before anything is loaded.
    fn open(dir: &Path, options: &LoadOptions, tokenizer: &Tokenizer, ui: &Ui) -> Result<Self> {
        let what = || format!("--draft {}", dir.display());
        let source = open(dir, options, ui).with_context(what)?;
        let own = Arc::new(Tokenizer::open(dir).with_context(what)?);
        DraftModel::compare(&own, tokenizer).with_context(what)?;
        Ok(Self {
            source,
            tokenizer: own,
        })
    }

    /// Loads it beside the model, with a cache of the same size.
    fn load(
        self,
        model: &Loaded,
        options: &RunnerOptions,
        gpu: Option<&Gpu>,
        (stop, ui): (&StopFlag, &Ui),
    ) -> Result<DraftModel> {
        let loaded = load(&self.source, gpu, stop, ui)?;
        let bytes = |model: &Model| model.weights().bytes() as f32;
        let cost = bytes(&loaded.model) / bytes(&model.model).max(1.0);
        let runner = Runner::new(loaded.model, options.clone())?;
        Ok(DraftModel {
            backend: Box::new(RunnerBackend::new(runner)),
            tokenizer: self.tokenizer,
            cost: cost.max(LEAST_COST),
        })
    }
}

/// What requests call an adapter.
fn name(lora: &Lora) -> String {
    lora.dir.display().to_string()
}

/// The adapters of a request.
pub(crate) fn uses(adapters: &[Lora]) -> Vec<AdapterUse> {
    let one = |lora: &Lora| AdapterUse {
        name: name(lora),
        scale: lora.scale,
    };
    adapters.iter().map(one).collect()
}

/// What keeps pages on disk. They depend on the weights and on how these compute: not on threads,
/// but on the device, the precision of activations and the kind of cache.
fn disk(
    source: &ModelSource,
    options: &RunnerOptions,
    room: Option<&(PathBuf, u64)>,
) -> Result<Option<DiskOptions>> {
    let Some((folder, limit)) = room else {
        return Ok(None);
    };
    std::fs::create_dir_all(folder).with_context(|| {
        format!(
            "cannot keep the cache in {} (--prefix-dir)",
            folder.display()
        )
    })?;
    let device = match options.backend {
        Backend::Cuda(..) => "cuda",
        Backend::Cpu | Backend::Reference => "cpu",
    };
    let mut model = format!(
        "{}\n{device}\n{:?}\n{:?}",
        source.fingerprint()?,
        options.activations,
        options.kv_type
    );
    if source.spec().sliding().layers > 0 {
        // Before, layers were in the order of the model.
        model.push_str("\nsliding layers last");
    }
    if options.kv_type.k.has_centers() {
        // How centers of keys are measured: a page has them, and what is appended to a copy takes new ones.
        model.push_str("\ncenters of 64 tokens");
    }
    Ok(Some(DiskOptions {
        folder: folder.clone(),
        model,
        limit: *limit,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `exl info` predicts for a context is what an engine for one sequence of it takes.
    #[test]
    fn info_and_the_engine_compute_the_same_memory() {
        let room = Room::one(5000, KvType::F16);
        let request = room.memory_request(GPU_PREFILL_ROWS);
        assert_eq!((request.rows, request.pages), (GPU_PREFILL_ROWS + 1, 20));
        assert_eq!(request.kv_type, KvType::F16);
        let short = Room::one(100, KvType::F32).memory_request(GPU_PREFILL_ROWS);
        assert_eq!((short.rows, short.pages), (101, 1));
        assert_eq!(request.window_pages, WindowPages::Needed);
        let options = room.sized(RunnerOptions::default(), GPU_PREFILL_ROWS);
        assert_eq!(options.memory_request(), request);
    }
}
