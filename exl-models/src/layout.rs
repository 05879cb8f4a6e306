//! The list of tensors a model needs, derived from its spec.

use crate::spec::{LayerSpec, LinearSpec, NormSpec, Spec};

/// What a weight is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// Token table `[vocab, hidden]`; never quantized.
    Embedding,
    /// Vector of a norm `[n]`; never quantized.
    Norm,
    /// Vector of a norm over each head `[head_dim]`, in files also `[heads, head_dim]` with equal
    /// rows; never quantized.
    HeadNorm {
        /// Number of heads it is used for.
        heads: usize,
    },
    /// Linear layer `[outputs, inputs]` of a decoder layer.
    Linear,
    /// Output head `[vocab, hidden]`.
    Head {
        /// The table that stands in when the checkpoint has no separate head.
        tied_to: Option<String>,
    },
}

/// Which part of the model a weight belongs to, in model order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Module {
    /// Token embedding.
    Embedding,
    /// Attention half of a layer, its norm included.
    Attention(usize),
    /// MLP half of a layer, its norm included.
    Mlp(usize),
    /// Final norm and head.
    Head,
}

impl Module {
    fn position(self) -> usize {
        match self {
            Module::Embedding => 0,
            Module::Attention(i) => 2 * i + 1,
            Module::Mlp(i) => 2 * i + 2,
            Module::Head => usize::MAX,
        }
    }
}

impl Ord for Module {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.position().cmp(&other.position())
    }
}

impl PartialOrd for Module {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// One logical weight of a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WeightKey {
    /// Base name: the file's tensor without `.weight` or a quantization suffix. Plans and
    /// [`exl_tensor::Weights`] use it too.
    pub name: String,
    /// What it is.
    pub kind: WeightKind,
    /// `[outputs, inputs]` or `[n]`.
    pub shape: Vec<usize>,
    /// Name of the bias `[outputs]`, if the layer has one.
    pub bias: Option<String>,
    /// Where it belongs.
    pub module: Module,
    /// Name of the input it reads, which other linears may share: the tap of that input in
    /// calibration plans. `None` for weights that are no linears.
    pub site: Option<String>,
}

/// An input that one or more linears read: they share one Hessian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Name of the tap.
    pub name: String,
    /// Where it belongs.
    pub module: Module,
    /// Input features.
    pub inputs: usize,
    /// Names of the linears.
    pub linears: Vec<String>,
}

impl WeightKey {
    /// Whether it is a linear layer: quantizable.
    pub fn is_linear(&self) -> bool {
        self.site.is_some()
    }

    /// Elements of the weight and its bias; none for a head that is the embedding.
    pub fn parameters(&self) -> u64 {
        if matches!(&self.kind, WeightKind::Head { tied_to: Some(_) }) {
            return 0;
        }
        let bias = if self.bias.is_some() {
            self.shape[0]
        } else {
            0
        };
        (self.shape.iter().product::<usize>() + bias) as u64
    }
}

/// Every weight in model order.
pub fn layout(spec: &Spec) -> Vec<WeightKey> {
    let mut keys = vec![WeightKey {
        name: spec.embed.key.clone(),
        kind: WeightKind::Embedding,
        shape: vec![spec.vocab, spec.hidden],
        bias: None,
        module: Module::Embedding,
        site: None,
    }];
    for (i, layer) in spec.layers.iter().enumerate() {
        attention_keys(&mut keys, layer, Module::Attention(i));
        mlp_keys(&mut keys, layer, Module::Mlp(i));
    }
    keys.push(norm_key(&spec.final_norm, WeightKind::Norm, Module::Head));
    let head = &spec.head.linear;
    let tied_to = spec.head.tied.then(|| spec.embed.key.clone());
    let mut key = linear_key(head, Module::Head, &head.key);
    key.kind = WeightKind::Head { tied_to };
    keys.push(key);
    keys
}

/// The inputs of all linears in model order.
pub fn sites(spec: &Spec) -> Vec<Site> {
    let mut sites: Vec<Site> = Vec::new();
    for key in layout(spec) {
        let Some(name) = key.site else { continue };
        match sites.last_mut() {
            Some(site) if site.name == name => site.linears.push(key.name),
            _ => sites.push(Site {
                name,
                module: key.module,
                inputs: key.shape[1],
                linears: vec![key.name],
            }),
        }
    }
    sites
}

fn attention_keys(keys: &mut Vec<WeightKey>, layer: &LayerSpec, module: Module) {
    let attn = &layer.attn;
    keys.push(norm_key(&layer.attn_norm, WeightKind::Norm, module));
    let qkv = attn.qkv_site();
    keys.extend([&attn.q, &attn.k, &attn.v].map(|l| linear_key(l, module, &qkv)));
    let norms = [(&attn.q_norm, attn.heads), (&attn.k_norm, attn.kv_heads)];
    for (norm, heads) in norms {
        keys.extend(
            norm.iter()
                .map(|n| norm_key(n, WeightKind::HeadNorm { heads }, module)),
        );
    }
    keys.push(linear_key(&attn.o, module, &attn.o.key));
}

fn mlp_keys(keys: &mut Vec<WeightKey>, layer: &LayerSpec, module: Module) {
    let mlp = &layer.mlp;
    keys.push(norm_key(&layer.mlp_norm, WeightKind::Norm, module));
    let gate_up = mlp.gate_up_site();
    keys.extend([&mlp.gate, &mlp.up].map(|l| linear_key(l, module, &gate_up)));
    keys.push(linear_key(&mlp.down, module, &mlp.down.key));
}

fn norm_key(norm: &NormSpec, kind: WeightKind, module: Module) -> WeightKey {
    WeightKey {
        name: norm.key.clone(),
        kind,
        shape: vec![norm.dim],
        bias: None,
        module,
        site: None,
    }
}

fn linear_key(linear: &LinearSpec, module: Module, site: &str) -> WeightKey {
    WeightKey {
        name: linear.key.clone(),
        kind: WeightKind::Linear,
        shape: vec![linear.outputs, linear.inputs],
        bias: linear.bias.then(|| linear.bias_key()),
        module,
        site: Some(site.to_owned()),
    }
}
