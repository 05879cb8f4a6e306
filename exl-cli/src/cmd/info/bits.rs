//! Bits per weight, from the sizes in the files.

use exl_models::{ModelSource, Module, WeightKey, WeightKind};
use serde::Serialize;

/// Where a checkpoint's bytes are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Bits {
    /// How the decoder's linears are stored.
    pub(crate) storage: String,
    /// Bytes of all weight files.
    pub(crate) bytes: u64,
    /// Average over the decoder's linears, scales and permutations included.
    pub(crate) bpw: f64,
    /// Of the output head; of the embedding when that stands in for it.
    pub(crate) head_bpw: f64,
    /// By kind of tensor.
    pub(crate) tensors: Vec<TensorBits>,
    /// Average over the linears of each layer.
    #[serde(rename = "layer_bpw")]
    pub(crate) layers: Vec<f64>,
}

/// All tensors of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TensorBits {
    pub(crate) name: String,
    pub(crate) storage: String,
    pub(crate) count: usize,
    pub(crate) parameters: u64,
    pub(crate) bytes: u64,
    pub(crate) bpw: f64,
}

/// Sums weights and bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    parameters: u64,
    bytes: u64,
}

impl Sum {
    fn add(&mut self, parameters: u64, bytes: u64) {
        self.parameters += parameters;
        self.bytes += bytes;
    }

    fn bpw(self) -> f64 {
        if self.parameters == 0 {
            0.0
        } else {
            self.bytes as f64 * 8.0 / self.parameters as f64
        }
    }
}

/// Counts the bits of an opened model.
pub(crate) fn bits(source: &ModelSource) -> Bits {
    let mut tensors: Vec<(TensorBits, Sum)> = Vec::new();
    let mut layers = vec![Sum::default(); source.spec().layers.len()];
    let (mut linears, mut head) = (Sum::default(), Sum::default());
    let mut storage = String::new();
    for key in source.layout() {
        let (parameters, bytes) = (key.parameters(), source.file_bytes(key));
        let stored = source.storage(key).to_string();
        if let (Module::Attention(i) | Module::Mlp(i), true) = (key.module, key.is_linear()) {
            layers[i].add(parameters, bytes);
            linears.add(parameters, bytes);
            storage.clone_from(&stored);
        }
        if matches!(key.kind, WeightKind::Head { .. }) {
            head.add(parameters, bytes);
        }
        add_tensor(&mut tensors, key, &stored, (parameters, bytes));
    }
    if head.parameters == 0 {
        head = tensors.first().map(|(_, sum)| *sum).unwrap_or_default();
    }
    Bits {
        storage,
        bytes: source.files().file_bytes(),
        bpw: linears.bpw(),
        head_bpw: head.bpw(),
        tensors: tensors
            .into_iter()
            .map(|(row, sum)| finish(row, sum))
            .collect(),
        layers: layers.into_iter().map(Sum::bpw).collect(),
    }
}

fn finish(row: TensorBits, sum: Sum) -> TensorBits {
    TensorBits {
        parameters: sum.parameters,
        bytes: sum.bytes,
        bpw: sum.bpw(),
        ..row
    }
}

fn add_tensor(
    tensors: &mut Vec<(TensorBits, Sum)>,
    key: &WeightKey,
    stored: &str,
    (parameters, bytes): (u64, u64),
) {
    let name = kind_name(key);
    let at = tensors
        .iter()
        .position(|(row, _)| row.name == name && row.storage == stored);
    let at = at.unwrap_or_else(|| {
        let row = TensorBits {
            name: name.to_owned(),
            storage: stored.to_owned(),
            count: 0,
            parameters: 0,
            bytes: 0,
            bpw: 0.0,
        };
        tensors.push((row, Sum::default()));
        tensors.len() - 1
    });
    tensors[at].0.count += 1;
    tensors[at].1.add(parameters, bytes);
}

/// The name without its layer: `q_proj`, `embed_tokens`, `norms`.
fn kind_name(key: &WeightKey) -> &str {
    match key.kind {
        WeightKind::Norm | WeightKind::HeadNorm { .. } => "norms",
        _ => key.name.rsplit('.').next().unwrap_or(&key.name),
    }
}
