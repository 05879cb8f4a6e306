//! Walks a model layer by layer, stopping at the inputs of its linears.
//!
//! The order inside a layer is q/k/v, o, gate/up, down. Each stop sees inputs computed with
//! whatever weights earlier stops put in place, so that o_proj and down_proj are calibrated behind
//! their quantized predecessors; every product runs once. An expert is calibrated with the tokens
//! that are routed to it.

use exl_models::{DenseMlp, LayerSpec, LinearSpec, MlpSpec, ModelSource, Module};
use exl_tensor::{Bound, Weights};

use super::device::Device;
use super::machine::{Machine, Slots};
use super::original::{Beside, Original};
use super::solver::{Moments, Solver};
use crate::{Part, Result};

/// Hidden states of all rows, `[length, hidden]` each.
pub(super) type Rows = Vec<Vec<f32>>;

/// The places in a layer where linears get their inputs, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Input of q, k and v.
    Qkv,
    /// Input of o.
    O,
    /// Input of gate and up.
    GateUp,
    /// Input of down.
    Down,
}

/// All stops of a layer in order.
pub(super) const STOPS: [Stop; 4] = [Stop::Qkv, Stop::O, Stop::GateUp, Stop::Down];

/// Linears that share an input, and so a Hessian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    /// Their names.
    pub(super) linears: Vec<String>,
    /// What each of them is, the same in all layers; for experts the same for all of them.
    pub(super) roles: Vec<&'static str>,
    /// Features of the input.
    pub(super) inputs: usize,
    /// Which slot it is, and of experts which one's tokens.
    slot: &'static str,
    expert: Option<usize>,
}

/// Outputs of the plans that bring a layer to its stops.
pub(super) const X: &str = "x";
pub(super) const SHARED: &str = "shared";
pub(super) const IDS: &str = "ids";

impl Site {
    fn new(slot: &'static str, parts: &[(&'static str, &LinearSpec)]) -> Self {
        Self {
            linears: parts.iter().map(|(_, l)| l.key.clone()).collect(),
            roles: parts.iter().map(|(role, _)| *role).collect(),
            inputs: parts.first().map_or(0, |(_, l)| l.inputs),
            slot,
            expert: None,
        }
    }

    /// The head's.
    pub(super) fn head(linear: &LinearSpec) -> Self {
        Self::new(X, &[("head", linear)])
    }

    /// Whether only some tokens come here.
    pub(super) fn is_expert(&self) -> bool {
        self.expert.is_some()
    }
}

impl Stop {
    /// The inputs that there are at this stop.
    pub(super) fn sites(self, layer: &LayerSpec) -> Vec<Site> {
        let a = &layer.attn;
        match (self, &layer.mlp) {
            (Stop::Qkv, _) => vec![Site::new(X, &[("q", &a.q), ("k", &a.k), ("v", &a.v)])],
            (Stop::O, _) => vec![Site::new(X, &[("o", &a.o)])],
            (Stop::GateUp, MlpSpec::Dense(mlp)) => {
                vec![branches(X, mlp, ["gate", "up"])]
            }
            (Stop::Down, MlpSpec::Dense(mlp)) => vec![Site::new(X, &[("down", &mlp.down)])],
            (Stop::GateUp | Stop::Down, MlpSpec::Moe(moe)) => {
                let site = |slot, mlp: &DenseMlp, names: [&'static str; 3]| match self {
                    Stop::Down => Site::new(slot, &[(names[2], &mlp.down)]),
                    _ => branches(X, mlp, [names[0], names[1]]),
                };
                let expert = |(e, mlp): (usize, &DenseMlp)| Site {
                    expert: Some(e),
                    ..site(X, mlp, ["expert gate", "expert up", "expert down"])
                };
                let shared = moe.shared.iter().map(|s| {
                    let names = ["shared gate", "shared up", "shared down"];
                    site(SHARED, &s.mlp, names)
                });
                moe.experts
                    .iter()
                    .enumerate()
                    .map(expert)
                    .chain(shared)
                    .collect()
            }
        }
    }
}

