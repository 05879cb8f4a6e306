//! Writes a random checkpoint, one tensor at a time.

use super::recipe::{Group, Linear, Recipe};
use super::shape::Shape;
use super::tokenizer;
use super::weights::{RandomLinear, embedding, permutation};
use crate::failure::Interrupted;
use crate::signal::StopFlag;
use crate::ui::{Progress, Ui};
use anyhow::{Context, Result, bail};
use exl_format::{CheckpointWriter, Dtype, TensorSpec, WriterOptions, write_file_atomic};
use half::f16;
use serde_json::Value;
use std::path::Path;

/// A tensor set of the model, in file order.
#[derive(Clone, Debug)]
enum Item {
    Embedding,
    Norm(String),
    /// Rows that weigh this many experts.
    Router(String, usize),
    Linear {
        key: String,
        groups: Vec<Group>,
        outputs: usize,
        order_seed: u64,
    },
}

/// Writes weights, configuration and tokenizer of a model with random weights into `dir`.
pub(crate) fn write_checkpoint(
    (shape, recipe): (&Shape, Recipe),
    dir: &Path,
    threads: usize,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<()> {
    if dir.join("config.json").exists() {
        bail!(
            "{} holds a model already: name another directory with --keep",
            dir.display()
        );
    }
    let items = items(shape, recipe);
    let specs: Vec<TensorSpec> = items.iter().flat_map(|item| item.specs(shape)).collect();
    let total = specs.iter().map(TensorSpec::bytes).sum();
    let writer = CheckpointWriter::create(dir, specs, &WriterOptions::default())?;
    let progress = ui.bytes(&format!("random {}", shape.name), total);
    let mut out = Output {
        writer,
        progress,
        shape,
        threads,
    };
    for (number, item) in items.iter().enumerate() {
        if stop.is_set() {
            return Err(Interrupted("the random checkpoint was not finished".to_owned()).into());
        }
        out.item(item, number as u64 + 1)?;
    }
    out.writer.finish()?;
    json(
        dir,
        "tokenizer.json",
        &tokenizer::tokenizer_json(shape.vocab),
    )?;
    json(
        dir,
        "tokenizer_config.json",
        &tokenizer::tokenizer_config(shape.positions),
    )?;
    // Last: a directory with config.json is a whole model.
    json(dir, "config.json", &shape.config(recipe.bits()))
}

fn json(dir: &Path, name: &str, value: &Value) -> Result<()> {
    let path = dir.join(name);
    let text = serde_json::to_vec_pretty(value)?;
    write_file_atomic(&path, &text).with_context(|| format!("cannot write {}", path.display()))
}

/// Everything in the model, in the order of layers.
fn items(shape: &Shape, recipe: Recipe) -> Vec<Item> {
    let mut items = vec![Item::Embedding];
    let (q, kv) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    for layer in 0..shape.layers {
        let prefix = format!("model.layers.{layer}");
        // Matrices that read the same input share its order, as converters make them.
        let site = |n: u64| layer as u64 * 4 + n;
        let linear = |name: &str, kind: Linear, inputs: usize, outputs: usize, order_seed: u64| {
            let key = format!("{prefix}.{name}");
            Item::Linear {
                key,
                groups: recipe.groups(kind, inputs),
                outputs,
                order_seed,
            }
        };
        items.extend([
            Item::Norm(format!("{prefix}.input_layernorm")),
            linear("self_attn.q_proj", Linear::Q, shape.hidden, q, site(0)),
            linear("self_attn.k_proj", Linear::K, shape.hidden, kv, site(0)),
            linear("self_attn.v_proj", Linear::V, shape.hidden, kv, site(0)),
            linear("self_attn.o_proj", Linear::O, q, shape.hidden, site(1)),
            Item::Norm(format!("{prefix}.post_attention_layernorm")),
        ]);
        let mut mlp = |block: &str, [gate, up, down]: [&str; 3], seed: u64| {
            let (hidden, inner) = (shape.hidden, shape.intermediate);
            let (inputs, outputs) = (site(2) ^ seed << 32, site(3) ^ seed << 32);
            items.extend([
                linear(
                    &format!("{block}.{gate}"),
                    Linear::Gate,
                    hidden,
                    inner,
                    inputs,
                ),
                linear(&format!("{block}.{up}"), Linear::Up, hidden, inner, inputs),
                linear(
                    &format!("{block}.{down}"),
                    Linear::Down,
                    inner,
                    hidden,
                    outputs,
                ),
            ]);
        };
        let Some(experts) = shape.experts else {
            mlp("mlp", ["gate_proj", "up_proj", "down_proj"], 0);
            continue;
        };
        for e in 0..experts.count {
            let block = format!("block_sparse_moe.experts.{e}");
            mlp(&block, ["w1", "w3", "w2"], e as u64);
        }
        let router = format!("{prefix}.block_sparse_moe.gate");
        items.push(Item::Router(router, experts.count));
    }
    items.push(Item::Norm("model.norm".to_owned()));
    items.push(Item::Linear {
        key: "lm_head".to_owned(),
        groups: recipe.groups(Linear::Head, shape.hidden),
        outputs: shape.vocab,
        order_seed: u64::MAX,
    });
    items
}

impl Item {
    /// Names, types and shapes, in the order they are written.
    fn specs(&self, shape: &Shape) -> Vec<TensorSpec> {
        let spec = |name: String, dtype: Dtype, shape: &[usize]| TensorSpec {
            name,
            dtype,
            shape: shape.to_vec(),
        };
        match self {
            Self::Embedding => {
                let name = "model.embed_tokens.weight".to_owned();
                vec![spec(name, Dtype::F16, &[shape.vocab, shape.hidden])]
            }
            Self::Norm(key) => vec![spec(format!("{key}.weight"), Dtype::F16, &[shape.hidden])],
            Self::Router(key, experts) => {
                let name = format!("{key}.weight");
                vec![spec(name, Dtype::F16, &[*experts, shape.hidden])]
            }
            Self::Linear {
                key,
                groups,
                outputs,
                ..
            } => {
                let inputs = groups.iter().map(|g| g.rows).sum();
                let words = groups.iter().map(|g| g.rows * g.bits as usize / 32).sum();
                let count = groups.len();
                vec![
                    spec(format!("{key}.q_weight"), Dtype::I32, &[words, *outputs]),
                    spec(format!("{key}.q_scale"), Dtype::I32, &[count, outputs / 8]),
                    spec(format!("{key}.q_scale_max"), Dtype::F16, &[count]),
                    spec(format!("{key}.q_groups"), Dtype::I16, &[2 * count]),
                    spec(format!("{key}.q_invperm"), Dtype::I32, &[inputs]),
                ]
            }
        }
    }
}

struct Output<'a> {
    writer: CheckpointWriter,
    progress: Progress,
    shape: &'a Shape,
    threads: usize,
}

