//! The measuring pass: one stream of the unquantized model gives curves and damping, then each
//! linear is perturbed by itself to see what it does to the predictions.

use exl_models::{Module, Spec};
use exl_tensor::Weights;

use super::machine::{Machine, padded};
use super::measurement::{LinearMeasurement, MEASUREMENT_VERSION, Measurement};
use super::perturb::{self, Perturbed};
use super::quantize::pack;
use super::sites::{STOPS, Walk, embed, head_inputs, linears_of};
use super::solver::{Moments, Rows as Judges, Solver};
use super::{Event, Job};
use crate::resume::Work;
use crate::{Layout, Matrix, Result};

/// Tokens per row of the sensitivity probe.
pub(super) const PROBE_LENGTH: usize = 512;
/// Positions of the sensitivity probe.
pub(super) const PROBE_POSITIONS: usize = 3072;
/// Layers probed at most; the others are interpolated.
pub(super) const PROBE_LAYERS: usize = 12;

/// Measures the model. Curves and sensitivities that `work` holds are not made again.
pub(super) fn measure(job: &mut Job<'_>, work: &Work) -> Result<Measurement> {
    let rows = spread(&job.calibration.rows, job.options.measure_rows);
    let length = job.options.measure_length.min(job.calibration.length());
    let rows: Vec<Vec<u32>> = rows.iter().map(|r| r[..length].to_vec()).collect();
    let spec = job.source.spec().clone();
    let mut machine = Machine::new(&spec, length, &job.device)?;
    let mut hidden = embed(&job.source, &mut machine, &rows)?;
    let mut survey = Survey::new(&spec, work);
    for layer in 0..spec.layers.len() {
        job.check()?;
        job.progress(layer, survey.steps);
        let mut walk = Walk::new(&job.source, &mut machine, layer, &mut hidden)?;
        for stop in STOPS {
            let layer_spec = &spec.layers[layer];
            let names = stop.linears(layer_spec);
            if survey.known(&names, layer)? {
                walk.visit(stop, |_, _| Ok(()))?;
                continue;
            }
            let mut moments = Moments::new(&job.device, stop.inputs(layer_spec))?;
            walk.visit(stop, |r, x| moments.add(r, x))?;
            let mut solver = moments.finish(&names[0])?;
            survey.site(job, (&names, layer), &walk.weights, solver.as_mut())?;
        }
        walk.finish()?;
    }
    job.progress(spec.layers.len(), survey.steps);
    let names = [spec.head.linear.key.clone()];
    if !survey.known(&names, spec.layers.len())? {
        let mut moments = Moments::new(&job.device, spec.hidden)?;
        head_inputs(&job.source, &mut machine, &hidden, |r, x| moments.add(r, x))?;
        let mut solver = moments.finish(&names[0])?;
        let head = job.source.load_module(Module::Head)?;
        let place = (&names[..], spec.layers.len());
        survey.site(job, place, &head, solver.as_mut())?;
    }
    drop(hidden);
    let mut found = Measurement {
        version: MEASUREMENT_VERSION,
        model: job.model_hash.clone(),
        calibration: job.calibration.hash(),
        rows: rows.len(),
        length,
        linears: std::mem::take(&mut survey.linears),
    };
    sensitivities(job, &rows, survey, &mut found)?;
    interpolate(job, &mut found);
    Ok(found)
}

/// What the pass over the layers has found so far.
struct Survey<'a> {
    work: &'a Work,
    /// Layers whose linears are perturbed; the head counts as one more layer and always is.
    probed: Vec<usize>,
    linears: Vec<LinearMeasurement>,
    perturbed: Vec<Perturbed>,
    /// Steps of the whole measurement: layers, head, perturbations.
    steps: usize,
}

impl<'a> Survey<'a> {
    fn new(spec: &Spec, work: &'a Work) -> Self {
        let mut probed = probe_layers(spec.layers.len());
        let perturbations: usize = probed.iter().map(|&l| linears_of(&spec.layers[l])).sum();
        probed.push(spec.layers.len());
        Self {
            work,
            probed,
            linears: Vec::new(),
            perturbed: Vec::new(),
            steps: spec.layers.len() + 1 + perturbations + 1,
        }
    }

    /// Takes the linears of an input over from the journal. False when the Hessian is needed:
    /// for a curve that is missing, or to perturb a weight again whose effect is not known yet.
    fn known(&mut self, names: &[String], layer: usize) -> Result<bool> {
        let mut taken = Vec::new();
        for name in names {
            let Some(mut linear) = self.work.measured(name)? else {
                return Ok(false);
            };
            if self.probed.contains(&layer) {
                let Some(value) = self.work.sensitivity(name)? else {
                    return Ok(false);
                };
                linear.sensitivity = value;
            }
            taken.push(linear);
        }
        self.linears.extend(taken);
        Ok(true)
    }