fn branches(slot: &'static str, mlp: &DenseMlp, [gate, up]: [&'static str; 2]) -> Site {
    let gate = mlp.gate.iter().map(|g| (gate, g));
    let parts: Vec<_> = gate.chain([(up, &mlp.up)]).collect();
    Site::new(slot, &parts)
}

/// All sites of a layer in order.
pub(super) fn sites_of(layer: &LayerSpec) -> Vec<Site> {
    STOPS.iter().flat_map(|stop| stop.sites(layer)).collect()
}

/// A site that a walk has come to.
pub(super) struct Visit<'a> {
    pub(super) site: &'a Site,
    /// Share of the tokens that come here.
    pub(super) share: f64,
    /// Its Hessians, if they were asked for.
    pub(super) solver: Option<&'a mut dyn Solver>,
}

/// One layer on its way: hidden states, and between stops the inputs of the next product.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    pub(super) machine: &'a mut Machine,
    pub(super) layer: usize,
    /// Weights of the layer; stops replace them.
    pub(super) weights: Weights,
    pub(super) hidden: &'a mut Rows,
    /// Inputs of o, between computing them and the product.
    mixed: Rows,
    /// Inputs of the MLP, kept for experts.
    x: Rows,
    /// Inputs of down, between computing them and the product.
    inner: Rows,
    /// Of a shared expert's down.
    shared: Rows,
    /// The experts of each token.
    ids: Vec<Vec<i32>>,
}

impl<'a> Walk<'a> {
    /// Loads layer `layer` of `source` for `hidden`, its input.
    pub(super) fn new(
        source: &ModelSource,
        machine: &'a mut Machine,
        layer: usize,
        hidden: &'a mut Rows,
    ) -> Result<Self> {
        Self::with(source.load_layer(layer)?, machine, layer, hidden)
    }

    /// With the weights of layer `layer`.
    pub(super) fn with(
        weights: Weights,
        machine: &'a mut Machine,
        layer: usize,
        hidden: &'a mut Rows,
    ) -> Result<Self> {
        machine.positions()?;
        Ok(Self {
            machine,
            layer,
            weights,
            hidden,
            mixed: Vec::new(),
            x: Vec::new(),
            inner: Vec::new(),
            shared: Vec::new(),
            ids: Vec::new(),
        })
    }

    fn spec(&self) -> LayerSpec {
        self.machine.spec().layers[self.layer].clone()
    }

    fn top_k(&self) -> usize {
        match &self.machine.spec().layers[self.layer].mlp {
            MlpSpec::Moe(moe) => moe.top_k,
            MlpSpec::Dense(_) => 1,
        }
    }

