//! Walks a model layer by layer, stopping at the input of every linear.
//!
//! The order inside a layer is q/k/v, o, gate/up, down. Each stop sees inputs computed with
//! whatever weights earlier stops put in place, so that o_proj and down_proj are calibrated behind
//! their quantized predecessors; every product runs once.

use exl_models::{BlockPart, LayerSpec, ModelSource, Module};
use exl_tensor::{Bound, Weights};

use super::device::Tap;
use super::machine::Machine;
use crate::Result;

/// Hidden states of all rows, `[length, hidden]` each.
pub(super) type Rows = Vec<Vec<f32>>;

/// The four inputs of a layer's linears in order.
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

impl Stop {
    /// Names of the linears that read this input.
    pub(super) fn linears(self, layer: &LayerSpec) -> Vec<String> {
        let (a, m) = (&layer.attn, &layer.mlp);
        let list = match self {
            Stop::Qkv => vec![&a.q, &a.k, &a.v],
            Stop::O => vec![&a.o],
            Stop::GateUp => vec![&m.gate, &m.up],
            Stop::Down => vec![&m.down],
        };
        list.into_iter().map(|l| l.key.clone()).collect()
    }

    /// Features of the input.
    pub(super) fn inputs(self, layer: &LayerSpec) -> usize {
        match self {
            Stop::Qkv => layer.attn.q.inputs,
            Stop::O => layer.attn.o.inputs,
            Stop::GateUp => layer.mlp.up.inputs,
            Stop::Down => layer.mlp.down.inputs,
        }
    }
}

/// Linears of a layer.
pub(super) fn linears_of(layer: &LayerSpec) -> usize {
    STOPS.iter().map(|stop| stop.linears(layer).len()).sum()
}

/// One layer on its way: hidden states, and between stops the input of the next product.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    pub(super) machine: &'a mut Machine,
    pub(super) layer: usize,
    /// Weights of the layer; stops replace them.
    pub(super) weights: Weights,
    pub(super) hidden: &'a mut Rows,
    /// Inputs of o or down, between computing them and the product.
    inner: Rows,
}

impl<'a> Walk<'a> {
    /// Loads layer `layer` of `source` for `hidden`, its input.
    pub(super) fn new(
        source: &ModelSource,
        machine: &'a mut Machine,
        layer: usize,
        hidden: &'a mut Rows,
    ) -> Result<Self> {
        let weights = source.load_layer(layer)?;
        machine.positions()?;
        Ok(Self {
            machine,
            layer,
            weights,
            hidden,
            inner: Vec::new(),
        })
    }

    fn spec(&self) -> LayerSpec {
        self.machine.spec().layers[self.layer].clone()
    }

    /// Brings the layer to a stop: `each` sees the input of every row there. Stops must be
    /// visited in order; [`Walk::finish`] ends the layer.
    pub(super) fn visit(
        &mut self,
        stop: Stop,
        mut each: impl FnMut(usize, &mut Tap<'_>) -> Result<()>,
    ) -> Result<()> {
        let spec = self.spec();
        match stop {
            Stop::Qkv => self.look(self.machine.norm(&spec.attn_norm, &self.weights)?, each),
            Stop::O => {
                let bound = self
                    .machine
                    .part(BlockPart::Attention(self.layer), &self.weights)?;
                let tap = spec.attn.o.key.clone();
                for r in 0..self.hidden.len() {
                    let mut slots = self.machine.run(&bound, &[("hidden", &self.hidden[r])])?;
                    let mut x = slots.tap(&tap);
                    each(r, &mut x)?;
                    self.inner.push(x.values()?.to_vec());
                }
                Ok(())
            }
            Stop::GateUp => {
                self.add(self.machine.add(&spec.attn.o, &self.weights)?)?;
                self.look(self.machine.norm(&spec.mlp_norm, &self.weights)?, each)
            }
            Stop::Down => {
                let bound = self
                    .machine
                    .gate_up(&spec.mlp_norm, &spec.mlp, &self.weights)?;
                for r in 0..self.hidden.len() {
                    let mut slots = self.machine.run(&bound, &[("hidden", &self.hidden[r])])?;
                    let mut x = slots.tap("out");
                    each(r, &mut x)?;
                    self.inner.push(x.values()?.to_vec());
                }
                Ok(())
            }
        }
    }

    /// Adds the last product; `hidden` is then the layer's output.
    pub(super) fn finish(mut self) -> Result<()> {
        let down = self.spec().mlp.down;
        self.add(self.machine.add(&down, &self.weights)?)
    }

    fn look(
        &mut self,
        bound: Bound,
        mut each: impl FnMut(usize, &mut Tap<'_>) -> Result<()>,
    ) -> Result<()> {
        for (r, hidden) in self.hidden.iter().enumerate() {
            let mut slots = self.machine.run(&bound, &[("hidden", hidden)])?;
            each(r, &mut slots.tap("out"))?;
        }
        Ok(())
    }

    fn add(&mut self, bound: Bound) -> Result<()> {
        for (hidden, x) in self.hidden.iter_mut().zip(std::mem::take(&mut self.inner)) {
            let mut slots = self.machine.run(&bound, &[("hidden", hidden), ("x", &x)])?;
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
    let bound = machine.part(BlockPart::Embed, &weights)?;
    rows.iter()
        .map(|tokens| machine.embed(&bound, tokens))
        .collect()
}

/// The normed inputs of the head, row by row.
pub(super) fn head_inputs(
    source: &ModelSource,
    machine: &mut Machine,
    hidden: &Rows,
    mut each: impl FnMut(usize, &mut Tap<'_>) -> Result<()>,
) -> Result<()> {
    let weights = source.load_module(Module::Head)?;
    machine.positions()?;
    let norm = machine.spec().final_norm.clone();
    let bound = machine.norm(&norm, &weights)?;
    for (r, row) in hidden.iter().enumerate() {
        let mut slots = machine.run(&bound, &[("hidden", row)])?;
        each(r, &mut slots.tap("out"))?;
    }
    Ok(())
}
