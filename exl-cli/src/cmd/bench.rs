//! `exl bench`: how fast a model runs here, and how far that is from what memory allows.

mod jobs;
mod measure;
mod plot;
mod profile;
mod report;

use crate::args::BenchArgs;
use crate::failure::Usage;
use crate::machine;
use crate::memory::Taken;
use crate::session;
use crate::signal::{self, StopFlag};
use crate::synth::{self, Recipe, Shape};
use crate::ui::{self, Ui};
use anyhow::{Context, Result};
use jobs::JobSpeed;
use measure::{Decode, Prefill, Settings};
use profile::Profile;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Everything measured; its JSON is the contract of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    model: String,
    threads: usize,
    activations: &'static str,
    deterministic: bool,
    cache: String,
    /// Bytes of weights that a decode step reads.
    weight_bytes: u64,
    /// Bytes of the checkpoint's tensors.
    checkpoint_bytes: u64,
    read_bandwidth_gb_s: f64,
    load_seconds: f64,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    jobs: Vec<JobSpeed>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profiles: Vec<Profile>,
    /// Resident bytes after the measurements.
    memory_bytes: u64,
    /// Most resident bytes since loading began.
    memory_peak_bytes: u64,
    cache_bytes: u64,
    /// The GPU's memory after the measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory: Option<Taken>,
}

pub(crate) fn run(args: &BenchArgs, ui: &Ui) -> Result<()> {
    let settings = settings(args);
    let gpu = session::gpu(args.compute.device.device, ui)?;
    let stop = signal::stop_flag()?;
    let subject = Subject::prepare(args, &stop, ui)?;
    let threads = session::threads(&args.compute.device);
    ui.note("measuring the memory's bandwidth");
    let bandwidth = match &gpu {
        Some(gpu) => gpu.memory_bandwidth()?,
        None => machine::read_bandwidth(threads),
    };
    machine::reset_peak();
    let report = measure::measure(
        &subject.dir,
        (&settings, gpu.as_ref()),
        bandwidth,
        &stop,
        ui,
    )?;
    let report = Report {
        model: subject.name.clone(),
        ..report
    };
    // First, so that they are there when a file cannot be written.
    if args.json {
        ui::print_json(&report)?;
    } else {
        ui::print(&report::text(&report))?;
    }
    if let Some(path) = &args.out {
        write(path, &report::markdown(&report))?;
    }
    if let Some(path) = &args.plot {
        write(path, &plot::svg(&report)?)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn settings(args: &BenchArgs) -> Settings {
    Settings {
        prefill: args.prefill.clone(),
        batch: args.batch.clone(),
        context: args.context.clone(),
        cache: args.cache,
        steps: args.steps,
        repeats: args.repeats,
        profile: args.profile,
        jobs: args.jobs,
        compute: args.compute.clone(),
        load: args.load,
    }
}

/// The model to measure; a temporary one is removed in the end.
struct Subject {
    dir: PathBuf,
    name: String,
    temporary: bool,
}

impl Subject {
    fn prepare(args: &BenchArgs, stop: &StopFlag, ui: &Ui) -> Result<Self> {
        let Some(shape) = &args.synthetic else {
            let dir = args
                .model
                .clone()
                .ok_or_else(|| Usage("name a model with -m".to_owned()))?;
            let name = dir.display().to_string();
            return Ok(Self {
                dir,
                name,
                temporary: false,
            });
        };
        let (shape, recipe) = (Shape::named(shape)?, Recipe::named(&args.recipe)?);
        let name = format!("{} (random weights, recipe {})", shape.name, args.recipe);
        let dir = args.keep.clone().unwrap_or_else(|| {
            std::env::temp_dir().join(format!("exl-bench-{}", std::process::id()))
        });
        // Made first, so that a failure while writing removes the temporary files as well.
        let subject = Self {
            dir,
            name,
            temporary: args.keep.is_none(),
        };
        let threads = session::threads(&args.compute.device);
        synth::write_checkpoint((&shape, recipe), &subject.dir, threads, stop, ui)?;
        Ok(subject)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if self.temporary {
            // The system clears its temporary folder anyway.
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
