//! Whether a checkpoint is what its `quality.json` says.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use exl_format::quality::{Evaluation, TensorQuality};
use exl_format::{Exl2Linear, Quality};
use exl_models::{LoadOptions, ModelSource, Module};
use exl_tensor::{Gpu, Weights};
use serde::Serialize;

use super::device::Device;
use super::machine::{Machine, dense, padded};
use super::quantize::{Judge, decode, score};
use super::sites::{STOPS, Site, Walk, embed, head_solver};
use super::solver::{Rows as Judges, Solver};
use super::{ConvertOptions, Event, Job, identity};
use crate::calib::Calibration;
use crate::layout::{GroupSpec, Layout};
use crate::{Error, KlScore, Result};

/// How far a recomputed loss or divergence may be from the stated one, as a share of it: devices
/// sum in different orders. On the machine that converted, they agree to the last digits.
const TOLERANCE: f64 = 0.01;
/// How far the share of equal top tokens may be off.
const TOP1_TOLERANCE: f64 = 0.002;

/// What is verified, and how.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// The checkpoint, with its `quality.json`.
    pub dir: PathBuf,
    /// The model it was made of.
    pub original: PathBuf,
    /// How both are read.
    pub load: LoadOptions,
    /// Threads, 0 for all.
    pub threads: usize,
    /// The GPU that computes; `None` for the CPU.
    pub gpu: Option<Gpu>,
}

/// One statement of `quality.json` and what was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What it is about, such as `evaluation.mean_kl`.
    pub what: String,
    /// The value in the file.
    pub stated: String,
    /// The value recomputed.
    pub found: String,
    /// Whether they agree.
    pub holds: bool,
}

impl Check {
    fn same(what: String, stated: impl ToString, found: impl ToString) -> Self {
        let (stated, found) = (stated.to_string(), found.to_string());
        Self {
            holds: stated == found,
            what,
            stated,
            found,
        }
    }

    fn near(what: String, stated: f64, found: f64, tolerance: f64) -> Self {
        Self {
            holds: (found - stated).abs() <= tolerance,
            what,
            stated: format!("{stated:.9}"),
            found: format!("{found:.9}"),
        }
    }
}

/// The report beside a checkpoint.
///
/// # Errors
/// [`Error::Option`] when there is none; as [`Quality::read`].
pub fn stated_quality(dir: &Path) -> Result<Quality> {
    Quality::read(&dir.join(Quality::FILE))?.ok_or_else(|| Error::Option {
        option: "--verify",
        what: format!("{} has no {}", dir.display(), Quality::FILE),
    })
}

/// Recomputes what `quality.json` states: sizes from the files, losses and the divergence from both
/// models and `calibration`, which must be the text the checkpoint was made with.
///
/// # Errors
/// Files that cannot be read; [`Error::Option`] when the calibration is another one;
/// [`Error::Interrupted`] after `stop` was set.
pub fn verify_quality(
    options: &VerifyOptions,
    calibration: &Calibration,
    events: &mut (dyn FnMut(Event) + Send),
    stop: &AtomicBool,
) -> Result<Vec<Check>> {
    let stated = stated_quality(&options.dir)?;
    let hash = calibration.hash();
    if hash != stated.calibration.hash {
        let c = &stated.calibration;
        return Err(Error::Option {
            option: "--cal",
            what: format!(
                "the checkpoint was made with other text: {} rows of {} tokens of {}, hash {}; \
                 this one has {hash}",
                c.rows, c.length, c.dataset, c.hash
            ),
        });
    }
    let quantized = ModelSource::open(&options.dir, &options.load)?;
    let convert = ConvertOptions {
        threads: options.threads,
        gpu: options.gpu.clone(),
        load: options.load.clone(),
        ..ConvertOptions::new(&options.original, &options.dir, Vec::new())
    };
    let source = ModelSource::open(&options.original, &options.load)?;
    let mut job = Job {
        model_hash: identity::model_hash(source.files())?,
        source,
        calibration,
        device: Device::of(&convert),
        options: &convert,
        events: &mut |e| events(e),
        stop,
    };
    let mut checks = Vec::new();
    sizes(&stated, &quantized, &mut checks)?;
    let judge = Judge::new(&mut job)?;
    let mut recount = Recount {
        stated: &stated,
        quantized: &quantized,
        checks,
    };
    let found = recount.model(&mut job, &judge)?;
    recount.evaluation(&found);
    Ok(recount.checks)
}

/// Groups, bits and bytes of every tensor, and their sums.
fn sizes(stated: &Quality, quantized: &ModelSource, checks: &mut Vec<Check>) -> Result<()> {
    for tensor in &stated.tensors {
        let name = &tensor.name;
        let linear = Exl2Linear::read(quantized.files(), name)?;
        let group = |g: &exl_format::Group| GroupSpec {
            bits: g.bits,
            rows: g.rows as usize,
        };
        let layout = Layout::new(linear.groups.iter().map(group).collect())?;
        let bytes: usize = linear.to_tensors(name).iter().map(|t| t.data.len()).sum();
        let found = [
            ("groups", tensor.groups.clone(), layout.to_string()),
            (
                "bits",
                tensor.bits.to_string(),
                layout.bits(linear.outputs).to_string(),
            ),
            ("bytes", tensor.bytes.to_string(), bytes.to_string()),
        ];
        for (what, stated, found) in found {
            checks.push(Check::same(format!("{name}: {what}"), stated, found));
        }
    }
    checks.push(Check::same(
        "totals.bytes".to_owned(),
        stated.totals.bytes,
        quantized.files().total_bytes(),
    ));
    Ok(())
}

