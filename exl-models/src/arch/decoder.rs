//! What all families share: sizes under their usual keys, tensors under Llama's names. A family
//! starts from a [`Decoder`], which is Llama, and changes what differs.

use exl_format::ConfigFile;
use exl_tensor::{Activation, RopeStyle, RouteNorm};

use super::sizes::{Sizes, activation, epsilon, layers};
use crate::Result;
use crate::params::{MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, Params};
use crate::rope::{RopeOptions, RopeParams, RopeTable};
use crate::spec::{HeadNormOver, NormKind};

/// A model as its configuration says, before its layers are written out.
#[derive(Clone, Debug)]
pub(super) struct Decoder {
    pub(super) architecture: String,
    pub(super) family: &'static str,
    /// Before every tensor's name.
    pub(super) prefix: &'static str,
    /// Before the names of what the files hold for other senses.
    pub(super) towers: &'static [&'static str],
    pub(super) sizes: Sizes,
    pub(super) norm: NormKind,
    pub(super) eps: f32,
    pub(super) names: Names,
    /// Attention and MLP read the same and are added together.
    pub(super) parallel: bool,
    /// Bias on q, k and v.
    pub(super) qkv_bias: bool,
    /// Bias on o.
    pub(super) o_bias: bool,
    /// Bias in the MLP.
    pub(super) mlp_bias: bool,
    /// Norms of queries and keys.
    pub(super) head_norm: Option<(NormKind, HeadNormOver)>,
    /// Multiplies the scores.
    pub(super) scale: f32,
    /// Soft-cap of the scores, 0 for none.
    pub(super) softcap: f32,
    /// Largest value of q, k and v.
    pub(super) clip: Option<f32>,
    /// Sliding window of every layer, 0 for none; empty when no layer has one.
    pub(super) windows: Vec<usize>,
    /// Rotary tables.
    pub(super) ropes: Vec<RopeTable>,
    /// Table of every layer; empty when all layers have the first one.
    pub(super) layer_ropes: Vec<Option<usize>>,
    /// Pairing of the rotation.
    pub(super) style: RopeStyle,
    pub(super) act: Activation,
    /// Experts, and which layers have none.
    pub(super) experts: Option<Experts>,
    /// Multiplies the embedding.
    pub(super) embed_scale: f32,
    /// Learned positions, as many.
    pub(super) positions: Option<usize>,
    /// Multiplies what each half of a layer adds.
    pub(super) residual_scale: f32,
    /// Multiplies the logits.
    pub(super) logit_scale: f32,
    /// Soft-cap of the logits, 0 for none.
    pub(super) final_softcap: f32,
    /// The embedding stands in for a missing head.
    pub(super) tied: bool,
    /// Positions of the configuration.
    pub(super) max_context: usize,
    /// Positions that the rotary tables are for.
    pub(super) context: usize,
}

/// Names of what is called differently in some families, within a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// Norm before attention.
    pub(super) attn_norm: Option<&'static str>,
    /// Norm on what attention adds.
    pub(super) attn_post: Option<&'static str>,
    /// Norm before the MLP.
    pub(super) mlp_norm: Option<&'static str>,
    /// Norm on what the MLP adds.
    pub(super) mlp_post: Option<&'static str>,
    /// The MLP.
    pub(super) mlp: &'static str,
    /// Its branches and output; without a gate the MLP has one branch.
    pub(super) gate: Option<&'static str>,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
}

