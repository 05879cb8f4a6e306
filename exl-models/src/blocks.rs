//! The vocabulary of forward passes: each block records its ops on a [`PlanBuilder`].
//!
//! Both halves of a layer come in three steps (input, what happens inside, output), because
//! calibration stops between them.

mod attention;
mod logits;
mod mlp;

pub use attention::{attention, attention_input, attention_mixed, attention_output};
pub use logits::{head, logits};
pub use mlp::{MlpInner, mlp, mlp_inner, mlp_input, mlp_output, route};

use exl_tensor::{Part, PlanBuilder, Slot, WeightId};

use crate::Spec;
use crate::spec::{HeadNormOver, HeadNormSpec, LayerSpec, LinearSpec, NormKind, NormSpec};

/// Embeds the step's tokens, with vectors in place of some if the key says so: `[rows, hidden]`.
pub fn embed(b: &mut PlanBuilder, spec: &Spec) -> Slot {
    let table = b.weight(&spec.embed.key, &[spec.vocab, spec.hidden]);
    let hidden = b.embed(table, spec.embed.scale);
    b.take_vectors(hidden);
    if let Some(positions) = &spec.embed.positions {
        let table = b.weight(&positions.key, &[positions.count, spec.hidden]);
        b.embed_positions(table, hidden);
    }
    hidden
}

/// A norm over the rows of `x`; `x` itself where there is none.
pub fn norm(b: &mut PlanBuilder, spec: Option<&NormSpec>, x: Slot) -> Slot {
    let Some(spec) = spec else { return x };
    let shape = [spec.dim];
    let bias = spec.bias_key().map(|key| b.weight(&key, &shape));
    match spec.kind {
        NormKind::Rms { offset } => {
            let weight = b.weight(&spec.key, &shape);
            b.rms_norm(x, weight, spec.eps, offset)
        }
        NormKind::Layer { .. } => {
            let weight = b.weight(&spec.key, &shape);
            b.layer_norm(x, Some(weight), bias, spec.eps)
        }
        NormKind::Plain => b.layer_norm(x, None, None, spec.eps),
    }
}

/// A norm of the queries or keys in `x`, which has this many heads.
pub fn head_norm(b: &mut PlanBuilder, spec: &HeadNormSpec, heads: usize, x: Slot) -> Slot {
    let weight = b.weight(&spec.norm.key, &spec.weight_shape(heads));
    let norm = &spec.norm;
    match (spec.over, norm.kind) {
        (HeadNormOver::Head, NormKind::Rms { offset }) => {
            b.head_norm(x, weight, norm.dim, norm.eps, offset);
            x
        }
        (HeadNormOver::Row, NormKind::Rms { offset }) => b.rms_norm(x, weight, norm.eps, offset),
        (HeadNormOver::Row, _) => b.layer_norm(x, Some(weight), None, norm.eps),
        (HeadNormOver::Head | HeadNormOver::EachHead, _) => {
            b.head_layer_norm(x, weight, norm.dim, norm.eps);
            x
        }
    }
}

/// One decoder layer; `cache` is its index in the KV cache. Returns the hidden state.
pub fn layer(
    b: &mut PlanBuilder,
    spec: &Spec,
    layer: &LayerSpec,
    cache: usize,
    hidden: Slot,
) -> Slot {
    let (hidden, x) = attention_half(b, spec, layer, cache, hidden);
    mlp_half(b, layer, hidden, x)
}

/// Attention, and the input of the MLP if that is the input of attention.
fn attention_half(
    b: &mut PlanBuilder,
    spec: &Spec,
    layer: &LayerSpec,
    cache: usize,
    hidden: Slot,
) -> (Slot, Option<Slot>) {
    let x = attention_input(b, layer, hidden);
    let mixed = attention_mixed(b, spec, layer, cache, x);
    let hidden = attention_output(b, layer, mixed, hidden);
    (hidden, layer.parallel.then_some(x))
}

fn mlp_half(b: &mut PlanBuilder, layer: &LayerSpec, hidden: Slot, x: Option<Slot>) -> Slot {
    let x = x.unwrap_or_else(|| mlp_input(b, layer, hidden));
    let inner = mlp_inner(b, &layer.mlp, x);
    mlp_output(b, layer, &inner, hidden)
}

/// The whole model: tokens of the step in, logits out unless no row wants them, and the tokens
/// drawn from them if the key asks for that; last hidden states of the rows that the key names.
///
/// The last MLP runs only for the rows that get logits: nothing else reads its result.
pub fn decoder(b: &mut PlanBuilder, spec: &Spec) {
    let mut hidden = embed(b, spec);
    let Some((last, before)) = spec.layers.split_last() else {
        return;
    };
    let places = spec.cache_places();
    for (l, &cache) in before.iter().zip(&places) {
        hidden = layer(b, spec, l, cache, hidden);
    }
    let (hidden, x) = attention_half(b, spec, last, places[before.len()], hidden);
    if b.key().out_rows > 0 {
        let x = x.map(|x| b.gather_out_rows(x));
        let rows = b.gather_out_rows(hidden);
        let rows = mlp_half(b, last, rows, x);
        let out = logits(b, spec, rows);
        b.output("logits", out);
        if let Some(tokens) = b.sample(out) {
            b.output("tokens", tokens);
        }
    }
    if b.key().extras.hidden_rows > 0 {
        let x = x.map(|x| b.gather_hidden_rows(x));
        let rows = b.gather_hidden_rows(hidden);
        let rows = mlp_half(b, last, rows, x);
        let out = norm(b, Some(&spec.final_norm), rows);
        b.output("hidden", out);
    }
}

fn part(b: &mut PlanBuilder, spec: &LinearSpec) -> Part {
    let bias = spec
        .bias
        .then(|| b.weight(&spec.bias_key(), &[spec.outputs]));
    let weight = matrix(b, spec);
    Part { weight, bias }
}

fn matrix(b: &mut PlanBuilder, spec: &LinearSpec) -> WeightId {
    b.weight(&spec.key, &[spec.outputs, spec.inputs])
}

/// `hidden += scale norm(x W^T + bias)`, in place; returns `hidden`.
fn add(
    b: &mut PlanBuilder,
    linear: &LinearSpec,
    (post, scale): (Option<&NormSpec>, f32),
    x: Slot,
    hidden: Slot,
) -> Slot {
    let part = part(b, linear);
    if post.is_none() && scale == 1.0 {
        return b.linear_add(x, &part, hidden);
    }
    let product = b.linear(x, &[part])[0];
    match post {
        Some(n) if scale == 1.0 => norm_add(b, n, product, hidden),
        post => {
            let product = norm(b, post, product);
            b.scale_add(product, scale, hidden)
        }
    }
}

/// `hidden += norm(x)`.
fn norm_add(b: &mut PlanBuilder, spec: &NormSpec, x: Slot, hidden: Slot) -> Slot {
    if let NormKind::Rms { offset } = spec.kind {
        let weight = b.weight(&spec.key, &[spec.dim]);
        return b.rms_norm_add(x, weight, spec.eps, offset, hidden);
    }
    let x = norm(b, Some(spec), x);
    b.scale_add(x, 1.0, hidden)
}
