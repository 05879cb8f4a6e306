//! The list of tensors a model needs, derived from its spec.

use crate::spec::{
    DenseMlp, HeadNormOver, HeadNormSpec, LayerSpec, LinearSpec, MlpSpec, NormKind, NormSpec, Spec,
};

/// What a weight is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// Token table `[vocab, hidden]`, or learned positions `[count, hidden]`; never quantized.
    Embedding,
    /// Weight of a norm, `[n]` or `[heads, n]`; never quantized.
    Norm,
    /// Rows that weigh experts, `[experts, hidden]`; never quantized.
    Router,
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
    /// `[outputs, inputs]`, `[n]` or `[heads, n]`.
    pub shape: Vec<usize>,
    /// Name of the bias, if there is one: `[outputs]` of a linear, `[n]` of a norm.
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
    if let Some(positions) = &spec.embed.positions {
        keys.push(WeightKey {
            name: positions.key.clone(),
            shape: vec![positions.count, spec.hidden],
            ..keys[0].clone()
        });
    }
    for (i, layer) in spec.layers.iter().enumerate() {
        attention_keys(&mut keys, layer, Module::Attention(i));
        mlp_keys(&mut keys, layer, Module::Mlp(i));
    }
    keys.extend(norm_key(&spec.final_norm, Module::Head));
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
    keys.extend(layer.attn_norm.iter().filter_map(|n| norm_key(n, module)));
    let qkv = attn.qkv_site();
    keys.extend([&attn.q, &attn.k, &attn.v].map(|l| linear_key(l, module, &qkv)));
    let norms = [(&attn.q_norm, attn.heads), (&attn.k_norm, attn.kv_heads)];
    for (norm, heads) in norms {
        keys.extend(norm.iter().map(|n| head_norm_key(n, heads, module)));
    }
    keys.push(linear_key(&attn.o, module, &attn.o.key));
    keys.extend(layer.attn_post.iter().filter_map(|n| norm_key(n, module)));
}

fn mlp_keys(keys: &mut Vec<WeightKey>, layer: &LayerSpec, module: Module) {
    keys.extend(layer.mlp_norm.iter().filter_map(|n| norm_key(n, module)));
    match &layer.mlp {
        MlpSpec::Dense(mlp) => dense_keys(keys, mlp, module),
        MlpSpec::Moe(moe) => {
            keys.push(router_key(&moe.router, module));
            for expert in &moe.experts {
                dense_keys(keys, expert, module);
            }
            if let Some(shared) = &moe.shared {
                keys.extend(shared.gate.iter().map(|g| router_key(g, module)));
                dense_keys(keys, &shared.mlp, module);
            }
        }
    }
    keys.extend(layer.mlp_post.iter().filter_map(|n| norm_key(n, module)));
}

fn dense_keys(keys: &mut Vec<WeightKey>, mlp: &DenseMlp, module: Module) {
    let site = mlp.gate_up_site();
    keys.extend(mlp.branches().map(|l| linear_key(l, module, &site)));
    keys.push(linear_key(&mlp.down, module, &mlp.down.key));
}

/// The weight of a norm, if it has one.
fn norm_key(norm: &NormSpec, module: Module) -> Option<WeightKey> {
    if norm.kind == NormKind::Plain {
        return None;
    }
    Some(WeightKey {
        name: norm.key.clone(),
        kind: WeightKind::Norm,
        shape: vec![norm.dim],
        bias: norm.bias_key(),
        module,
        site: None,
    })
}

fn head_norm_key(norm: &HeadNormSpec, heads: usize, module: Module) -> WeightKey {
    let kind = match norm.over {
        HeadNormOver::Head => WeightKind::HeadNorm { heads },
        HeadNormOver::EachHead | HeadNormOver::Row => WeightKind::Norm,
    };
    WeightKey {
        name: norm.norm.key.clone(),
        kind,
        shape: norm.weight_shape(heads),
        bias: None,
        module,
        site: None,
    }
}

fn router_key(router: &LinearSpec, module: Module) -> WeightKey {
    WeightKey {
        kind: WeightKind::Router,
        site: None,
        ..linear_key(router, module, "")
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