/// Goes through the quantized model as the conversion did.
struct Recount<'a> {
    stated: &'a Quality,
    quantized: &'a ModelSource,
    checks: Vec<Check>,
}

impl Recount<'_> {
    fn model(&mut self, job: &mut Job<'_>, judge: &Judge) -> Result<KlScore> {
        let spec = job.source.spec().clone();
        let mut machine = Machine::new(&spec, job.calibration.length(), &job.device)?;
        let mut hidden = embed(self.quantized, &mut machine, &job.calibration.rows)?;
        for layer in 0..spec.layers.len() {
            job.progress(layer, spec.layers.len() + 1);
            let original = job.source.load_layer(layer)?;
            let mut walk = Walk::new(self.quantized, &mut machine, layer, &mut hidden)?;
            for stop in STOPS {
                job.check()?;
                let sites = stop.sites(&spec.layers[layer]).into_iter();
                let sites: Vec<(Site, bool)> = sites.map(|s| (s, true)).collect();
                walk.solve(stop, &sites, None, |weights, found| {
                    let Some(solver) = found.solver else {
                        return Ok(());
                    };
                    for name in &found.site.linears {
                        self.linear(job, (name, &original), weights, &mut *solver)?;
                    }
                    Ok(())
                })?;
            }
            walk.finish()?;
        }
        let mut weights = self.quantized.load_module(Module::Head)?;
        let name = spec.head.linear.key.clone();
        if self.of(&name).is_some() {
            let at = (&mut machine, &hidden);
            let mut solver = head_solver(self.quantized, at, None)?;
            let original = job.source.load_module(Module::Head)?;
            self.linear(job, (&name, &original), &mut weights, solver.as_mut())?;
        }
        drop(machine);
        score(job, &weights, &hidden, judge)
    }

    fn of(&self, name: &str) -> Option<&TensorQuality> {
        self.stated.tensors.iter().find(|t| t.name == name)
    }

    /// Judges a linear on its inputs, and puts what it decodes to in place of its codes.
    fn linear(
        &mut self,
        job: &Job<'_>,
        (name, original): (&str, &Weights),
        weights: &mut Weights,
        solver: &mut dyn Solver,
    ) -> Result<()> {
        let Some(stated) = self.of(name).cloned() else {
            return Ok(());
        };
        let key = job.source.key(name).expect("linears come from the layout");
        let weight = original
            .get(name)
            .expect("a module is loaded with all its linears");
        let matrix = padded(name, weight)?;
        let decoded = decode(&Exl2Linear::read(self.quantized.files(), name)?);
        if (decoded.rows, decoded.cols) != (matrix.rows, matrix.cols) {
            let (rows, cols) = (matrix.rows, matrix.cols);
            return Err(Error::shape(
                format!("{name} against the original"),
                format!("[{rows}, {cols}]"),
                format!("[{}, {}]", decoded.rows, decoded.cols),
            ));
        }
        let losses = solver.judge(&matrix, &decoded, &[Judges::Train, Judges::HoldOut])?;
        let relative = |(loss, energy): (f64, f64)| loss / energy.max(f64::MIN_POSITIVE);
        for (what, stated, found) in [
            ("train_loss", stated.train_loss, relative(losses[0])),
            ("holdout_loss", stated.holdout_loss, relative(losses[1])),
        ] {
            let (what, tolerance) = (format!("{name}: {what}"), TOLERANCE * stated.abs());
            self.checks
                .push(Check::near(what, stated, found, tolerance));
        }
        weights.insert(name.to_owned(), dense(name, &decoded, key.shape[0])?);
        Ok(())
    }

    fn evaluation(&mut self, score: &KlScore) {
        let Some(stated) = self.stated.evaluation.clone() else {
            return;
        };
        let Evaluation {
            mean_kl,
            p99_kl,
            top1,
            perplexity,
            original_perplexity,
            tokens,
        } = stated;
        for (what, stated, found) in [
            ("mean_kl", mean_kl, score.mean_kl()),
            ("p99_kl", p99_kl, score.p99_kl()),
            ("perplexity", perplexity, score.perplexity()),
            (
                "original_perplexity",
                original_perplexity,
                score.reference_perplexity(),
            ),
        ] {
            let (what, tolerance) = (format!("evaluation.{what}"), TOLERANCE * stated.abs());
            self.checks
                .push(Check::near(what, stated, found, tolerance));
        }
        let what = "evaluation.top1".to_owned();
        self.checks
            .push(Check::near(what, top1, score.top1(), TOP1_TOLERANCE));
        let what = "evaluation.tokens".to_owned();
        self.checks
            .push(Check::same(what, tokens, score.positions()));
    }
}
