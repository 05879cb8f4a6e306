//! Widths, counts, windows and the like, under the keys that configurations have for them.

use exl_tensor::Activation;

use crate::Result;
use crate::params::{MAX_CONTEXT, MAX_HEAD_DIM, MAX_LAYERS, MAX_SIZE, Params};

/// Widths and counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) vocab: usize,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Sizes {
    pub(super) fn read(p: Params<'_>) -> Result<Self> {
        let hidden = p.size(&["hidden_size", "d_model", "n_embd"], MAX_SIZE)?;
        let head_keys = ["num_attention_heads", "n_heads", "n_head"];
        let explicit = p.positive(&["head_dim", "kv_channels"], MAX_HEAD_DIM)?;
        let heads = match (p.positive(&head_keys, MAX_SIZE)?, explicit) {
            (Some(n), _) => n,
            (None, Some(d)) => (hidden / d).max(1),
            (None, None) => p.size(&head_keys, MAX_SIZE)?,
        };
        let kv_keys = ["num_key_value_heads", "attn_config->kv_n_heads"];
        let kv_heads = p.positive(&kv_keys, MAX_SIZE)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of the {heads} query heads");
            return Err(p.key(&kv_keys).error(expected, kv_heads.to_string()).into());
        }
        if explicit.is_none() && !hidden.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size {hidden}, or head_dim");
            return Err(p.key(&head_keys).error(expected, heads.to_string()).into());
        }
        let head_dim = explicit.unwrap_or(hidden / heads);
        if head_dim > MAX_HEAD_DIM || heads * head_dim > MAX_SIZE {
            let expected = format!(
                "heads of at most {MAX_HEAD_DIM} elements that are {MAX_SIZE} together at most"
            );
            let found = format!("{heads} heads of {head_dim}");
            return Err(p.key(&head_keys).error(expected, found).into());
        }
        let inner_keys = [
            "intermediate_size",
            "ffn_config->ffn_hidden_size",
            "n_inner",
        ];
        Ok(Self {
            vocab: p.size(&["vocab_size"], MAX_SIZE)?,
            layers: layers(p)?,
            hidden,
            inner: p.size(&inner_keys, MAX_SIZE)?,
            heads,
            kv_heads,
            head_dim,
        })
    }
}

/// Number of decoder layers.
pub(super) fn layers(p: Params<'_>) -> Result<usize> {
    p.size(&["num_hidden_layers", "n_layers", "n_layer"], MAX_LAYERS)
}

/// Which layers slide: by `layer_types`, else by a rule on the layer's index.
pub(super) fn sliding(p: Params<'_>, slides: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let count = layers(p)?;
    let lookup = p.key(&["layer_types"]);
    let Some(types) = lookup.array()? else {
        return Ok((0..count).map(slides).collect());
    };
    if types.len() != count {
        let found = types.len().to_string();
        return Err(lookup.error(format!("{count} entries"), found).into());
    }
    let one = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(lookup
            .error("full_attention or sliding_attention", kind.to_string())
            .into()),
    };
    types.iter().map(one).collect()
}

/// The window of layers that slide, 0 for none.
pub(super) fn window(p: Params<'_>) -> Result<usize> {
    let keys = ["sliding_window", "sliding_window_size"];
    Ok(p.positive(&keys, MAX_CONTEXT)?.unwrap_or(0))
}

/// Windows of all layers.
pub(super) fn windows(sliding: &[bool], window: usize) -> Vec<usize> {
    sliding
        .iter()
        .map(|&s| if s { window } else { 0 })
        .collect()
}

/// Added to the mean square or variance of a norm's input.
pub(super) fn epsilon(p: Params<'_>) -> Result<f32> {
    let keys = [
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
    ];
    let there = keys.iter().position(|k| p.key(&[*k]).value().is_some());
    let keys = there.map_or(&keys[..], |i| &keys[i..=i]);
    let lookup = p.key(keys);
    let eps = lookup.required(lookup.number()?)?;
    if (0.0..1.0).contains(&eps) {
        return Ok(eps as f32);
    }
    Err(lookup
        .error("a number of at least 0 and below 1", eps.to_string())
        .into())
}

pub(super) fn activation(p: Params<'_>) -> Result<Activation> {
    let lookup = p.key(&[
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "ffn_config->ffn_act_fn->name",
    ]);
    match lookup.string()?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        "relu2" => Ok(Activation::Relu2),
        other => Err(lookup
            .error("silu, gelu, gelu_pytorch_tanh or relu2", other)
            .into()),
    }
}
