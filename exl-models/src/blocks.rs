//! The vocabulary of forward passes: each block records its ops on a [`PlanBuilder`].

mod attention;
mod logits;
mod mlp;

pub use attention::attention;
pub use logits::{head, logits};
pub use mlp::mlp;

use exl_tensor::{Part, PlanBuilder, Slot};

use crate::Spec;
use crate::spec::{LayerSpec, LinearSpec, NormSpec};

/// Embeds the step's tokens, with vectors in place of some if the key says so: `[rows, hidden]`.
pub fn embed(b: &mut PlanBuilder, spec: &Spec) -> Slot {
    let table = b.weight(&spec.embed.key, &[spec.vocab, spec.hidden]);
    let hidden = b.embed(table, spec.embed.scale);
    b.take_vectors(hidden);
    hidden
}

/// A norm over the rows of `x`.
pub fn norm(b: &mut PlanBuilder, spec: &NormSpec, x: Slot) -> Slot {
    let weight = b.weight(&spec.key, &[spec.dim]);
    b.rms_norm(x, weight, spec.eps, spec.offset)
}

/// A norm over each head of `x`, in place.
pub fn head_norm(b: &mut PlanBuilder, spec: &NormSpec, x: Slot) {
    let weight = b.weight(&spec.key, &[spec.dim]);
    b.head_norm(x, weight, spec.dim, spec.eps, spec.offset);
}

/// One decoder layer; `cache` is its index in the KV cache. Returns the hidden state.
pub fn layer(
    b: &mut PlanBuilder,
    spec: &Spec,
    layer: &LayerSpec,
    cache: usize,
    hidden: Slot,
) -> Slot {
    let hidden = attention(b, spec, layer, cache, hidden);
    mlp(b, layer, hidden)
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
    for (i, l) in before.iter().enumerate() {
        hidden = layer(b, spec, l, i, hidden);
    }
    hidden = attention(b, spec, last, before.len(), hidden);
    if b.key().out_rows > 0 {
        let rows = b.gather_out_rows(hidden);
        let rows = mlp(b, last, rows);
        let out = logits(b, spec, rows);
        b.output("logits", out);
        if let Some(tokens) = b.sample(out) {
            b.output("tokens", tokens);
        }
    }
    if b.key().extras.hidden_rows > 0 {
        let rows = b.gather_hidden_rows(hidden);
        let rows = mlp(b, last, rows);
        let out = norm(b, &spec.final_norm, rows);
        b.output("hidden", out);
    }
}

fn part(b: &mut PlanBuilder, spec: &LinearSpec) -> Part {
    let weight = b.weight(&spec.key, &[spec.outputs, spec.inputs]);
    let bias = spec
        .bias
        .then(|| b.weight(&spec.bias_key(), &[spec.outputs]));
    Part { weight, bias }
}
