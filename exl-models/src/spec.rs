//! What a model is, layer by layer, as plain data.
//!
//! Architecture files fill a [`Spec`]; everything else (the list of weights, the plans, memory
//! figures) is derived from it. Fields describe what a layer does, not which family it is from.

use exl_tensor::{Activation, KvShape, KvType, RopeStyle, RouteNorm, SlidingLayers};

use crate::rope::RopeTable;

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The `architectures` string of the configuration.
    pub architecture: String,
    /// Name of the family whose rules apply, e.g. `llama`.
    pub family: &'static str,
    /// Beginnings of the names of tensors for images and the like. They are not run; a conversion
    /// keeps them.
    pub towers: &'static [&'static str],
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
    /// Learned positions, added to the rows.
    pub positions: Option<PositionsSpec>,
}

/// A table of learned positions `[count, hidden]`.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionsSpec {
    /// Base name of the table.
    pub key: String,
    /// Positions that there are.
    pub count: usize,
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

/// One decoder layer. Sequential: `h += s P1(attn(N1 h))`, `h += s P2(mlp(N2 h))`; parallel:
/// `n = N1 h`, `h += s (attn(n) + mlp(n))`. Norms that are missing change nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// N1, before attention.
    pub attn_norm: Option<NormSpec>,
    /// Attention.
    pub attn: AttnSpec,
    /// P1, on what attention adds.
    pub attn_post: Option<NormSpec>,
    /// N2, before the MLP.
    pub mlp_norm: Option<NormSpec>,
    /// Feed-forward half.
    pub mlp: MlpSpec,
    /// P2, on what the MLP adds.
    pub mlp_post: Option<NormSpec>,
    /// The MLP reads what attention reads, and both are added.
    pub parallel: bool,
    /// s, multiplies what each half adds.
    pub residual_scale: f32,
}

