//! The quantizing pass of one bitrate.

use std::collections::HashMap;

use exl_format::{Exl2Builder, Exl2Linear};
use exl_models::{Module, WeightKey};
use exl_tensor::Weights;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use rayon::prelude::*;

use super::logits::Head;
use super::machine::{Machine, dense, padded};
use super::measurement::Measurement;
use super::original::Original;
use super::sites::{Rows, STOPS, Site, Walk, embed, head_solver};
use super::solver::{Rows as Judges, Solver};
use super::{Event, Job, Target};
use crate::resume::{Journal, Stored};
use crate::{Error, KlScore, Layout, Matrix, Part, Quantized, Result};

/// What the pass knows about a linear once it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct LinearStats {
    /// Relative output error on the rows fitted to.
    pub(crate) train_loss: f64,
    /// Relative output error on the hold-out rows.
    pub(crate) holdout_loss: f64,
    /// Damping used.
    pub(crate) damping: f64,
    /// Groups whose scales fell below the format's smallest.
    pub(crate) underflows: usize,
}

/// The rows that judge, as the original model sees them after its last layer.
#[derive(Debug)]
pub(super) struct Judge {
    pub(super) tokens: Vec<Vec<u32>>,
    pub(super) hidden: Rows,
}

impl Judge {
    /// Runs the original over the hold-out rows.
    pub(super) fn new(job: &mut Job<'_>) -> Result<Self> {
        let all = &job.calibration.rows;
        let mut tokens: Vec<Vec<u32>> = all
            .iter()
            .enumerate()
            .filter(|(r, _)| Part::of_row(*r) == Part::HoldOut)
            .map(|(_, row)| row.clone())
            .collect();
        if tokens.is_empty() {
            tokens.extend(all.last().cloned());
        }
        let spec = job.source.spec().clone();
        let length = job.calibration.length();
        let mut machine = Machine::new(&spec, length, &job.device)?;
        let mut hidden = embed(&job.source, &mut machine, &tokens)?;
        for layer in 0..spec.layers.len() {
            job.check()?;
            let mut walk = Walk::new(&job.source, &mut machine, layer, &mut hidden)?;
            for stop in STOPS {
                walk.pass(stop)?;
            }
            walk.finish()?;
        }
        Ok(Self { tokens, hidden })
    }
}

/// Quantizes every linear of a target into its journal and scores the result.
pub(super) fn quantize(
    job: &mut Job<'_>,
    target: &Target,
    measurement: &Measurement,
    journal: &Journal,
    judge: &Judge,
) -> Result<KlScore> {
    let spec = job.source.spec().clone();
    let mut machine = Machine::new(&spec, job.calibration.length(), &job.device)?;
    let mut hidden = embed(&job.source, &mut machine, &job.calibration.rows)?;
    // With all in the journal, nothing is rounded.
    let mut original = match target.layouts.keys().all(|name| journal.has(name)) {
        true => None,
        false => Some(Original::new(job)?),
    };
    let mut pass = Pass {
        target,
        measurement,
        journal,
    };
    for layer in 0..spec.layers.len() {
        job.progress(layer, spec.layers.len() + 1);
        let mut walk = Walk::new(&job.source, &mut machine, layer, &mut hidden)?;
        let mut beside = match &mut original {
            Some(original) => Some(original.layer(layer, walk.weights.clone())?),
            None => None,
        };
        for stop in STOPS {
            job.check()?;
            let needed = |site: &Site| !site.linears.iter().all(|n| journal.has(n));
            let sites = stop.sites(&spec.layers[layer]).into_iter();
            let sites: Vec<(Site, bool)> = sites.map(|s| (s.clone(), needed(&s))).collect();
            walk.solve(stop, &sites, beside.as_mut(), |weights, found| {
                job.check()?;
                pass.site(job, weights, &found.site.linears, found.solver)
            })?;
        }
        walk.finish()?;
        if let Some(beside) = beside {
            beside.walk.finish()?;
        }
    }
    job.check()?;
    let mut weights = job.source.load_module(Module::Head)?;
    let name = spec.head.linear.key.clone();
    if target.layouts.contains_key(&name) {
        let mut solver = None;
        if !journal.has(&name) {
            let at = (&mut machine, &hidden);
            solver = Some(head_solver(&job.source, at, original.as_mut())?);
        }
        let solver = solver.as_mut().map(|s| s.as_mut() as &mut dyn Solver);
        pass.site(job, &mut weights, &[name], solver)?;
    }
    drop((machine, original));
    score(job, &weights, &hidden, judge)
}

/// Divergence on the hold-out rows, whose hidden states the pass has carried along.
pub(super) fn score(
    job: &mut Job<'_>,
    weights: &Weights,
    hidden: &Rows,
    judge: &Judge,
) -> Result<KlScore> {
    let spec = job.source.spec().clone();
    let mut head = Head::new(&spec, job.calibration.length(), &job.device)?;
    let original = job.source.load_module(Module::Head)?;
    let (right, ours) = (head.bind(&original)?, head.bind(weights)?);
    let held: Vec<&Vec<f32>> = match hidden.len() {
        n if n < 8 => hidden.iter().skip(n.saturating_sub(1)).collect(),
        _ => hidden
            .iter()
            .enumerate()
            .filter(|(r, _)| Part::of_row(*r) == Part::HoldOut)
            .map(|x| x.1)
            .collect(),
    };
    let mut score = KlScore::new();
    for ((reference, quantized), tokens) in judge.hidden.iter().zip(held).zip(&judge.tokens) {
        job.check()?;
        head.score(&mut score, (&right, reference), (&ours, quantized), tokens)?;
    }
    if !score.is_finite() {
        let model = job.source.files().dir().display().to_string();
        let what = "the original or the quantized model computes NaN or infinity on the \
                    calibration rows";
        return Err(Error::numeric(model, what));
    }
    Ok(score)
}

