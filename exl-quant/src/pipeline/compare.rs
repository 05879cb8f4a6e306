//! Two models side by side on the same tokens: predictions position by position, hidden states
//! layer by layer.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use exl_models::{BlockPart, LoadOptions, ModelSource, Module, Spec};
use exl_tensor::{Bound, Gpu, Weights};
use rayon::prelude::*;

use super::device::Device;
use super::logits::Head;
use super::machine::Machine;
use super::sites::{Rows, embed};
use crate::eval::{likeliest, position};
use crate::{Error, KlScore, Result};

/// Likeliest tokens kept per position and model.
const RANKS: usize = 3;

/// Which models are compared, and how they are read.
#[derive(Clone, Debug)]
pub struct CompareOptions {
    /// The model that counts as right.
    pub a: PathBuf,
    /// The other one.
    pub b: PathBuf,
    /// How both are read.
    pub load: LoadOptions,
    /// Threads, 0 for all.
    pub threads: usize,
    /// The GPU that computes; `None` for the CPU.
    pub gpu: Option<Gpu>,
}

/// The likeliest next tokens of a model at one position, the likeliest first: token and
/// probability.
pub type Likeliest = Vec<(u32, f32)>;

/// One position of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparedPosition {
    /// KL(a || b) of the predictions of the next token, in nats.
    pub kl: f32,
    /// What the first model expects.
    pub a: Likeliest,
    /// What the second one expects.
    pub b: Likeliest,
}

/// What a comparison found.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Every position of every row.
    pub rows: Vec<Vec<ComparedPosition>>,
    /// Sums over all positions, `a` the reference.
    pub score: KlScore,
    /// Of the embedding and of every layer's output: root mean square of the difference over that
    /// of the first model's. Empty when the models differ in width or depth.
    pub layers: Vec<f64>,
}

/// One of the two on its way through the layers.
struct Side {
    source: ModelSource,
    spec: Arc<Spec>,
    machine: Machine,
    hidden: Rows,
}