/// Kind of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * (w + offset)`.
    Rms {
        /// Added to the weight.
        offset: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * w (+ b)`.
    Layer {
        /// Whether a bias is added.
        bias: bool,
    },
    /// `(x - mean) / sqrt(var + eps)`, without a weight.
    Plain,
}

/// A norm over the rows of its input.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// Base name of the weight.
    pub key: String,
    /// Normalised length.
    pub dim: usize,
    /// Added to the mean square or the variance.
    pub eps: f32,
    /// Which kind.
    pub kind: NormKind,
}

/// What a norm of queries or keys goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNormOver {
    /// Every head, with one weight `[head_dim]`.
    Head,
    /// Every head, with a weight each, `[heads, head_dim]`.
    EachHead,
    /// All heads together, with a weight `[heads * head_dim]`.
    Row,
}

/// A norm of queries or keys before the rotation.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadNormSpec {
    /// The norm; its length is that of a head, or of all heads together.
    pub norm: NormSpec,
    /// What it goes over.
    pub over: HeadNormOver,
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
    /// Norm of the queries, before the rotation.
    pub q_norm: Option<HeadNormSpec>,
    /// Norm of the keys, before the rotation.
    pub k_norm: Option<HeadNormSpec>,
    /// Queries, keys and values are kept within plus and minus this.
    pub clip: Option<f32>,
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

/// Feed-forward half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum MlpSpec {
    /// One for all tokens.
    Dense(DenseMlp),
    /// Experts that a router chooses from, token by token.
    Moe(Box<MoeSpec>),
}

/// Gated MLP `down(act(gate x) * up x)`, or `down(act(up x))` without a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseMlp {
    /// Base name of the block, e.g. `model.layers.0.mlp`.
    pub key: String,
    /// Activated branch.
    pub gate: Option<LinearSpec>,
    /// Multiplied branch, or the only one.
    pub up: LinearSpec,
    /// Output projection.
    pub down: LinearSpec,
    /// Activation of the gate, or of the only branch.
    pub act: Activation,
}

/// Mixture of experts: `sum of p_e expert_e(x)` over the likeliest experts, plus what a shared
/// expert adds.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Base name of the block.
    pub key: String,
    /// `[experts, hidden]`, never quantized.
    pub router: LinearSpec,
    /// The experts, all gated and without biases.
    pub experts: Vec<DenseMlp>,
    /// Experts that a token goes through.
    pub top_k: usize,
    /// How their probabilities are normalised.
    pub norm: RouteNorm,
    /// An expert for every token.
    pub shared: Option<SharedExpert>,
}

/// An expert that every token goes through.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// What it does.
    pub mlp: DenseMlp,
    /// `[1, hidden]`, never quantized: what it adds is multiplied by the sigmoid of this product.
    pub gate: Option<LinearSpec>,
}

impl Spec {
    /// Shape of the KV cache of the whole model. Every layer has the same heads: parsing checks
    /// it.
    pub fn kv_shape(&self, kv: KvType) -> KvShape {
        self.cache_shape((self.layers.len(), self.sliding()), kv)
    }

    /// Layers that see a window only, and the largest window.
    pub fn sliding(&self) -> SlidingLayers {
        let windows = self.layers.iter().map(|l| l.attn.window);
        let windows = windows.filter(|&window| window > 0);
        SlidingLayers {
            layers: windows.clone().count(),
            window: windows.max().unwrap_or(0),
        }
    }

    /// Shape of the KV cache that plans of a single layer use: one layer, at index 0, that keeps
    /// everything.
    pub fn block_kv_shape(&self, kv: KvType) -> KvShape {
        self.cache_shape((1, SlidingLayers::default()), kv)
    }

    /// Where each layer lies in the KV cache of the whole model: those with a window behind the others.
    pub(crate) fn cache_places(&self) -> Vec<usize> {
        let slides = |layer: &LayerSpec| layer.attn.window > 0;
        let mut next = [0, self.layers.iter().filter(|l| !slides(l)).count()];
        let place = |layer| {
            let next = &mut next[usize::from(slides(layer))];
            *next += 1;
            *next - 1
        };
        self.layers.iter().map(place).collect()
    }

    fn cache_shape(&self, (layers, sliding): (usize, SlidingLayers), kv: KvType) -> KvShape {
        let (kv_heads, head_dim) = self
            .layers
            .first()
            .map_or((0, 0), |l| (l.attn.kv_heads, l.attn.head_dim));
        KvShape {
            layers,
            sliding,
            kv_heads,
            head_dim,
            kv,
        }
    }

    /// Outputs of the query projection, and of those of keys and values.
    pub(crate) fn qkv_outputs(&self) -> (usize, usize) {
        let attn = self.layers.first().map(|l| &l.attn);
        attn.map_or((0, 0), |a| (a.q.outputs, a.k.outputs))
    }

    /// Width of the MLP that is no expert.
    pub(crate) fn dense_inner(&self) -> usize {
        let dense = |layer: &LayerSpec| match &layer.mlp {
            MlpSpec::Dense(mlp) => Some(mlp.up.outputs),
            MlpSpec::Moe(_) => None,
        };
        self.layers.iter().find_map(dense).unwrap_or(0)
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
    /// All dense parts: the one there is, or the experts and the shared one behind them.
    pub fn parts(&self) -> Vec<&DenseMlp> {
        match self {
            Self::Dense(mlp) => vec![mlp],
            Self::Moe(moe) => {
                let shared = moe.shared.iter().map(|s| &s.mlp);
                moe.experts.iter().chain(shared).collect()
            }
        }
    }
}

impl DenseMlp {
    /// Name of the input that gate and up share.
    pub fn gate_up_site(&self) -> String {
        match self.gate {
            Some(_) => format!("{}.gate_up", self.key),
            None => self.up.key.clone(),
        }
    }

    /// Gate, if there is one, and up.
    pub fn branches(&self) -> impl Iterator<Item = &LinearSpec> {
        self.gate.iter().chain([&self.up])
    }
}

impl NormSpec {
    /// Name of the bias, if there is one.
    pub fn bias_key(&self) -> Option<String> {
        match self.kind {
            NormKind::Layer { bias: true } => Some(format!("{}.bias", self.key)),
            _ => None,
        }
    }
}

impl HeadNormSpec {
    /// Shape of the weight for this many heads.
    pub fn weight_shape(&self, heads: usize) -> Vec<usize> {
        match self.over {
            HeadNormOver::EachHead => vec![heads, self.norm.dim],
            HeadNormOver::Head | HeadNormOver::Row => vec![self.norm.dim],
        }
    }
}

impl LinearSpec {
    /// Name of the bias.
    pub fn bias_key(&self) -> String {
        format!("{}.bias", self.key)
    }
}
