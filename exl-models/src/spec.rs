//! What a model is, layer by layer, as plain data.
//!
//! Architecture files fill a [`Spec`]; everything else (the list of weights, the plans, memory
//! figures) is derived from it. Fields describe what a layer does, not which family it is from.

use exl_tensor::{Activation, KvShape, KvType, RopeStyle};

use crate::rope::RopeTable;

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The `architectures` string of the configuration.
    pub architecture: String,
    /// Name of the family whose rules apply, e.g. `llama`.
    pub family: &'static str,
    /// Vocabulary size: rows of the embedding and width of the logits.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Positions the model was trained or configured for.
    pub max_context: usize,
    /// Positions the rope tables were made for: the user's choice, else `max_context`.
    pub context: usize,
    /// Token embedding.
    pub embed: EmbedSpec,
    /// The layers in order.
    pub layers: Vec<LayerSpec>,
    /// Norm before the head.
    pub final_norm: NormSpec,
    /// Output head.
    pub head: HeadSpec,
    /// Rotary tables that attention refers to by index.
    pub ropes: Vec<RopeTable>,
}

/// Token embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedSpec {
    /// Base name of the table.
    pub key: String,
    /// Multiplies every row.
    pub scale: f32,
}

/// Output head.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadSpec {
    /// The projection, `hidden` to `vocab`.
    pub linear: LinearSpec,
    /// The embedding stands in when the checkpoint has no separate head.
    pub tied: bool,
    /// Multiplies the logits.
    pub scale: f32,
    /// Final soft-cap, 0 for none.
    pub softcap: f32,
}

/// One decoder layer: `h += attn(norm h)`, `h += mlp(norm h)`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Norm before attention.
    pub attn_norm: NormSpec,
    /// Attention.
    pub attn: AttnSpec,
    /// Norm before the MLP.
    pub mlp_norm: NormSpec,
    /// Feed-forward half.
    pub mlp: MlpSpec,
}

/// RMS norm `x / sqrt(mean(x^2) + eps) * (w + offset)`.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// Base name of the weight.
    pub key: String,
    /// Normalised length.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight.
    pub offset: f32,
}

/// A linear layer stored as `[outputs, inputs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Base name of the tensors.
    pub key: String,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
    /// Whether a bias follows.
    pub bias: bool,
}

/// Causal grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttnSpec {
    /// Base name of the block, e.g. `model.layers.0.self_attn`.
    pub key: String,
    /// Query projection.
    pub q: LinearSpec,
    /// Key projection.
    pub k: LinearSpec,
    /// Value projection.
    pub v: LinearSpec,
    /// Output projection.
    pub o: LinearSpec,
    /// Norm over each query head, before the rotation.
    pub q_norm: Option<NormSpec>,
    /// Norm over each key head, before the rotation.
    pub k_norm: Option<NormSpec>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Score soft-cap, 0 for none.
    pub softcap: f32,
    /// Sliding window in tokens, the query's own included; 0 for none.
    pub window: usize,
    /// Index into [`Spec::ropes`]; `None` for no rotation.
    pub rope: Option<usize>,
    /// Pairing of the rotation.
    pub style: RopeStyle,
}

/// Gated MLP `down(act(gate x) * up x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    /// Base name of the block, e.g. `model.layers.0.mlp`.
    pub key: String,
    /// Activated branch.
    pub gate: LinearSpec,
    /// Multiplied branch.
    pub up: LinearSpec,
    /// Output projection.
    pub down: LinearSpec,
    /// Activation of the gate.
    pub act: Activation,
}

impl Spec {
    /// Shape of the KV cache of the whole model. Every layer has the same heads: parsing checks
    /// it.
    pub fn kv_shape(&self, kv: KvType) -> KvShape {
        self.cache_shape(self.layers.len(), kv)
    }

    /// Shape of the KV cache that plans of a single layer use: one layer, at index 0.
    pub fn block_kv_shape(&self, kv: KvType) -> KvShape {
        self.cache_shape(1, kv)
    }

    fn cache_shape(&self, layers: usize, kv: KvType) -> KvShape {
        let (kv_heads, head_dim) = self
            .layers
            .first()
            .map_or((0, 0), |l| (l.attn.kv_heads, l.attn.head_dim));
        KvShape {
            layers,
            kv_heads,
            head_dim,
            kv,
        }
    }

    /// Whether its tokens may have positions on axes.
    pub fn has_axes(&self) -> bool {
        self.ropes.iter().any(|rope| rope.sections.is_some())
    }

    /// Name of the weight that holds a rope table.
    pub fn rope_weight(index: usize) -> String {
        format!("rope.inv_freq.{index}")
    }

    /// Number of weights, biases and norms included; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        crate::layout(self).iter().map(|k| k.parameters()).sum()
    }
}

impl AttnSpec {
    /// Name of the input that q, k and v share.
    pub fn qkv_site(&self) -> String {
        format!("{}.qkv", self.key)
    }
}

impl MlpSpec {
    /// Name of the input that gate and up share.
    pub fn gate_up_site(&self) -> String {
        format!("{}.gate_up", self.key)
    }
}

impl LinearSpec {
    /// Name of the bias.
    pub fn bias_key(&self) -> String {
        format!("{}.bias", self.key)
    }
}