impl Side {
    fn new(source: ModelSource, rows: &[Vec<u32>], device: &Device) -> Result<Self> {
        let spec = source.spec().clone();
        let length = rows.first().map_or(0, Vec::len);
        let mut machine = Machine::new(&spec, length, device)?;
        let hidden = embed(&source, &mut machine, rows)?;
        Ok(Self {
            source,
            spec,
            machine,
            hidden,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<()> {
        let weights = self.source.load_layer(layer)?;
        self.machine.positions()?;
        let bound = self.machine.part(BlockPart::Layer(layer), &weights)?;
        for row in &mut self.hidden {
            let mut slots = self.machine.run(&bound, &[("hidden", row)])?;
            slots.copy_to("hidden", row)?;
        }
        Ok(())
    }

    fn head(&self) -> Result<Weights> {
        Ok(self.source.load_module(Module::Head)?)
    }
}

/// Compares two models on `rows` of equal length. `progress` is told how many of how many layers
/// and rows are done.
///
/// # Errors
/// A model that cannot be read, vocabularies of different sizes, tokens beyond them, rows that are
/// too long or of different lengths; [`Error::Numeric`] when a model computes NaN or infinity;
/// [`Error::Interrupted`] after `stop` was set.
pub fn compare(
    options: &CompareOptions,
    rows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
    stop: &AtomicBool,
) -> Result<Comparison> {
    let a = ModelSource::open(&options.a, &options.load)?;
    let b = ModelSource::open(&options.b, &options.load)?;
    check(options, (&a, &b), rows)?;
    let device = Device::new(options.threads, options.gpu.as_ref());
    let (mut a, mut b) = (Side::new(a, rows, &device)?, Side::new(b, rows, &device)?);
    let depth = (a.spec.layers.len(), b.spec.layers.len());
    let alike = depth.0 == depth.1 && a.spec.hidden == b.spec.hidden;
    let total = depth.0.max(depth.1) + rows.len();
    let mut layers = Vec::new();
    if alike {
        layers.push(distance(&a.hidden, &b.hidden));
    }
    for layer in 0..depth.0.max(depth.1) {
        interrupted(stop)?;
        progress(layer, total);
        if layer < depth.0 {
            a.layer(layer)?;
        }
        if layer < depth.1 {
            b.layer(layer)?;
        }
        if alike {
            layers.push(distance(&a.hidden, &b.hidden));
        }
    }
    let length = rows[0].len();
    let (weights_a, weights_b) = (a.head()?, b.head()?);
    let mut heads = (
        Head::new(&a.spec, length, &device)?,
        Head::new(&b.spec, length, &device)?,
    );
    let bound = (heads.0.bind(&weights_a)?, heads.1.bind(&weights_b)?);
    let (mut found, mut score) = (Vec::new(), KlScore::new());
    for (i, tokens) in rows.iter().enumerate() {
        interrupted(stop)?;
        progress(total - rows.len() + i, total);
        let left = logits(&mut heads.0, &bound.0, &a.hidden[i])?;
        let right = logits(&mut heads.1, &bound.1, &b.hidden[i])?;
        let vocab = a.spec.vocab;
        score.add(&left, &right, vocab, &tokens[1..]);
        found.push(positions(&left, &right, vocab));
    }
    if !score.is_finite() {
        let what = format!(
            "it or {} computes NaN or infinity on this text",
            options.b.display()
        );
        return Err(Error::numeric(options.a.display().to_string(), what));
    }
    Ok(Comparison {
        rows: found,
        score,
        layers,
    })
}

fn check(
    options: &CompareOptions,
    (a, b): (&ModelSource, &ModelSource),
    rows: &[Vec<u32>],
) -> Result<()> {
    let bad = |option, what: String| Err(Error::Option { option, what });
    let (va, vb) = (a.spec().vocab, b.spec().vocab);
    if va != vb {
        let (a, b) = (options.a.display(), options.b.display());
        let what = format!("the vocabulary of {a} has {va} tokens, that of {b} has {vb}");
        return bad("B", what);
    }
    let length = rows.first().map_or(0, Vec::len);
    if length < 2 || rows.iter().any(|r| r.len() != length) {
        return bad("--length", "rows of at least two tokens are needed".into());
    }
    for source in [a, b] {
        let limit = source.spec().context;
        if length > limit {
            let what = format!("{length} is beyond the {limit} positions of a model");
            return bad("--length", what);
        }
    }
    if let Some(token) = rows.iter().flatten().find(|&&t| t as usize >= va) {
        let what = format!("token {token} is beyond the vocabulary of {va}");
        return bad("--tokens", what);
    }
    Ok(())
}

fn interrupted(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::Interrupted);
    }
    Ok(())
}

/// Root mean square of `b - a` over that of `a`.
fn distance(a: &Rows, b: &Rows) -> f64 {
    let (mut left, mut whole) = (0.0f64, 0.0f64);
    for (x, y) in a.iter().flatten().zip(b.iter().flatten()) {
        left += f64::from(y - x) * f64::from(y - x);
        whole += f64::from(*x) * f64::from(*x);
    }
    (left / whole.max(f64::MIN_POSITIVE)).sqrt()
}

/// Logits of a whole row.
fn logits(head: &mut Head, bound: &Bound, hidden: &[f32]) -> Result<Vec<f32>> {
    let mut out = Vec::new();
    head.logits(bound, hidden, |_, piece| {
        out.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(out)
}

fn positions(a: &[f32], b: &[f32], vocab: usize) -> Vec<ComparedPosition> {
    a.par_chunks_exact(vocab)
        .zip(b.par_chunks_exact(vocab))
        .map(|(a, b)| ComparedPosition {
            kl: position(a, b, None).kl as f32,
            a: likeliest(a, RANKS),
            b: likeliest(b, RANKS),
        })
        .collect()
}