impl Output<'_> {
    fn item(&mut self, item: &Item, seed: u64) -> Result<()> {
        let names = item.specs(self.shape);
        match item {
            Item::Embedding => {
                let values = embedding(self.shape.vocab, self.shape.hidden, seed, self.threads);
                self.tensor(&names[0], bytemuck::cast_slice(&values))
            }
            Item::Router(_, experts) => {
                let values = embedding(*experts, self.shape.hidden, seed, self.threads);
                self.tensor(&names[0], bytemuck::cast_slice(&values))
            }
            Item::Norm(_) => {
                let ones = vec![f16::ONE.to_bits(); self.shape.hidden];
                self.tensor(&names[0], bytemuck::cast_slice(&ones))
            }
            Item::Linear {
                groups,
                outputs,
                order_seed,
                ..
            } => {
                let matrix = RandomLinear::new(groups, *outputs, seed, self.threads);
                let inputs = groups.iter().map(|g| g.rows).sum();
                let order = permutation(inputs, *order_seed);
                self.tensor(&names[0], bytemuck::cast_slice(&matrix.q_weight))?;
                self.tensor(&names[1], bytemuck::cast_slice(&matrix.q_scale))?;
                self.tensor(&names[2], bytemuck::cast_slice(&matrix.q_scale_max))?;
                self.tensor(&names[3], bytemuck::cast_slice(&matrix.q_groups))?;
                self.tensor(&names[4], bytemuck::cast_slice(&order))
            }
        }
    }

    /// Files are little-endian, and so is every machine this runs on.
    fn tensor(&mut self, spec: &TensorSpec, data: &[u8]) -> Result<()> {
        self.writer.write(&spec.name, data)?;
        self.progress.add(data.len() as u64);
        Ok(())
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("random checkpoints are written in the byte order of the machine");