/// Mixture of experts.
#[derive(Clone, Debug)]
pub(super) struct Experts {
    /// Block with the router `gate` and the `experts`.
    pub(super) block: &'static str,
    /// Gate, up and down of an expert.
    pub(super) names: [&'static str; 3],
    pub(super) count: usize,
    pub(super) top_k: usize,
    pub(super) inner: usize,
    pub(super) norm: RouteNorm,
    /// Width of an expert for all tokens, with a gate of its own.
    pub(super) shared: Option<usize>,
    /// Layers with an MLP instead; empty when there are none.
    pub(super) dense: Vec<bool>,
}

const LLAMA: Names = Names {
    attn_norm: Some("input_layernorm"),
    attn_post: None,
    mlp_norm: Some("post_attention_layernorm"),
    mlp_post: None,
    mlp: "mlp",
    gate: Some("gate_proj"),
    up: "up_proj",
    down: "down_proj",
};

const CONTEXT: [&str; 5] = [
    "max_sequence_length",
    "model_max_length",
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
];

impl Decoder {
    /// Llama with what the configuration says.
    pub(super) fn new(
        family: &'static str,
        config: &ConfigFile,
        options: &RopeOptions,
    ) -> Result<Self> {
        let p = Params(config);
        let sizes = Sizes::read(p)?;
        let max_context = p.positive(&CONTEXT, MAX_CONTEXT)?.unwrap_or(2048);
        let rope = RopeParams::read(config, None, sizes.head_dim, max_context)?;
        let bias = p.flag("attention_bias")?;
        Ok(Self {
            architecture: config.architecture()?.to_owned(),
            family,
            prefix: "",
            towers: &[],
            sizes,
            norm: NormKind::Rms { offset: 0.0 },
            eps: epsilon(p)?,
            names: LLAMA,
            parallel: false,
            qkv_bias: bias,
            o_bias: bias,
            mlp_bias: p.flag("mlp_bias")?,
            head_norm: None,
            scale: (sizes.head_dim as f32).sqrt().recip(),
            softcap: 0.0,
            clip: None,
            windows: vec![],
            ropes: vec![rope.table(options)],
            layer_ropes: vec![],
            style: RopeStyle::Neox,
            act: activation(p)?,
            experts: None,
            embed_scale: 1.0,
            positions: None,
            residual_scale: 1.0,
            logit_scale: 1.0,
            final_softcap: 0.0,
            tied: p.flag("tie_word_embeddings")?,
            max_context,
            context: options.context.unwrap_or(max_context),
        })
    }

    /// Learned positions in place of rotation, with the norms, names and biases of GPT-2.
    pub(super) fn into_gpt(mut self) -> Self {
        self.norm = NormKind::Layer { bias: true };
        self.names = Names {
            attn_norm: Some("ln_1"),
            mlp_norm: Some("ln_2"),
            gate: None,
            up: "c_fc",
            down: "c_proj",
            ..self.names
        };
        (self.qkv_bias, self.o_bias, self.mlp_bias) = (true, true, true);
        self.positions = Some(self.max_context);
        self.context = self.context.min(self.max_context);
        self.ropes.clear();
        self.layer_ropes = vec![None; self.sizes.layers];
        self
    }

    /// Norms on what a layer's halves add.
    pub(super) fn with_post_norms(mut self, attn: &'static str, mlp: &'static str) -> Self {
        self.names.attn_post = Some(attn);
        self.names.mlp_post = Some(mlp);
        self
    }
}

impl Experts {
    /// Experts under the usual keys and Qwen's names, without one that all tokens go through.
    pub(super) fn read(p: Params<'_>, inner: usize, norm: RouteNorm) -> Result<Self> {
        let keys = [
            "num_local_experts",
            "ffn_config->moe_num_experts",
            "num_experts",
        ];
        let count = p.size(&keys, MAX_EXPERTS)?;
        let all = count * layers(p)?;
        if all > MAX_LAYERS * 16 {
            let expected = format!("at most {} experts in all layers", MAX_LAYERS * 16);
            return Err(p.key(&keys).error(expected, all.to_string()).into());
        }
        let keys = ["num_experts_per_tok", "ffn_config->moe_top_k"];
        Ok(Self {
            block: "mlp",
            names: ["gate_proj", "up_proj", "down_proj"],
            count,
            top_k: p.size(&keys, count)?,
            inner,
            norm,
            shared: None,
            dense: vec![],
        })
    }
}