    /// Brings the layer to a stop and hands each of its sites ([`Stop::sites`]) to `each`, with the
    /// Hessians of those that need them. Stops must be visited in order; [`Walk::finish`] ends the
    /// layer.
    ///
    /// With the same layer of the original `beside`, rounding makes up for the errors so far; it comes
    /// to the stop too.
    pub(super) fn solve(
        &mut self,
        stop: Stop,
        sites: &[(Site, bool)],
        mut beside: Option<&mut Beside<'_>>,
        mut each: impl FnMut(&mut Weights, Visit<'_>) -> Result<()>,
    ) -> Result<()> {
        let device = &self.machine.device().clone();
        let mut moments: Vec<Option<Moments>> = Vec::with_capacity(sites.len());
        for (site, needed) in sites {
            let whole = *needed && site.expert.is_none();
            moments.push(match whole {
                true => Some(Moments::new(device, site.inputs)?),
                false => None,
            });
        }
        let arrive = |beside: &mut &mut Beside<'_>| beside.walk.arrive(stop);
        let theirs = beside.as_mut().map(arrive).transpose()?;
        let bound = self.arrive(stop)?;
        for r in 0..self.hidden.len() {
            let mut slots = self.row(&bound, stop, r)?;
            let mut original = match (&mut beside, &theirs) {
                (Some(beside), Some(theirs)) => beside.row(theirs, stop, r)?,
                _ => None,
            };
            for ((site, _), moments) in sites.iter().zip(&mut moments) {
                let Some(moments) = moments else { continue };
                moments.add(r, &mut slots.tap(site.slot))?;
                if let Some(original) = &mut original {
                    let theirs = &mut original.tap(site.slot);
                    moments.add_pair(&mut slots.tap(site.slot), theirs)?;
                }
            }
        }
        drop((bound, theirs));
        self.leave(stop);
        if let Some(beside) = beside {
            beside.walk.leave(stop);
        }
        for ((site, needed), moments) in sites.iter().zip(moments) {
            let moments = match (moments, site.expert) {
                (None, Some(expert)) if *needed => Some(self.routed(device, stop, site, expert)?),
                (moments, _) => moments,
            };
            let mut solver = match moments {
                Some(moments) => Some(moments.finish(&site.linears[0])?),
                None => None,
            };
            let visit = Visit {
                site,
                share: self.share(site),
                solver: solver.as_mut().map(|s| s.as_mut() as &mut dyn Solver),
            };
            each(&mut self.weights, visit)?;
        }
        Ok(())
    }

    /// Brings the layer past a stop without looking.
    pub(super) fn pass(&mut self, stop: Stop) -> Result<()> {
        let bound = self.arrive(stop)?;
        for r in 0..self.hidden.len() {
            self.row(&bound, stop, r)?;
        }
        self.leave(stop);
        Ok(())
    }

    /// Share of the layer's tokens that reach an expert, one more than were seen so that none counts
    /// for nothing; 1 for what all of them reach.
    fn share(&self, site: &Site) -> f64 {
        let Some(expert) = site.expert else {
            return 1.0;
        };
        let (mut here, mut all) = (1, 1);
        for ids in &self.ids {
            here += ids.iter().filter(|&&id| id as usize == expert).count();
            all += ids.len() / self.top_k();
        }
        here as f64 / all as f64
    }

    /// The Hessians of one expert's tokens. One that no training token reaches takes the inputs of
    /// all tokens, or where it has none of its own, equal weights for all features.
    fn routed(&self, device: &Device, stop: Stop, site: &Site, expert: usize) -> Result<Moments> {
        let mut moments = Moments::new(device, site.inputs)?;
        let mut train = 0;
        for (r, ids) in self.ids.iter().enumerate() {
            let rows = self.rows(stop, r, ids, expert);
            if Part::of_row(r) == Part::Train {
                train += rows.len();
            }
            moments.add_rows(r, &rows)?;
        }
        if train > 0 {
            return Ok(moments);
        }
        match stop {
            Stop::GateUp => {
                for (r, x) in self.x.iter().enumerate() {
                    moments.add_rows(r, x)?;
                }
            }
            _ => {
                let mut unit = vec![0.0; site.inputs * site.inputs];
                unit.iter_mut()
                    .step_by(site.inputs + 1)
                    .for_each(|x| *x = 1.0);
                moments.add_rows(0, &unit)?;
            }
        }
        Ok(moments)
    }

    /// Inputs of one expert in row `r`.
    fn rows(&self, stop: Stop, r: usize, ids: &[i32], expert: usize) -> Vec<f32> {
        let top_k = self.top_k();
        // Before gate and up a token is one row, before down one for each of its experts.
        let (from, per) = match stop {
            Stop::Down => (&self.inner[r], 1),
            _ => (&self.x[r], top_k),
        };
        let width = from.len() * per / ids.len().max(1);
        let mut rows = Vec::new();
        for (at, _) in ids
            .iter()
            .enumerate()
            .filter(|(_, id)| **id as usize == expert)
        {
            rows.extend_from_slice(&from[at / per * width..][..width]);
        }
        rows
    }

    /// What brings rows to a stop.
    pub(super) fn arrive(&mut self, stop: Stop) -> Result<Bound> {
        let spec = self.spec();
        if stop == Stop::GateUp && !spec.parallel {
            self.add_mixed()?;
        }
        let (m, w) = (&*self.machine, &self.weights);
        match stop {
            Stop::Qkv => m.attention_input(&spec, w),
            Stop::O => m.attention_mixed(&spec, w),
            Stop::GateUp => m.mlp_input(&spec, w),
            Stop::Down => m.mlp_inner(&spec, w),
        }
    }

    /// Brings row `r` there; rows come in their order. What later stops need of it is kept.
    pub(super) fn row<'s>(
        &'s mut self,
        bound: &'s Bound,
        stop: Stop,
        r: usize,
    ) -> Result<Slots<'s>> {
        let is_moe = matches!(self.machine.spec().layers[self.layer].mlp, MlpSpec::Moe(_));
        let mut slots = self.machine.run(bound, &[("hidden", &self.hidden[r])])?;
        match stop {
            Stop::Qkv => {}
            Stop::O => self.mixed.push(slots.tap(X).values()?.to_vec()),
            Stop::GateUp if is_moe => {
                self.x.push(slots.tap(X).values()?.to_vec());
                self.ids.push(slots.tap(IDS).integers()?.to_vec());
            }
            Stop::GateUp => {}
            Stop::Down => {
                self.inner.push(slots.tap(X).values()?.to_vec());
                if let Some(mut shared) = slots.try_tap(SHARED) {
                    self.shared.push(shared.values()?.to_vec());
                }
            }
        }
        Ok(slots)
    }

    /// Drops what no later stop needs.
    pub(super) fn leave(&mut self, stop: Stop) {
        if stop == Stop::Down {
            self.x = Vec::new();
        }
    }

    /// Adds the last products; `hidden` is then the layer's output.
    pub(super) fn finish(mut self) -> Result<()> {
        let spec = self.spec();
        let bound = self.machine.mlp_output(&spec, &self.weights)?;
        let rows = self.hidden.iter_mut().zip(std::mem::take(&mut self.inner));
        for (r, (hidden, inner)) in rows.enumerate() {
            let mut inputs: Vec<(&str, &[f32])> = vec![("hidden", hidden), (X, &inner)];
            if let Some(shared) = self.shared.get(r) {
                inputs.push((SHARED, shared));
            }
            let mut slots = self.machine.run(&bound, &inputs)?;
            slots.copy_to("hidden", hidden)?;
        }
        if spec.parallel {
            self.add_mixed()?;
        }
        Ok(())
    }

    fn add_mixed(&mut self) -> Result<()> {
        let bound = self.machine.attention_output(&self.spec(), &self.weights)?;
        for (hidden, x) in self.hidden.iter_mut().zip(std::mem::take(&mut self.mixed)) {
            let mut slots = self.machine.run(&bound, &[("hidden", hidden), (X, &x)])?;
            slots.copy_to("hidden", hidden)?;
        }
        Ok(())
    }
}

