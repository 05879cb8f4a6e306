//! The whole conversion: measure, allocate, quantize, write, check.
//!
//! One measurement serves every bitrate. The model streams through layer by layer: in memory are
//! one layer, its Hessians, and the hidden states of the calibration rows; while measuring also the
//! packed weights of up to twelve layers and the hidden states of changed models.

mod budget;
mod compare;
mod device;
mod identity;
mod logits;
mod machine;
mod measurement;
mod original;
mod perturb;
mod place;
mod plan;
mod probe;
mod quantize;
mod sites;
mod solver;
mod verify;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use exl_models::{LoadOptions, ModelSource, Storage};
use exl_tensor::Gpu;

pub use compare::{CompareOptions, ComparedPosition, Comparison, Likeliest, compare};
pub use measurement::{LayoutPoint, LinearMeasurement, MEASUREMENT_VERSION, Measurement};
pub use plan::{PlanPoint, bits_within, plan};
pub use verify::{Check, VerifyOptions, stated_quality, verify_quality};

pub(crate) use quantize::LinearStats;

use crate::calib::Calibration;
use crate::report::ConvertReport;
use crate::resume::{Settings, Work};
use crate::{Error, Result};
use device::Device;
use quantize::{Judge, Layouts};

/// Most bits per weight that can be asked for: eight in groups of 32 rows, with their scales and the
/// permutation, are 8.13 and a little.
pub const MOST_BITS: f64 = 8.2;
/// Which way of rounding a journal's linears are made by.
const ROUNDING: u32 = 2;
/// Largest number of inputs: permutations are stored in 16 bits.
const MAX_INPUTS: usize = 1 << 16;

/// What to convert and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The model: a directory with unquantized safetensors weights.
    pub source: PathBuf,
    /// Where the result goes: the directory itself for one bitrate, `OUT/4.0bpw` for several.
    pub out: PathBuf,
    /// Average bits per weight of the decoder's linears, 2 to [`MOST_BITS`] each. The result's files are never
    /// larger than with these bits and a head of [`ConvertOptions::head_bits`].
    pub bits: Vec<f64>,
    /// Fixed size of the head: 2, 3, 4, 5, 6, 8, or 16 to leave it unquantized. With `None` the
    /// allocation decides, within the total size that a 6-bit head would give.
    pub head_bits: Option<u32>,
    /// Rows of the calibration that are measured.
    pub measure_rows: usize,
    /// Tokens of them.
    pub measure_length: usize,
    /// Use this measurement.
    pub measurement: Option<PathBuf>,
    /// Write the measurement here too.
    pub save_measurement: Option<PathBuf>,
    /// Stop after measuring.
    pub measure_only: bool,
    /// Directory of the journal.
    pub work: PathBuf,
    /// Discard a journal that is there.
    pub restart: bool,
    /// The headers of the files count, so that a result is never larger than its bits say. Of models
    /// of a few thousand weights they are most of it.
    pub count_headers: bool,
    /// Largest file of the result in bytes.
    pub shard_bytes: u64,
    /// Decode what was written and compare.
    pub verify: bool,
    /// Promise on memory, in bytes.
    pub max_ram: Option<u64>,
    /// Threads, 0 for all.
    pub threads: usize,
    /// The GPU that computes; `None` for the CPU.
    pub gpu: Option<Gpu>,
    /// Promise on device memory, in bytes.
    pub max_vram: Option<u64>,
    /// How the model is read.
    pub load: LoadOptions,
}

impl ConvertOptions {
    /// The defaults for converting `source` into `out`.
    pub fn new(source: impl Into<PathBuf>, out: impl Into<PathBuf>, bits: Vec<f64>) -> Self {
        // Without a trailing separator, or the journal would lie inside the result.
        let out: PathBuf = out.into().components().collect();
        let work = journal_beside(&out);
        Self {
            source: source.into(),
            out,
            bits,
            head_bits: None,
            measure_rows: 16,
            measure_length: usize::MAX,
            measurement: None,
            save_measurement: None,
            measure_only: false,
            work,
            restart: false,
            count_headers: true,
            shard_bytes: 8 << 30,
            verify: true,
            max_ram: None,
            threads: 0,
            gpu: None,
            max_vram: None,
            load: LoadOptions::default(),
        }
    }
}

/// `OUT.work`; a result in `.` or `..` has a name too.
fn journal_beside(out: &Path) -> PathBuf {
    let mut work = match out.file_name() {
        Some(_) => out.to_owned(),
        None => out.canonicalize().unwrap_or_else(|_| out.to_owned()),
    }
    .into_os_string();
    work.push(".work");
    work.into()
}

