//! What changing single linears of a model does to its predictions.
//!
//! All changed models go through the layers side by side, as many as memory allows, so that a layer's
//! weights are loaded once for all of them.

use exl_format::Exl2Linear;
use exl_models::{BlockPart, Module, Spec};
use exl_tensor::{Bound, Weights};

use super::Job;
use super::logits::Head;
use super::machine::{Machine, dense};
use super::quantize::decode;
use super::sites::{Rows, embed};
use crate::{Error, KlScore, Result};

/// Hidden states of models that are run side by side, in bytes.
const BYTES: usize = 1 << 30;

/// Linears to change together: one, or those of one kind of all experts of a layer.
#[derive(Debug)]
pub(super) struct Perturbed {
    /// Its layer; that of the head is the number of layers.
    pub(super) layer: usize,
    /// What is changed.
    pub(super) linears: Vec<Change>,
}

/// A linear to change, and the output error that makes.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) name: String,
    /// Share of the tokens that it concerns.
    pub(super) share: f64,
    pub(super) loss: f64,
    /// What takes its place.
    pub(super) weight: Exl2Linear,
}

impl Perturbed {
    /// The output error over all tokens.
    pub(super) fn loss(&self) -> f64 {
        self.linears.iter().map(|c| c.share * c.loss).sum()
    }

    fn put(&self, weights: &mut Weights) -> Result<()> {
        for Change { name, weight, .. } in &self.linears {
            let matrix = decode(weight);
            let outputs = weights.get(name).map_or(matrix.cols, |w| w.shape()[0]);
            weights.insert(name, dense(name, &matrix, outputs)?);
        }
        Ok(())
    }
}

/// Changed models that run side by side over this many positions.
pub(super) fn side_by_side(spec: &Spec, positions: usize) -> usize {
    (BYTES / (4 * positions * spec.hidden).max(1)).max(1)
}

/// Calls `each` for every change, in order, with how far the predictions on `rows` (of equal length)
/// are from those of the original. Layers of `list` never fall.
pub(super) fn scores(
    job: &mut Job<'_>,
    list: &[Perturbed],
    rows: &[Vec<u32>],
    mut each: impl FnMut(&mut Job<'_>, &Perturbed, &KlScore) -> Result<()>,
) -> Result<()> {
    let spec = job.source.spec().clone();
    let length = rows.first().map_or(1, Vec::len);
    let mut machine = Machine::new(&spec, length, &job.device)?;
    let mut head = Head::new(&spec, length, &job.device)?;
    let original = job.source.load_module(Module::Head)?;
    let right = head.bind(&original)?;
    for some in list.chunks(side_by_side(&spec, length * rows.len())) {
        let (base, streams) = side(job, &mut machine, some, rows)?;
        let mut heads: Vec<Option<Bound>> = Vec::with_capacity(some.len());
        for p in some {
            heads.push(match p.layer == spec.layers.len() {
                true => {
                    let mut weights = original.clone();
                    p.put(&mut weights)?;
                    Some(head.bind(&weights)?)
                }
                false => None,
            });
        }
        let mut found = vec![KlScore::new(); some.len()];
        for (r, tokens) in rows.iter().enumerate() {
            job.check()?;
            let changed = heads.iter().zip(&streams);
            let changed: Vec<(&Bound, &[f32])> = changed
                .map(|(head, hidden)| match head {
                    // A changed head sees what the original does.
                    Some(head) => (head, &base[r][..]),
                    None => (&right, &hidden[r][..]),
                })
                .collect();
            head.scores(&mut found, (&right, &base[r]), &changed, tokens)?;
        }
        for (p, score) in some.iter().zip(&found) {
            if !score.is_finite() {
                let what = "with this weight at three bits the model computes NaN or infinity";
                let name = p.linears.first().map_or("", |c| &c.name);
                return Err(Error::numeric(name, what));
            }
            each(job, p, score)?;
        }
    }
    Ok(())
}

/// What the original gives after its last layer, and what the model with each change gives; nothing
/// for changes of the head.
fn side(
    job: &Job<'_>,
    machine: &mut Machine,
    list: &[Perturbed],
    rows: &[Vec<u32>],
) -> Result<(Rows, Vec<Rows>)> {
    let mut base = embed(&job.source, machine, rows)?;
    let mut streams: Vec<Rows> = Vec::with_capacity(list.len());
    for layer in 0..machine.spec().layers.len() {
        job.check()?;
        let weights = job.source.load_layer(layer)?;
        let bound = machine.part(BlockPart::Layer(layer), &weights)?;
        for hidden in &mut streams {
            forward(machine, &bound, hidden)?;
        }
        let begun = streams.len();
        for p in list[begun..].iter().take_while(|p| p.layer == layer) {
            let mut weights = weights.clone();
            p.put(&mut weights)?;
            let bound = machine.part(BlockPart::Layer(layer), &weights)?;
            let mut hidden = base.clone();
            forward(machine, &bound, &mut hidden)?;
            streams.push(hidden);
        }
        forward(machine, &bound, &mut base)?;
    }
    streams.resize(list.len(), Rows::new());
    Ok((base, streams))
}

/// Runs a layer over all rows.
fn forward(machine: &mut Machine, bound: &Bound, hidden: &mut [Vec<f32>]) -> Result<()> {
    for row in hidden {
        let mut slots = machine.run(bound, &[("hidden", row)])?;
        slots.copy_to("hidden", row)?;
    }
    Ok(())
}
