//! The measuring pass: one stream of the unquantized model gives curves and damping, then each
//! linear is perturbed by itself to see what it does to the predictions.

use std::collections::{BTreeMap, HashMap};

use exl_models::{LayerSpec, Module, Spec};
use exl_tensor::Weights;

use super::machine::{Machine, padded};
use super::measurement::{LinearMeasurement, MEASUREMENT_VERSION, Measurement};
use super::perturb::{self, Change, Perturbed};
use super::quantize::pack;
use super::sites::{STOPS, Site, Visit, Walk, embed, head_solver, sites_of};
use super::solver::{Rows as Judges, Solver};
use super::{Event, Job, Stage};
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
    // The layers and the head.
    let steps = spec.layers.len() + 1;
    for layer in 0..spec.layers.len() {
        job.check()?;
        job.progress(layer, steps);
        let mut walk = Walk::new(&job.source, &mut machine, layer, &mut hidden)?;
        for stop in STOPS {
            let mut sites = Vec::new();
            for site in stop.sites(&spec.layers[layer]) {
                let needed = survey.taken(&site, layer)?.is_none();
                sites.push((site, needed));
            }
            walk.solve(stop, &sites, None, |weights, found| {
                survey.site(job, layer, weights, found)
            })?;
        }
        walk.finish()?;
    }
    job.progress(spec.layers.len(), steps);
    let site = Site::head(&spec.head.linear);
    let mut solver = None;
    if survey.taken(&site, spec.layers.len())?.is_none() {
        let at = (&mut machine, &hidden);
        solver = Some(head_solver(&job.source, at, None)?);
    }
    let head = job.source.load_module(Module::Head)?;
    let found = Visit {
        site: &site,
        share: 1.0,
        solver: solver.as_mut().map(|s| s.as_mut() as &mut dyn Solver),
    };
    survey.site(job, spec.layers.len(), &head, found)?;
    job.progress(steps, steps);
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
    /// With the kind of what is changed.
    perturbed: Vec<(Perturbed, &'static str)>,
}

impl<'a> Survey<'a> {
    fn new(spec: &Spec, work: &'a Work) -> Self {
        let mut probed = probe_layers(spec);
        probed.push(spec.layers.len());
        Self {
            work,
            probed,
            linears: Vec::new(),
            perturbed: Vec::new(),
        }
    }

    /// The linears of an input as the journal has them. `None` when the Hessian is needed: for a
    /// curve that is missing, or to perturb a weight again whose effect is not known yet.
    fn taken(&self, site: &Site, layer: usize) -> Result<Option<Vec<LinearMeasurement>>> {
        let mut taken = Vec::new();
        for name in &site.linears {
            let Some(mut linear) = self.work.measured(name)? else {
                return Ok(None);
            };
            if self.probed.contains(&layer) {
                let Some(value) = self.work.sensitivity(name)? else {
                    return Ok(None);
                };
                linear.sensitivity = value;
            }
            taken.push(linear);
        }
        Ok(Some(taken))
    }

    /// Measures and perturbs the linears that share an input.
    fn site(
        &mut self,
        job: &mut Job<'_>,
        layer: usize,
        weights: &Weights,
        found: Visit<'_>,
    ) -> Result<()> {
        let (site, share) = (found.site, found.share);
        let Some(solver) = found.solver else {
            let taken = self.taken(site, layer)?;
            self.linears.extend(taken.into_iter().flatten());
            return Ok(());
        };
        let mut chosen: Option<f64> = None;
        for (name, role) in site.linears.iter().zip(&site.roles) {
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
                        None if *name == site.linears[0] => solver.choose_damping(name, &matrix)?,
                        None => {
                            let first = first(&site.linears, weights)?;
                            solver.choose_damping(&site.linears[0], &first)?;
                        }
                    }
                    let (damping, _) = solver.damping();
                    chosen = Some(damping);
                    let curve = solver.curve(name, &matrix)?;
                    let linear = LinearMeasurement::new(name, &curve, (damping, share));
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
                    None => {
                        let change = change(&linear, &matrix, solver)?;
                        self.perturb((layer, role), site.is_expert(), change);
                    }
                }
            }
            self.linears.push(linear);
        }
        Ok(())
    }

    /// Experts' linears of one kind are changed together.
    fn perturb(&mut self, (layer, role): (usize, &'static str), expert: bool, change: Change) {
        let same = |p: &&mut (Perturbed, &str)| expert && p.0.layer == layer && p.1 == role;
        match self.perturbed.iter_mut().find(same) {
            Some((together, _)) => together.linears.push(change),
            None => {
                let linears = vec![change];
                self.perturbed.push((Perturbed { layer, linears }, role));
            }
        }
    }
}