/// What a conversion is doing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    /// Curves of bits against error, layer by layer.
    Measure,
    /// Sensitivities: what a perturbed linear does to the predictions.
    Perturb,
    /// Quantizing for this many bits per weight.
    Quantize(f64),
    /// Writing the checkpoint of this many bits per weight.
    Write(f64),
}

/// Told while converting.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A stage begins.
    Stage(Stage),
    /// Steps of the stage that are done.
    Progress {
        /// Done.
        done: usize,
        /// In all.
        total: usize,
    },
    /// A linear was measured or quantized.
    Linear {
        /// Its key.
        name: String,
        /// Size, when it was quantized.
        bits_per_weight: Option<f64>,
        /// Relative output error on the hold-out rows, when it was quantized.
        relative_error: Option<f64>,
    },
    /// Something the user should know.
    Notice(String),
}

/// State shared by the stages.
pub(crate) struct Job<'a> {
    pub(crate) options: &'a ConvertOptions,
    pub(crate) source: ModelSource,
    pub(crate) calibration: &'a Calibration,
    pub(crate) model_hash: String,
    device: Device,
    events: &'a mut dyn FnMut(Event),
    stop: &'a AtomicBool,
}

/// One bitrate.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) bits: f64,
    pub(crate) name: String,
    pub(crate) out: PathBuf,
    pub(crate) layouts: Layouts,
    pub(crate) predicted: f64,
}

impl Job<'_> {
    /// Stops when the flag is set.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    pub(crate) fn emit(&mut self, event: Event) {
        (self.events)(event);
    }

    pub(crate) fn progress(&mut self, done: usize, total: usize) {
        self.emit(Event::Progress { done, total });
    }
}

/// Converts a model. Returns a report per bitrate in the order asked for.
///
/// The journal in [`ConvertOptions::work`] makes the same call go on where an interrupted one
/// stopped, with the same result to the byte; it is removed at the end.
///
/// # Errors
/// Anything that makes the model, the calibration data, the options or the disk unusable;
/// [`Error::Interrupted`] after `stop` was set.
pub fn convert(
    options: &ConvertOptions,
    calibration: &Calibration,
    events: &mut (dyn FnMut(Event) + Send),
    stop: &AtomicBool,
) -> Result<Vec<ConvertReport>> {
    prepared(
        options,
        calibration,
        events,
        stop,
        |job, measurement, work| {
            let mut reports = Vec::new();
            if !options.measure_only {
                let mut judge: Option<Judge> = None;
                for &bits in &options.bits {
                    reports.push(one(job, bits, measurement, work, &mut judge)?);
                }
            }
            Ok(reports)
        },
    )
}

/// Checks everything, measures or takes a measurement, and goes on with `then`; the journal is
/// removed when that is done.
fn prepared<T: Send>(
    options: &ConvertOptions,
    calibration: &Calibration,
    events: &mut (dyn FnMut(Event) + Send),
    stop: &AtomicBool,
    then: impl FnOnce(&mut Job<'_>, &Measurement, &Work) -> Result<T> + Send,
) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build()
        .map_err(|e| Error::Option {
            option: "--threads",
            what: e.to_string(),
        })?;
    pool.install(|| run(options, calibration, events, stop, then))
}