struct Pass<'a> {
    target: &'a Target,
    measurement: &'a Measurement,
    journal: &'a Journal,
}

impl Pass<'_> {
    /// Quantizes the linears of one input, or takes them from the journal, and puts their decoded
    /// weights into `weights`.
    fn site(
        &mut self,
        job: &mut Job<'_>,
        weights: &mut Weights,
        names: &[String],
        mut solver: Option<&mut dyn Solver>,
    ) -> Result<()> {
        let mut damped = false;
        for name in names {
            let key = job
                .source
                .key(name)
                .expect("linears come from the layout")
                .clone();
            let decoded = match (self.journal.load(name)?, &mut solver) {
                (Some(stored), _) => {
                    self.same_layout(name, &stored.linear)?;
                    decode(&stored.linear)
                }
                (None, Some(solver)) => {
                    job.check()?;
                    let weight = weights
                        .get(name)
                        .expect("the layer has all its linears")
                        .clone();
                    let matrix = padded(name, &weight)?;
                    if !damped {
                        let known = self.measurement.linear(name);
                        solver.set_damping(name, known.map_or(0.02, |l| l.damping))?;
                        damped = true;
                    }
                    self.linear(job, &key, weights, &matrix, &mut **solver)?
                }
                (None, None) => decode(&self.journal.stored(name)?.linear),
            };
            weights.insert(name.clone(), dense(name, &decoded, key.shape[0])?);
        }
        Ok(())
    }

    /// Refuses what the journal holds when it was made for another layout.
    fn same_layout(&self, name: &str, linear: &Exl2Linear) -> Result<()> {
        let wanted = self.target.layouts[name].groups().iter();
        let found = linear
            .groups
            .iter()
            .map(|g| (g.bits as usize, g.rows as usize));
        if wanted.map(|g| (g.bits as usize, g.rows)).eq(found) {
            return Ok(());
        }
        Err(Error::Journal {
            file: self.journal.dir().to_owned(),
            what: format!("holds {name} in another layout; discard it with --restart"),
        })
    }

    fn linear(
        &self,
        job: &mut Job<'_>,
        key: &WeightKey,
        weights: &Weights,
        matrix: &Matrix,
        solver: &mut dyn Solver,
    ) -> Result<Matrix> {
        let name = &key.name;
        let layout = &self.target.layouts[name];
        let rounded = solver.round(name, matrix, layout, &[Judges::Train, Judges::HoldOut])?;
        let q = rounded.quantized;
        let relative = |(loss, energy): (f64, f64)| loss / energy.max(f64::MIN_POSITIVE);
        let (damping, retries) = solver.damping();
        let stats = LinearStats {
            train_loss: relative(rounded.losses[0]),
            holdout_loss: relative(rounded.losses[1]),
            damping,
            underflows: q.stats.underflows,
        };
        let bias = match &key.bias {
            Some(bias) => Some(half_bias(weights, bias, q.outputs)?),
            None => None,
        };
        let linear = pack(name, &q, bias)?;
        self.journal.store(name, &Stored { linear, stats })?;
        job.emit(Event::Linear {
            name: name.clone(),
            bits_per_weight: Some(layout.bpw(q.outputs)),
            relative_error: Some(stats.holdout_loss.sqrt()),
        });
        if retries > 0 {
            let what = format!("{name}: its Hessian needed a damping of {damping:.3}");
            job.emit(Event::Notice(what));
        }
        Ok(rounded.decoded)
    }
}

/// A bias as bits of binary16, padded with zeros.
fn half_bias(weights: &Weights, name: &str, outputs: usize) -> Result<Vec<u16>> {
    let weight = weights
        .get(name)
        .expect("biases are loaded with their layer");
    let mut bias = super::write::halves(name, &weight.to_f32(name)?)?;
    bias.resize(outputs, 0);
    Ok(bias)
}

/// Codes and scales in the layout of files.
pub(super) fn pack(name: &str, q: &Quantized, bias: Option<Vec<u16>>) -> Result<Exl2Linear> {
    let n = q.outputs;
    let mut builder = Exl2Builder::new(n);
    let mut row = 0;
    for (g, group) in q.layout.groups().iter().enumerate() {
        let codes = &q.codes[row * n..(row + group.rows) * n];
        let scales = &q.scale_codes[g * n..][..n];
        builder.push_group(group.bits, codes, scales, q.scale_max[g])?;
        row += group.rows;
    }
    Ok(builder.finish(name, &q.order, bias)?)
}

/// The weights a packed linear decodes to, `[inputs, outputs]`.
pub(super) fn decode(linear: &Exl2Linear) -> Matrix {
    let n = linear.outputs;
    let mut out = Matrix::zeros(linear.inputs, n);
    let mut rows: Vec<Option<&mut [f32]>> = out.data.chunks_exact_mut(n).map(Some).collect();
    let perm = linear.perm();
    let mut perm = perm.iter();
    let mut take = |count: usize| -> Vec<&mut [f32]> {
        let features = perm.by_ref().take(count);
        features.filter_map(|&f| rows[f as usize].take()).collect()
    };
    let groups: Vec<Vec<&mut [f32]>> = linear
        .groups
        .iter()
        .map(|g| take(g.rows as usize))
        .collect();
    groups.into_par_iter().enumerate().for_each(|(g, rows)| {
        let decoded = linear.group_f16(g);
        for (row, from) in rows.into_iter().zip(decoded.chunks_exact(n)) {
            let from: &[half::f16] = from.reinterpret_cast();
            from.convert_to_f32_slice(row);
        }
    });
    out
}

/// Layouts by linear.
pub(super) type Layouts = HashMap<String, Layout>;