/// Embeds rows of tokens.
pub(super) fn embed(
    source: &ModelSource,
    machine: &mut Machine,
    rows: &[Vec<u32>],
) -> Result<Rows> {
    let weights = source.load_module(Module::Embedding)?;
    let bound = machine.embedding(&weights)?;
    rows.iter()
        .map(|tokens| machine.embed(&bound, tokens))
        .collect()
}

/// The Hessians of the head's inputs, with the original's rows beside as in [`Walk::solve`].
pub(super) fn head_solver(
    source: &ModelSource,
    (machine, hidden): (&mut Machine, &Rows),
    mut beside: Option<&mut Original>,
) -> Result<Box<dyn Solver>> {
    let weights = source.load_module(Module::Head)?;
    let mut moments = Moments::new(machine.device(), machine.spec().hidden)?;
    machine.positions()?;
    let bound = machine.head_input(&weights)?;
    let arrive = |original: &mut &mut Original| original.head_input(&weights);
    let theirs = beside.as_mut().map(arrive).transpose()?;
    for (r, row) in hidden.iter().enumerate() {
        let mut slots = machine.run(&bound, &[("hidden", row)])?;
        moments.add(r, &mut slots.tap(X))?;
        if let (Some(original), Some(theirs)) = (&mut beside, &theirs)
            && let Some(mut theirs) = original.head_row(theirs, r)?
        {
            moments.add_pair(&mut slots.tap(X), &mut theirs.tap(X))?;
        }
    }
    moments.finish(&source.spec().head.linear.key)
}
