//! From a model directory to weights that executors read.
//!
//! Every tensor's presence, shape and type is checked against the spec before any is loaded; what
//! lies in quantized tensors (permutations, group tables, scales) is checked on loading. Models without quantized tensors
//! stay in the mapped files; of others, nothing refers to the files once they are repacked.

mod fingerprint;
mod finite;
mod probe;
mod quantized;
mod read;
mod sketch;

pub use finite::check_finite;
pub use probe::Storage;
pub(crate) use read::dtype;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use exl_format::{GptqFormat, ModelFiles};
use exl_tensor::{DeviceProps, Gpu, GpuSketch, Weight, Weights};

use read::Reader;

use crate::model::{MemoryRequest, MemoryUse, Model, gpu_memory_for, memory_for};
use crate::rope::RopeOptions;
use crate::{Module, Result, Spec, WeightKey, detect, layout, parse};

/// How to open a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOptions {
    /// Context length and position scaling.
    pub rope: RopeOptions,
    /// Take an unknown architecture for Llama.
    pub assume_llama: bool,
    /// Threads that load, 0 for all.
    pub threads: usize,
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of tensors loaded.
    pub done: u64,
    /// Bytes of tensors in all.
    pub total: u64,
}

/// An opened and checked model whose weights are loaded on demand, so that a converter holds one
/// layer at a time.
#[derive(Debug)]
pub struct ModelSource {
    files: ModelFiles,
    spec: Arc<Spec>,
    layout: Vec<WeightKey>,
    storage: HashMap<String, Storage>,
    gptq: GptqFormat,
    threads: usize,
}

impl ModelSource {
    /// Opens a directory, reads its configuration and checks that every tensor is there with the
    /// right shape and type.
    ///
    /// # Errors
    /// Damaged or missing files, an unknown architecture, tensors that do not fit it.
    pub fn open(dir: &Path, options: &LoadOptions) -> Result<Self> {
        Self::from_files(ModelFiles::open(dir)?, options)
    }