    /// Measures and perturbs the linears that share an input.
    fn site(
        &mut self,
        job: &mut Job<'_>,
        (names, layer): (&[String], usize),
        weights: &Weights,
        solver: &mut dyn Solver,
    ) -> Result<()> {
        let mut chosen: Option<f64> = None;
        for name in names {
            job.check()?;
            let weight = weights
                .get(name)
                .expect("the layer was loaded with all its linears");
            let matrix = padded(name, weight)?;
            let mut linear = match self.work.measured(name)? {
                Some(linear) => linear,
                None => {
                    match chosen {
                        Some(damping) => solver.set_damping(name, damping)?,
                        // The first of the linears stands for all.
                        None if *name == names[0] => solver.choose_damping(name, &matrix)?,
                        None => solver.choose_damping(&names[0], &first(names, weights)?)?,
                    }
                    let (damping, _) = solver.damping();
                    chosen = Some(damping);
                    let curve = solver.curve(name, &matrix)?;
                    let linear = LinearMeasurement::new(name, &curve, damping);
                    self.work.keep_measured(&linear)?;
                    linear
                }
            };
            job.emit(Event::Linear {
                name: name.clone(),
                bits_per_weight: None,
                relative_error: None,
            });
            if self.probed.contains(&layer) {
                match self.work.sensitivity(name)? {
                    Some(value) => linear.sensitivity = value,
                    None => self
                        .perturbed
                        .push(perturbed(&linear, &matrix, solver, layer)?),
                }
            }
            self.linears.push(linear);
        }
        Ok(())
    }
}

/// `count` rows spread evenly.
fn spread(rows: &[Vec<u32>], count: usize) -> Vec<Vec<u32>> {
    let count = count.clamp(1, rows.len().max(1)).min(rows.len());
    (0..count)
        .map(|i| rows[i * rows.len() / count].clone())
        .collect()
}

/// Layers whose linears are perturbed: all of a small model, else evenly spread with both ends.
fn probe_layers(layers: usize) -> Vec<usize> {
    if layers <= PROBE_LAYERS {
        return (0..layers).collect();
    }
    (0..PROBE_LAYERS)
        .map(|i| i * (layers - 1) / (PROBE_LAYERS - 1))
        .collect()
}

/// The first of the linears that share an input.
fn first(names: &[String], weights: &Weights) -> Result<Matrix> {
    let weight = weights
        .get(&names[0])
        .expect("the layer was loaded with all its linears");
    padded(&names[0], weight)
}

fn perturbed(
    linear: &LinearMeasurement,
    matrix: &Matrix,
    solver: &mut dyn Solver,
    layer: usize,
) -> Result<Perturbed> {
    let name = &linear.name;
    solver.set_damping(name, linear.damping)?;
    let layout = Layout::uniform(3, 128, matrix.rows)?;
    let rounded = solver.round(name, matrix, &layout, &[Judges::All])?;
    Ok(Perturbed {
        name: name.clone(),
        layer,
        loss: rounded.losses[0].0,
        weight: pack(name, &rounded.quantized, None)?,
    })
}

/// Perturbs one linear at a time and takes the divergence of the predictions per unit of loss.
fn sensitivities(
    job: &mut Job<'_>,
    rows: &[Vec<u32>],
    survey: Survey<'_>,
    found: &mut Measurement,
) -> Result<()> {
    if survey.perturbed.is_empty() {
        return Ok(());
    }
    let length = PROBE_LENGTH.min(rows[0].len());
    let count = (PROBE_POSITIONS / length).clamp(1, rows.len());
    let rows: Vec<Vec<u32>> = rows[..count].iter().map(|r| r[..length].to_vec()).collect();
    let mut done = survey.steps - survey.perturbed.len();
    perturb::scores(job, &survey.perturbed, &rows, |job, p, score| {
        let linear = found.linears.iter_mut().find(|l| l.name == p.name);
        let linear = linear.expect("every perturbed linear was measured");
        linear.sensitivity = score.mean_kl() / p.loss.max(f64::MIN_POSITIVE);
        survey.work.keep_sensitivity(&p.name, linear.sensitivity)?;
        done += 1;
        job.progress(done, survey.steps);
        Ok(())
    })
}

/// Fills in the layers between the probed ones, linear by linear, on a logarithmic scale.
fn interpolate(job: &Job<'_>, found: &mut Measurement) {
    let spec = job.source.spec();
    let layers = spec.layers.len();
    let probed = probe_layers(layers);
    for stop in STOPS {
        let width = spec.layers.first().map_or(0, |l| stop.linears(l).len());
        for which in 0..width {
            let name = |layer: usize| stop.linears(&spec.layers[layer])[which].clone();
            let known: Vec<(usize, f64)> = probed
                .iter()
                .filter_map(|&l| Some((l, found.linear(&name(l))?.sensitivity)))
                .collect();
            for layer in (0..layers).filter(|l| !probed.contains(l)) {
                let after = known
                    .iter()
                    .position(|k| k.0 > layer)
                    .unwrap_or(known.len() - 1);
                let (a, b) = (known[after.saturating_sub(1)], known[after]);
                let t = (layer - a.0) as f64 / (b.0 - a.0).max(1) as f64;
                let tiny = f64::MIN_POSITIVE;
                let value = (a.1.max(tiny).ln() * (1.0 - t) + b.1.max(tiny).ln() * t).exp();
                let key = name(layer);
                if let Some(linear) = found.linears.iter_mut().find(|l| l.name == key) {
                    linear.sensitivity = value;
                    linear.interpolated = true;
                }
            }
        }
    }
}
