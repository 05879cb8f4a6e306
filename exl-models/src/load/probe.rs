//! Finds how each weight is stored and checks names, shapes and types before anything is loaded.

use std::collections::HashMap;

use exl_format::{GptqFormat, ModelFiles};

use super::quantized;
use super::read::{dense_view, zero_bias};
use crate::{Error, Module, Result, WeightKey, WeightKind};

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// `.weight` in F32, F16 or BF16.
    Dense,
    /// `.q_weight` and its companions.
    Exl2,
    /// `.qweight` and its companions.
    Gptq,
    /// Not at all: the embedding stands in for the head.
    Tied,
}

/// Tensors of each kind of storage, the one that tells it first.
const EXL2: [&str; 5] = [
    "q_weight",
    "q_scale",
    "q_scale_max",
    "q_groups",
    "q_invperm",
];
const GPTQ: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

impl Storage {
    fn suffixes(self) -> &'static [&'static str] {
        match self {
            Storage::Dense => &["weight"],
            Storage::Exl2 => &EXL2,
            Storage::Gptq => &GPTQ,
            Storage::Tied => &[],
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Storage::Dense => "unquantized",
            Storage::Exl2 => "EXL2",
            Storage::Gptq => "GPTQ",
            Storage::Tied => "tied",
        })
    }
}

/// The storage of every weight.
pub(super) fn probe(files: &ModelFiles, layout: &[WeightKey]) -> Result<HashMap<String, Storage>> {
    let mut found = HashMap::new();
    let mut missing = Vec::new();
    for key in layout {
        match stored_as(files, key) {
            Some(storage) => {
                found.insert(key.name.clone(), storage);
            }
            None => missing.push((key.name.clone(), tried(key))),
        }
        if let Some(bias) = key.bias.as_ref().filter(|b| !files.contains(b)) {
            missing.push((bias.clone(), "this name"));
        }
    }
    refuse_missing(files, &missing)?;
    check_blocks(layout, &found)?;
    let companions = layout.iter().flat_map(|k| companions(k, found[&k.name]));
    let missing: Vec<_> = companions
        .filter(|name| !files.contains(name))
        .map(|name| (name, "this name"))
        .collect();
    refuse_missing(files, &missing)?;
    refuse_more_layers(files, layout)?;
    for key in layout {
        check_tensors(files, key, found[&key.name])?;
    }
    Ok(found)
}