/// `count` rows spread evenly.
fn spread(rows: &[Vec<u32>], count: usize) -> Vec<Vec<u32>> {
    let count = count.clamp(1, rows.len().max(1)).min(rows.len());
    (0..count)
        .map(|i| rows[i * rows.len() / count].clone())
        .collect()
}

/// Kinds of linears in a layer.
pub(super) fn roles(layer: &LayerSpec) -> Vec<&'static str> {
    let mut roles: Vec<_> = sites_of(layer).into_iter().flat_map(|s| s.roles).collect();
    roles.sort_unstable();
    roles.dedup();
    roles
}

/// Layers whose linears are perturbed: all of a small model, else evenly spread with both ends, and
/// the first one with each kind of linear.
fn probe_layers(spec: &Spec) -> Vec<usize> {
    let layers = spec.layers.len();
    if layers <= PROBE_LAYERS {
        return (0..layers).collect();
    }
    let mut probed: Vec<usize> = (0..PROBE_LAYERS)
        .map(|i| i * (layers - 1) / (PROBE_LAYERS - 1))
        .collect();
    for (i, layer) in spec.layers.iter().enumerate() {
        let seen: Vec<_> = probed
            .iter()
            .flat_map(|&l| roles(&spec.layers[l]))
            .collect();
        if roles(layer).iter().any(|r| !seen.contains(r)) {
            probed.push(i);
        }
    }
    probed.sort_unstable();
    probed
}

/// The first of the linears that share an input.
fn first(names: &[String], weights: &Weights) -> Result<Matrix> {
    let weight = weights
        .get(&names[0])
        .expect("the layer was loaded with all its linears");
    padded(&names[0], weight)
}

fn change(linear: &LinearMeasurement, matrix: &Matrix, solver: &mut dyn Solver) -> Result<Change> {
    let name = &linear.name;
    solver.set_damping(name, linear.damping)?;
    let layout = Layout::uniform(3, 128, matrix.rows)?;
    let rounded = solver.round(name, matrix, &layout, &[Judges::All])?;
    Ok(Change {
        name: name.clone(),
        share: linear.share,
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
    job.emit(Event::Stage(Stage::Perturb));
    let (mut done, steps) = (0, survey.perturbed.len());
    let perturbed: Vec<Perturbed> = survey.perturbed.into_iter().map(|(p, _)| p).collect();
    perturb::scores(job, &perturbed, &rows, |job, p, score| {
        let per_loss = score.mean_kl() / p.loss().max(f64::MIN_POSITIVE);
        for change in &p.linears {
            let linear = found.linears.iter_mut().find(|l| l.name == change.name);
            let linear = linear.expect("every perturbed linear was measured");
            linear.sensitivity = per_loss * change.share;
            survey
                .work
                .keep_sensitivity(&change.name, linear.sensitivity)?;
        }
        done += 1;
        job.progress(done, steps);
        Ok(())
    })
}

/// Fills in the layers between the probed ones, kind by kind of linears, on a logarithmic scale.
fn interpolate(job: &Job<'_>, found: &mut Measurement) {
    let spec = job.source.spec();
    let probed = probe_layers(spec);
    let mut places: HashMap<String, (usize, &'static str)> = HashMap::new();
    for (l, layer) in spec.layers.iter().enumerate() {
        for site in sites_of(layer) {
            let named = site.linears.into_iter().zip(site.roles);
            places.extend(named.map(|(name, role)| (name, (l, role))));
        }
    }
    // By kind, what is known of the probed layers, for all of their tokens.
    let mut known: HashMap<&str, BTreeMap<usize, f64>> = HashMap::new();
    for linear in &found.linears {
        if let Some(&(layer, role)) = places.get(&linear.name)
            && probed.contains(&layer)
        {
            let value = linear.sensitivity / linear.share;
            known.entry(role).or_default().insert(layer, value);
        }
    }
    for linear in &mut found.linears {
        let Some(&(layer, role)) = places.get(&linear.name) else {
            continue;
        };
        if probed.contains(&layer) {
            continue;
        }
        let known = &known[role];
        let (before, after) = (known.range(..layer).last(), known.range(layer..).next());
        let (Some(a), Some(b)) = (before.or(after), after.or(before)) else {
            continue;
        };
        let t = layer.abs_diff(*a.0) as f64 / b.0.abs_diff(*a.0).max(1) as f64;
        let tiny = f64::MIN_POSITIVE;
        let value = (a.1.max(tiny).ln() * (1.0 - t) + b.1.max(tiny).ln() * t).exp();
        linear.sensitivity = value * linear.share;
        linear.interpolated = true;
    }
}
