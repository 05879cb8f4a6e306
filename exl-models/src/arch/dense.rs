//! What the Llama-shaped families share: sizes under their usual keys, tensors under Llama's
//! names, pre-norm layers with grouped-query attention and a gated MLP.

use exl_format::ConfigFile;
use exl_tensor::{Activation, RopeStyle};

use crate::Result;
use crate::params::{MAX_CONTEXT, MAX_HEAD_DIM, MAX_LAYERS, MAX_SIZE, Params};
use crate::rope::{RopeOptions, RopeParams};
use crate::spec::{AttnSpec, EmbedSpec, HeadSpec, LayerSpec, LinearSpec, MlpSpec, NormSpec, Spec};

/// Where a family differs from plain Llama.
pub(super) struct Dense {
    pub(super) family: &'static str,
    /// Bias on q, k and v.
    pub(super) qkv_bias: bool,
    /// Bias on o.
    pub(super) o_bias: bool,
    /// RMS norm over each head of q and k.
    pub(super) head_norm: bool,
    /// Sliding window of every layer, 0 for none; empty when no layer has one.
    pub(super) windows: Vec<usize>,
}

struct Sizes {
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    act: Activation,
    mlp_bias: bool,
}

/// Number of decoder layers.
pub(super) fn layers(p: Params<'_>) -> Result<usize> {
    p.size(&["num_hidden_layers", "n_layers", "n_layer"], MAX_LAYERS)
}

/// Windows by `layer_types`, else by a rule on the layer's index.
pub(super) fn windows(
    p: Params<'_>,
    window: usize,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<usize>> {
    let count = layers(p)?;
    let lookup = p.key(&["layer_types"]);
    let Some(types) = lookup.array()? else {
        return Ok((0..count)
            .map(|i| if slides(i) { window } else { 0 })
            .collect());
    };
    if types.len() != count {
        let found = types.len().to_string();
        return Err(lookup.error(format!("{count} entries"), found).into());
    }
    let one = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok(0),
        Some("sliding_attention") => Ok(window),
        _ => Err(lookup
            .error("full_attention or sliding_attention", kind.to_string())
            .into()),
    };
    types.iter().map(one).collect()
}

impl Dense {
    /// Reads the rest of the configuration.
    pub(super) fn spec(self, config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
        let p = Params(config);
        let sizes = Sizes::read(p)?;
        let max_context = p
            .positive(
                &[
                    "max_sequence_length",
                    "model_max_length",
                    "max_position_embeddings",
                    "max_seq_len",
                    "n_positions",
                ],
                MAX_CONTEXT,
            )?
            .unwrap_or(2048);
        let rope = RopeParams::read(config, None, sizes.head_dim, max_context)?;
        let vocab = p.size(&["vocab_size"], MAX_SIZE)?;
        let head = linear("lm_head", sizes.hidden, vocab, false);
        Ok(Spec {
            architecture: config.architecture()?.to_owned(),
            family: self.family,
            vocab,
            hidden: sizes.hidden,
            max_context,
            context: options.context.unwrap_or(max_context),
            embed: EmbedSpec {
                key: "model.embed_tokens".to_owned(),
                scale: 1.0,
            },
            layers: (0..layers(p)?).map(|i| self.layer(i, &sizes)).collect(),
            final_norm: sizes.norm("model.norm", sizes.hidden),
            head: HeadSpec {
                linear: head,
                tied: p.flag("tie_word_embeddings")?,
                scale: 1.0,
                softcap: 0.0,
            },
            ropes: vec![rope.table(options)],
        })
    }

    fn layer(&self, index: usize, s: &Sizes) -> LayerSpec {
        let at = format!("model.layers.{index}");
        let mlp = |name: &str, inputs, outputs| {
            linear(&format!("{at}.mlp.{name}"), inputs, outputs, s.mlp_bias)
        };
        LayerSpec {
            attn_norm: s.norm(&format!("{at}.input_layernorm"), s.hidden),
            attn: self.attention(&format!("{at}.self_attn"), index, s),
            mlp_norm: s.norm(&format!("{at}.post_attention_layernorm"), s.hidden),
            mlp: MlpSpec {
                gate: mlp("gate_proj", s.hidden, s.inner),
                up: mlp("up_proj", s.hidden, s.inner),
                down: mlp("down_proj", s.inner, s.hidden),
                act: s.act,
                key: format!("{at}.mlp"),
            },
        }
    }

    fn attention(&self, at: &str, index: usize, s: &Sizes) -> AttnSpec {
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let part =
            |name: &str, outputs| linear(&format!("{at}.{name}"), s.hidden, outputs, self.qkv_bias);
        let head_norm = |name: &str| {
            self.head_norm
                .then(|| s.norm(&format!("{at}.{name}"), s.head_dim))
        };
        AttnSpec {
            key: at.to_owned(),
            q: part("q_proj", q),
            k: part("k_proj", kv),
            v: part("v_proj", kv),
            o: linear(&format!("{at}.o_proj"), q, s.hidden, self.o_bias),
            q_norm: head_norm("q_norm"),
            k_norm: head_norm("k_norm"),
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            scale: (s.head_dim as f32).sqrt().recip(),
            softcap: 0.0,
            window: self.windows.get(index).copied().unwrap_or(0),
            rope: Some(0),
            style: RopeStyle::Neox,
        }
    }
}

impl Sizes {
    fn read(p: Params<'_>) -> Result<Self> {
        let hidden = p.size(&["hidden_size", "d_model", "n_embd"], MAX_SIZE)?;
        let head_keys = ["num_attention_heads", "n_heads", "n_head"];
        let explicit = p.positive(&["head_dim"], MAX_HEAD_DIM)?;
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
        Ok(Self {
            hidden,
            inner: p.size(
                &[
                    "intermediate_size",
                    "ffn_config->ffn_hidden_size",
                    "n_inner",
                ],
                MAX_SIZE,
            )?,
            heads,
            kv_heads,
            head_dim,
            eps: epsilon(p)?,
            act: activation(p)?,
            mlp_bias: p.flag("mlp_bias")?,
        })
    }

    fn norm(&self, key: &str, dim: usize) -> NormSpec {
        NormSpec {
            key: key.to_owned(),
            dim,
            eps: self.eps,
            offset: 0.0,
        }
    }
}

fn linear(key: &str, inputs: usize, outputs: usize, bias: bool) -> LinearSpec {
    LinearSpec {
        key: key.to_owned(),
        inputs,
        outputs,
        bias,
    }
}

/// Added to the mean square of a norm's input.
fn epsilon(p: Params<'_>) -> Result<f32> {
    let lookup = p.key(&["rms_norm_eps"]);
    let eps = lookup.required(lookup.number()?)?;
    if (0.0..1.0).contains(&eps) {
        return Ok(eps as f32);
    }
    Err(lookup
        .error("a number of at least 0 and below 1", eps.to_string())
        .into())
}

fn activation(p: Params<'_>) -> Result<Activation> {
    let lookup = p.key(&["hidden_act", "hidden_activation"]);
    match lookup.string()?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(lookup
            .error("silu, gelu or gelu_pytorch_tanh", other)
            .into()),
    }
}