fn run<T>(
    options: &ConvertOptions,
    calibration: &Calibration,
    events: &mut (dyn FnMut(Event) + Send),
    stop: &AtomicBool,
    then: impl FnOnce(&mut Job<'_>, &Measurement, &Work) -> Result<T>,
) -> Result<T> {
    let source = ModelSource::open(&options.source, &options.load)?;
    check(options, calibration, &source)?;
    let model_hash = identity::model_hash(source.files())?;
    let mut job = Job {
        options,
        source,
        calibration,
        model_hash,
        device: Device::of(options),
        events: &mut |e| events(e),
        stop,
    };
    let given = match &options.measurement {
        Some(path) => Some(Measurement::read(path, &job.model_hash)?),
        None => None,
    };
    budget::check_bits(&job)?;
    if calibration.rows.len() < 8 {
        let what = "fewer than 8 calibration rows: none is held out, so the divergence reported is \
                    that of a row that was fitted to";
        job.emit(Event::Notice(what.to_owned()));
    }
    let settings = settings(&job, given.as_ref());
    let resumed = Work::exists(&options.work) && !options.restart;
    place::check_outputs(options, resumed)?;
    let work = Work::open(&options.work, &settings, options.restart)?;
    if resumed {
        let what = format!("going on from what {} holds", options.work.display());
        job.emit(Event::Notice(what));
    }
    let measurement = match given {
        Some(given) => given,
        None => measurement(&mut job, &work)?,
    };
    if let Some(path) = &options.save_measurement {
        measurement.write(path)?;
    }
    let done = then(&mut job, &measurement, &work)?;
    work.remove()?;
    Ok(done)
}

/// One bitrate from allocation to the finished checkpoint.
fn one(
    job: &mut Job<'_>,
    bits: f64,
    measurement: &Measurement,
    work: &Work,
    judge: &mut Option<Judge>,
) -> Result<ConvertReport> {
    let begin = std::time::Instant::now();
    let target = budget::target(job, bits, measurement)?;
    let journal = work.target(&target.name)?;
    if let Some(report) = write::finished(job, &target, &journal)? {
        return Ok(report);
    }
    job.emit(Event::Stage(Stage::Quantize(bits)));
    if judge.is_none() {
        *judge = Some(Judge::new(job)?);
    }
    let judge = judge.as_ref().expect("set above");
    let score = quantize::quantize(job, &target, measurement, &journal, judge)?;
    job.emit(Event::Stage(Stage::Write(bits)));
    let mut report = write::write(job, &target, &journal, &score)?;
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

/// The journal's measurement, or a new one.
fn measurement(job: &mut Job<'_>, work: &Work) -> Result<Measurement> {
    let path = work.measurement();
    if path.is_file() {
        return Measurement::read(&path, &job.model_hash);
    }
    job.emit(Event::Stage(Stage::Measure));
    let found = probe::measure(job, work)?;
    found.write(&path)?;
    Ok(found)
}

fn settings(job: &Job<'_>, given: Option<&Measurement>) -> Settings {
    let o = job.options;
    // By content: another file may take its name.
    let given = given.map(|m| {
        let hash = blake3::hash(exl_format::to_json_text(m).as_bytes());
        hash.to_hex()[..16].to_owned()
    });
    Settings {
        converter: concat!("exl ", env!("CARGO_PKG_VERSION")).to_owned(),
        model: job.model_hash.clone(),
        calibration: job.calibration.hash(),
        options: format!(
            "rounding {ROUNDING}, head bits {:?}, measured {} x {}, measurement {given:?}, rope {:?}",
            o.head_bits, o.measure_rows, o.measure_length, o.load.rope
        ),
        gpu: o.gpu.is_some(),
    }
}

fn check(options: &ConvertOptions, calibration: &Calibration, source: &ModelSource) -> Result<()> {
    let bad = |option, what: String| Err(Error::Option { option, what });
    for &bits in &options.bits {
        if !(2.0..=MOST_BITS).contains(&bits) {
            let what = format!("{bits} is outside 2.0 to {MOST_BITS}");
            return bad("--bits", what);
        }
    }
    for (i, bits) in options.bits.iter().enumerate() {
        if options.bits[..i].contains(bits) {
            return bad("--bits", format!("{bits} is named twice"));
        }
    }
    if options.bits.is_empty() && !options.measure_only {
        return bad("--bits", "at least one bitrate is needed".into());
    }
    if let Some(bits) = options.head_bits.filter(|&b| b != 16) {
        crate::head_recipe(bits)?;
    }
    if options.measure_rows == 0 {
        return bad("--measure-rows", "at least one row is needed".into());
    }
    if options.measure_length < 2 {
        return bad("--measure-length", "at least two tokens are needed".into());
    }
    let length = calibration.length();
    if calibration.rows.is_empty() || length < 2 {
        return bad("--rows", "at least one row of two tokens is needed".into());
    }
    if length > source.spec().context {
        let limit = source.spec().context;
        return bad(
            "--length",
            format!("{length} is beyond the model's {limit} positions"),
        );
    }
    calibration.check_vocabulary(source.spec().vocab)?;
    place::check_source(options, source)?;
    for key in source.layout() {
        if source.storage(key) != Storage::Tied {
            source.check_finite(key)?;
        }
        if !key.is_linear() {
            continue;
        }
        let inputs = key.shape[1];
        if !inputs.is_multiple_of(32) || inputs > MAX_INPUTS {
            return bad(
                "SRC",
                format!(
                    "{} has {inputs} inputs; the format takes multiples of 32 up to {MAX_INPUTS}",
                    key.name
                ),
            );
        }
        if matches!(source.storage(key), Storage::Exl2 | Storage::Gptq) {
            return bad(
                "SRC",
                format!("{} is already quantized; give the original model", key.name),
            );
        }
    }
    budget::check_memory(options, calibration, source)?;
    budget::check_device_memory(options, calibration, source)
}