    /// As [`ModelSource::open`], over files opened already.
    ///
    /// # Errors
    /// As [`ModelSource::open`].
    pub fn from_files(files: ModelFiles, options: &LoadOptions) -> Result<Self> {
        let arch = detect(files.config(), options.assume_llama)?;
        let spec = parse(files.config(), &options.rope, options.assume_llama)?;
        let files = files.named(&(arch.files)(&spec))?;
        let layout = layout(&spec);
        let storage = probe::probe(&files, &layout)?;
        let gptq = probe::gptq_format(&files, &storage)?;
        Ok(Self {
            files,
            spec: Arc::new(spec),
            layout,
            storage,
            gptq,
            threads: options.threads,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// Its files.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Every weight in model order.
    pub fn layout(&self) -> &[WeightKey] {
        &self.layout
    }

    /// Names of the tensors that belong to the model but not to what is run.
    pub fn towers(&self) -> Vec<&str> {
        let towers = self.spec.towers;
        let names = self.files.names();
        names
            .filter(|n| towers.iter().any(|t| n.starts_with(t)))
            .collect()
    }

    /// A weight of the layout by name.
    pub fn key(&self, name: &str) -> Option<&WeightKey> {
        self.layout.iter().find(|k| k.name == name)
    }

    /// How a weight is stored.
    pub fn storage(&self, key: &WeightKey) -> Storage {
        self.storage
            .get(&key.name)
            .copied()
            .unwrap_or(Storage::Dense)
    }

    /// Bytes a weight and its bias take in the files; none for a head that is the embedding.
    pub fn file_bytes(&self, key: &WeightKey) -> u64 {
        probe::file_bytes(&self.files, key, self.storage(key))
    }

    /// Loads a weight without its bias. A head that is the embedding is loaded from there.
    ///
    /// # Errors
    /// A damaged tensor, NaN or infinity where it is looked for (see [`check_finite`]).
    pub fn load_weight(&self, key: &WeightKey) -> Result<Weight> {
        self.reader().weight(key, self.storage(key))
    }

    /// Loads a weight and its bias under their names.
    ///
    /// # Errors
    /// As [`ModelSource::load_weight`].
    pub fn load_key(&self, key: &WeightKey, into: &mut Weights) -> Result<()> {
        into.insert(key.name.clone(), self.load_weight(key)?);
        if let Some(bias) = &key.bias {
            into.insert(bias.clone(), self.reader().bias(key, bias)?);
        }
        Ok(())
    }

    /// Loads the weights of one module.
    ///
    /// # Errors
    /// As [`ModelSource::load_weight`].
    pub fn load_module(&self, module: Module) -> Result<Weights> {
        let mut weights = Weights::new();
        for key in self.layout.iter().filter(|k| k.module == module) {
            self.load_key(key, &mut weights)?;
        }
        Ok(weights)
    }

    /// Loads both halves of a layer, and the constants its plans need.
    ///
    /// # Errors
    /// As [`ModelSource::load_weight`].
    pub fn load_layer(&self, layer: usize) -> Result<Weights> {
        let mut weights = self.constants();
        let halves = [Module::Attention(layer), Module::Mlp(layer)];
        for key in self.layout.iter().filter(|k| halves.contains(&k.module)) {
            self.load_key(key, &mut weights)?;
        }
        Ok(weights)
    }

    /// Looks at every value of an unquantized weight and its bias (loading only samples large
    /// ones). Quantized weights are not looked at here: their readers check the scales.
    ///
    /// # Errors
    /// [`crate::Error::NotFinite`] with the position of the first NaN or infinity.
    pub fn check_finite(&self, key: &WeightKey) -> Result<()> {
        let weight = match self.storage(key) {
            Storage::Dense => Some(format!("{}.weight", key.name)),
            _ => None,
        };
        let mut names = weight.into_iter().chain(key.bias.clone());
        names.try_for_each(|name| check_finite(&self.files.tensor(&name)?))
    }

    /// The weights that are in no file: rope tables.
    pub fn constants(&self) -> Weights {
        let mut weights = Weights::new();
        for (i, rope) in self.spec.ropes.iter().enumerate() {
            weights.insert(Spec::rope_weight(i), Weight::constant(&rope.inv_freq));
        }
        weights
    }

    /// Memory needed to run the model, with the weights at their size in the files.
    pub fn memory_for(&self, request: &MemoryRequest) -> MemoryUse {
        memory_for(&self.spec, self.total_bytes(), request)
    }

    /// Memory needed to run the model on a GPU: the sizes that loading and lowering use, from the
    /// headers, group tables and permutations of the files.
    ///
    /// # Errors
    /// A damaged tensor.
    pub fn gpu_memory_for(
        &self,
        props: &DeviceProps,
        request: &MemoryRequest,
    ) -> Result<MemoryUse> {
        gpu_memory_for(&self.spec, &self.sketch()?, props, request)
    }

    /// What every weight takes on a GPU.
    ///
    /// # Errors
    /// A damaged tensor.
    pub fn sketch(&self) -> Result<GpuSketch> {
        sketch::sketch(self)
    }

    /// Bytes of all weights in the files.
    pub fn total_bytes(&self) -> u64 {
        self.layout.iter().map(|k| self.file_bytes(k)).sum()
    }

    /// Loads everything, several weights at a time.
    ///
    /// # Errors
    /// As [`ModelSource::load_weight`]; the first in model order.
    pub fn load(&self, progress: &(dyn Fn(Progress) + Sync)) -> Result<Model> {
        let model = self.load_while(&|at| {
            progress(at);
            ControlFlow::Continue(())
        })?;
        Ok(model.expect("nothing asked to stop"))
    }

    /// As [`ModelSource::load`]; `None` as soon as `progress`, called after each weight, says to
    /// stop.
    ///
    /// # Errors
    /// As [`ModelSource::load`].
    pub fn load_while(
        &self,
        progress: &(dyn Fn(Progress) -> ControlFlow<()> + Sync),
    ) -> Result<Option<Model>> {
        self.load_onto(None, progress)
    }

    /// As [`ModelSource::load_while`], with the weights on a GPU if there is one: host memory then
    /// holds no more than the weights on their way.
    ///
    /// # Errors
    /// As [`ModelSource::load`]; out of device memory.
    pub fn load_onto(
        &self,
        gpu: Option<&Gpu>,
        progress: &(dyn Fn(Progress) -> ControlFlow<()> + Sync),
    ) -> Result<Option<Model>> {
        let place = |name: &str, weight: &Arc<Weight>| -> Result<Arc<Weight>> {
            match gpu {
                Some(gpu) => Ok(Arc::new(gpu.upload(name, weight)?)),
                None => Ok(weight.clone()),
            }
        };
        let total = self.total_bytes();
        let done = Mutex::new(0);
        if progress(Progress { done: 0, total }).is_break() {
            return Ok(None);
        }
        if let Some(gpu) = gpu {
            gpu.reserve(self.sketch()?.weight_bytes())?;
        }
        let parts: Option<Vec<Weights>> = self.for_each_key(|key| {
            let mut loaded = Weights::new();
            // A head that is the embedding shares its memory below.
            if self.storage(key) != Storage::Tied {
                self.load_key(key, &mut loaded)?;
            }
            let mut part = Weights::new();
            for (name, weight) in loaded.iter() {
                part.insert_shared(name, place(name, weight)?);
            }
            drop(loaded);
            // Held over the call, so that the figures only grow.
            let mut done = done.lock().expect("no holder of this lock panics");
            *done += self.file_bytes(key);
            let go_on = progress(Progress { done: *done, total }).is_continue();
            Ok(go_on.then_some(part))
        })?;
        let Some(parts) = parts else { return Ok(None) };
        let mut weights = Weights::new();
        for (name, weight) in self.constants().iter() {
            weights.insert_shared(name, place(name, weight)?);
        }
        for part in &parts {
            for (name, weight) in part.iter() {
                weights.insert_shared(name, weight.clone());
            }
        }
        self.share_tied_head(&mut weights);
        if let Some(gpu) = gpu {
            gpu.finish_loading()?;
        }
        Ok(Some(Model::from_parts(self.spec.clone(), weights)))
    }

    fn reader(&self) -> Reader<'_> {
        let quantized = |s: &Storage| matches!(s, Storage::Exl2 | Storage::Gptq);
        Reader {
            files: &self.files,
            gptq: self.gptq,
            keep_mapped: !self.storage.values().any(quantized),
        }
    }

    /// One memory for a head that is the embedding.
    fn share_tied_head(&self, weights: &mut Weights) {
        let head = &self.spec.head.linear.key;
        if self.storage.get(head) == Some(&Storage::Tied)
            && let Some(table) = weights.get(&self.spec.embed.key).cloned()
        {
            weights.insert_shared(head.clone(), table);
        }
    }

    /// Runs `load` for every key on several threads; results in model order, or `None` when one
    /// of them was.
    fn for_each_key<T: Send>(
        &self,
        load: impl Fn(&WeightKey) -> Result<Option<T>> + Sync,
    ) -> Result<Option<Vec<T>>> {
        let keys: Vec<&WeightKey> = self.layout.iter().collect();
        let results: Vec<Mutex<Option<Result<Option<T>>>>> =
            keys.iter().map(|_| Mutex::new(None)).collect();
        let (next, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
        let worker = || {
            while !ended.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(key) = keys.get(i) else { break };
                let result = load(key);
                ended.fetch_or(!matches!(result, Ok(Some(_))), Ordering::Relaxed);
                *results[i].lock().expect("no holder of this lock panics") = Some(result);
            }
        };
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.threads == 0 { all } else { self.threads };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(keys.len()) {
                scope.spawn(worker);
            }
            worker();
        });
        // Those after the first that ended it may not have been started.
        let taken = results.into_iter();
        let started =
            taken.filter_map(|slot| slot.into_inner().expect("no holder of this lock panics"));
        let all: Result<Vec<Option<T>>> = started.collect();
        Ok(all?.into_iter().collect())
    }
}
