//! Low-rank adapters (LoRA) in the files of Hugging Face PEFT.

mod config;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use exl_format::{SafetensorsFile, TensorSource, TensorView};
use exl_tensor::{Buffer, DType, Weight, Weights};
use half::{bf16, f16};

use crate::load::{check_finite, dtype};
use crate::{Error, Result, Spec, WeightKind, layout};
use config::Config;

const WEIGHTS: &str = "adapter_model.safetensors";
/// Before the names that the base model gives its modules.
const PREFIX: &str = "base_model.model.";

/// A low-rank adapter: `scale (x A^T) B^T` is added to the outputs of some linears.
#[derive(Debug)]
pub struct Adapter {
    weights: Weights,
    ranks: Arc<HashMap<String, usize>>,
    fingerprint: String,
}

/// The two matrices of one linear.
#[derive(Default)]
struct Pair {
    a: Option<TensorView>,
    b: Option<TensorView>,
}

impl Adapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` of a directory. What the
    /// configuration says about scales is multiplied into B.
    ///
    /// # Errors
    /// [`Error::Adapter`] for settings and tensors that are not those of plain LoRA on linears of the
    /// model's layers, naming them; [`Error::Tensor`] for shapes that do not fit; damaged files.
    pub fn open(dir: &Path, spec: &Spec) -> Result<Self> {
        let config = Config::read(dir)?;
        let path = dir.join(WEIGHTS);
        if !path.exists() {
            let old = dir.join("adapter_model.bin").exists();
            let what = match old {
                true => "there is only an adapter_model.bin: save the adapter as safetensors",
                false => "there is no such file",
            };
            return Err(refuse(&path, what));
        }
        let file = SafetensorsFile::open(&path)?;
        let shapes = shapes(spec);
        let mut pairs: Vec<(&str, Pair)> = Vec::new();
        for name in file.names() {
            let (linear, is_a) = linear_of(&path, name, (spec, &shapes))?;
            let tensor = file.tensor(name)?;
            check_finite(&tensor)?;
            let at = pairs.iter().position(|(known, _)| *known == linear);
            let at = at.unwrap_or_else(|| {
                pairs.push((linear, Pair::default()));
                pairs.len() - 1
            });
            let pair = &mut pairs[at].1;
            let side = if is_a { &mut pair.a } else { &mut pair.b };
            if side.replace(tensor).is_some() {
                return Err(refuse(&path, &format!("{name} occurs twice")));
            }
        }
        if pairs.is_empty() {
            return Err(refuse(&path, "it has no tensors"));
        }
        let (mut weights, mut ranks) = (Weights::new(), HashMap::new());
        let mut hasher = blake3::Hasher::new();
        for (linear, pair) in pairs {
            let Pair {
                a: Some(a),
                b: Some(b),
            } = pair
            else {
                let what = format!("{linear} has only one of lora_A and lora_B");
                return Err(refuse(&path, &what));
            };
            let rank = rank((&a, &b), shapes[linear])?;
            let factor = config.factor(linear, rank, &path)?;
            let kinds = format!("{:?} {:?} {:?} {:?}", a.dtype, a.shape, b.dtype, b.shape);
            for part in [
                linear.as_bytes(),
                &factor.to_le_bytes(),
                kinds.as_bytes(),
                &a.data,
                &b.data,
            ] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
            weights.insert(format!("{linear}.a"), weight(&a, 1.0)?);
            weights.insert(format!("{linear}.b"), weight(&b, factor)?);
            ranks.insert(linear.to_owned(), rank);
        }
        Ok(Self {
            weights,
            ranks: Arc::new(ranks),
            fingerprint: hasher.finalize().to_hex().to_string(),
        })
    }

    /// The matrices: `{linear}.a` `[rank, inputs]` and `{linear}.b` `[outputs, rank]`.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Ranks of the linears that it changes, by the names that plans use.
    pub fn ranks(&self) -> &Arc<HashMap<String, usize>> {
        &self.ranks
    }

    /// A name for what it computes, 64 hexadecimal digits.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn refuse(file: &Path, what: &str) -> Error {
    Error::Adapter {
        file: file.to_owned(),
        what: what.to_owned(),
    }
}

/// `(outputs, inputs)` of the linears in layers.
fn shapes(spec: &Spec) -> HashMap<String, (usize, usize)> {
    let keys = layout(spec).into_iter();
    let linears = keys.filter(|key| key.kind == WeightKind::Linear);
    linears
        .map(|k| (k.name, (k.shape[0], k.shape[1])))
        .collect()
}

/// The linear that a tensor belongs to, and whether it is A.
fn linear_of<'a>(
    path: &Path,
    name: &'a str,
    (spec, shapes): (&Spec, &HashMap<String, (usize, usize)>),
) -> Result<(&'a str, bool)> {
    let plain = name.strip_prefix(PREFIX).unwrap_or(name);
    // Checkpoints of training name the adapter, too.
    let sides = [
        (".lora_A.weight", true),
        (".lora_B.weight", false),
        (".lora_A.default.weight", true),
        (".lora_B.default.weight", false),
    ];
    let side = sides
        .iter()
        .find_map(|(suffix, is_a)| Some((plain.strip_suffix(suffix)?, *is_a)));
    let module = side.map_or(plain, |side| side.0);
    let is = |key: &str| module == key || module.starts_with(&format!("{key}."));
    if side.is_some_and(|side| side.0.contains(".experts.")) {
        let what = format!("{name}: adapters of experts are not supported");
        return Err(refuse(path, &what));
    }
    let head = [&spec.head.linear.key, &spec.embed.key];
    if let Some(key) = head.into_iter().find(|key| is(key)) {
        let what = format!(
            "{name}: an adapter of {key} is not supported, only those of linears in layers"
        );
        return Err(refuse(path, &what));
    }
    match side {
        Some((linear, is_a)) if shapes.contains_key(linear) => Ok((linear, is_a)),
        Some((linear, _)) => {
            let what = format!("{name}: the model has no linear {linear}");
            Err(refuse(path, &what))
        }
        None => {
            let what = format!("{name} is neither a lora_A nor a lora_B of a linear");
            Err(refuse(path, &what))
        }
    }
}

/// The rank of a pair that fits its linear.
fn rank((a, b): (&TensorView, &TensorView), (outputs, inputs): (usize, usize)) -> Result<usize> {
    let rank = match a.shape[..] {
        [rank, found] if found == inputs && rank > 0 => rank,
        _ => return Err(misfit(a, format!("shape [rank, {inputs}]"))),
    };
    match b.shape[..] == [outputs, rank] {
        true => Ok(rank),
        false => Err(misfit(b, format!("shape {:?}", [outputs, rank]))),
    }
}

fn misfit(view: &TensorView, expected: String) -> Error {
    Error::Tensor {
        file: view.file.clone(),
        name: view.name.clone(),
        expected,
        found: format!("shape {:?}", view.shape),
    }
}

/// A matrix times a factor: in its own type if that has all of the products, as it does for powers
/// of two, otherwise in 32 bits.
fn weight(view: &TensorView, factor: f32) -> Result<Weight> {
    let own = dtype(view)?;
    let copied = |dtype, bytes: Vec<u8>| {
        Weight::dense(&view.name, dtype, &view.shape, Buffer::from_owner(bytes))
    };
    if factor == 1.0 {
        return Ok(copied(own, view.data.to_vec())?);
    }
    let values: Vec<f32> = view.to_f32()?.iter().map(|v| v * factor).collect();
    let narrow = |to: fn(f32) -> (u16, f32)| -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(2 * values.len());
        for &v in &values {
            let (bits, back) = to(v);
            (back == v).then(|| bytes.extend(bits.to_le_bytes()))?;
        }
        Some(bytes)
    };
    let narrowed = match own {
        DType::F16 => narrow(|v| (f16::from_f32(v).to_bits(), f16::from_f32(v).to_f32())),
        DType::Bf16 => narrow(|v| (bf16::from_f32(v).to_bits(), bf16::from_f32(v).to_f32())),
        _ => None,
    };
    Ok(match narrowed {
        Some(bytes) => copied(own, bytes)?,
        None => copied(
            DType::F32,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        )?,
    })
}

/// Where the configuration is.
fn config_path(dir: &Path) -> PathBuf {
    dir.join("adapter_config.json")
}