/// Names the first of the tensors that are not there, with the suffixes it was looked for under.
fn refuse_missing(files: &ModelFiles, missing: &[(String, &'static str)]) -> Result<()> {
    let Some((name, tried)) = missing.first().cloned() else {
        return Ok(());
    };
    let more = match missing.len() - 1 {
        0 => String::new(),
        n => format!(", nor {n} others"),
    };
    Err(Error::MissingTensor {
        dir: files.dir().to_owned(),
        name,
        tried,
        more,
    })
}

/// What the configuration says about GPTQ tensors, if there are any.
pub(super) fn gptq_format(
    files: &ModelFiles,
    found: &HashMap<String, Storage>,
) -> Result<GptqFormat> {
    if !found.values().any(|s| *s == Storage::Gptq) {
        return Ok(GptqFormat::default());
    }
    let config = files.quantization_config()?;
    Ok(config.map_or(Ok(GptqFormat::default()), |c| GptqFormat::read(&c))?)
}

/// Bytes of a weight and its bias in the files.
pub(super) fn file_bytes(files: &ModelFiles, key: &WeightKey, storage: Storage) -> u64 {
    let parts = storage
        .suffixes()
        .iter()
        .map(|s| format!("{}.{s}", key.name));
    parts
        .chain(key.bias.clone())
        .filter_map(|name| files.tensor(&name).ok())
        .map(|view| view.data.len() as u64)
        .sum()
}

fn stored_as(files: &ModelFiles, key: &WeightKey) -> Option<Storage> {
    let has =
        |storage: &Storage| files.contains(&format!("{}.{}", key.name, storage.suffixes()[0]));
    let quantized = key.is_linear().then_some([Storage::Exl2, Storage::Gptq]);
    let order = quantized.into_iter().flatten().chain([Storage::Dense]);
    let found = order.into_iter().find(has);
    match key.kind {
        WeightKind::Head { tied_to: Some(_) } => found.or(Some(Storage::Tied)),
        _ => found,
    }
}

/// Names of the tensors that a quantized weight must have beside the one that tells its storage.
fn companions(key: &WeightKey, storage: Storage) -> Vec<String> {
    // Without `g_idx`, GPTQ's groups are consecutive.
    let needed = storage.suffixes().iter().filter(|s| **s != "g_idx");
    needed
        .skip(1)
        .map(|s| format!("{}.{s}", key.name))
        .collect()
}

fn tried(key: &WeightKey) -> &'static str {
    if key.is_linear() {
        ".q_weight, .qweight, .weight"
    } else {
        ".weight"
    }
}

/// All linears of an attention or MLP block are stored alike: half a block points to a damaged or
/// mixed-up directory.
fn check_blocks(layout: &[WeightKey], found: &HashMap<String, Storage>) -> Result<()> {
    let is_half = |m: Module| matches!(m, Module::Attention(_) | Module::Mlp(_));
    for block in layout.chunk_by(|a, b| a.module == b.module) {
        let linears = || block.iter().filter(|k| k.is_linear());
        let mut kinds = linears().map(|k| found[&k.name]);
        let first = kinds.next();
        if !is_half(block[0].module) || kinds.all(|k| Some(k) == first) {
            continue;
        }
        let short = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
        let parts: Vec<String> = linears()
            .map(|k| format!("{} {}", short(&k.name), found[&k.name]))
            .collect();
        let name = linears().next().map_or("", |k| k.name.as_str());
        return Err(Error::PartiallyQuantized {
            block: name
                .rsplit_once('.')
                .map_or(name, |(block, _)| block)
                .to_owned(),
            found: parts.join(", "),
        });
    }
    Ok(())
}

/// Tensors of layers beyond the last: a model cut short by its configuration computes nonsense.
fn refuse_more_layers(files: &ModelFiles, layout: &[WeightKey]) -> Result<()> {
    let Some(last) = layout.iter().rev().find_map(|k| match k.module {
        Module::Mlp(i) => Some((i, &k.name)),
        _ => None,
    }) else {
        return Ok(());
    };
    let (index, name) = last;
    let Some((prefix, _)) = name.split_once(&format!(".{index}.")) else {
        return Ok(());
    };
    let layer = |name: &str| -> Option<usize> {
        let rest = name.strip_prefix(prefix)?.strip_prefix('.')?;
        rest.split_once('.')?.0.parse().ok()
    };
    let beyond = files
        .names()
        .filter(|n| layer(n).is_some_and(|i| i > index));
    let Some(name) = beyond.min() else {
        return Ok(());
    };
    Err(Error::Tensor {
        file: files.tensor(name)?.file.clone(),
        name: name.to_owned(),
        expected: format!("{} layers (num_hidden_layers in config.json)", index + 1),
        found: "one more".to_owned(),
    })
}

fn check_tensors(files: &ModelFiles, key: &WeightKey, storage: Storage) -> Result<()> {
    match storage {
        Storage::Dense => {
            let name = format!("{}.weight", key.name);
            let per_head = match key.kind {
                WeightKind::HeadNorm { heads } => vec![heads, key.shape[0]],
                _ => vec![],
            };
            dense_view(files, &name, &[&key.shape, &per_head])?;
        }
        Storage::Exl2 => quantized::check_exl2(files, key)?,
        Storage::Gptq => quantized::check_gptq(files, key)?,
        Storage::Tied => {}
    }
    let Some(bias) = &key.bias else {
        return refuse_bias(files, key);
    };

    let padded = [key.shape[0].next_multiple_of(32)];
    dense_view(files, bias, &[&key.shape[..1], &padded]).map(|_| ())
}

/// A bias that the configuration does not announce would be left out silently. Some writers of
/// GPTQ files store zeros, which change nothing.
fn refuse_bias(files: &ModelFiles, key: &WeightKey) -> Result<()> {
    let name = format!("{}.bias", key.name);
    if !files.contains(&name) || zero_bias(files, &name)? {
        return Ok(());
    }
    let view = files.tensor(&name)?;
    Err(Error::Tensor {
        file: view.file.clone(),
        name,
        expected: "no bias here (see attention_bias and mlp_bias in config.json)".to_owned(),
        found: "one that is not zero".to_owned(),
    })
}
