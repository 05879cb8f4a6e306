//! 4-bit GPTQ layers.

use half::f16;
use serde_json::Value;

use crate::{ConfigFile, Dtype, Error, ModelFiles, Result, TensorSource, TensorView};

/// What the configuration says about GPTQ tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GptqFormat {
    /// Zero points are stored as they are (`gptq_v2`), not minus one.
    pub true_zeros: bool,
    /// Declared features per group.
    pub group_size: Option<usize>,
}

/// What a layer is made of but for its numbers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GptqShape {
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
    /// Features per group, a power of two.
    pub group_size: usize,
    /// `[inputs]` group of each feature; `None` when groups are consecutive.
    pub g_idx: Option<Vec<u32>>,
}

/// A 4-bit GPTQ matrix in file layout, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GptqLinear {
    /// `[K / 8, N]`, feature `k` at word row `k / 8`, bits `4 (k mod 8)`.
    pub qweight: Vec<u32>,
    /// `[G, N / 8]` stored zero points, column `8j + i` at bits `4i`.
    pub qzeros: Vec<u32>,
    /// `[G, N]` bits of binary16 scales.
    pub scales: Vec<u16>,
    /// `[K]` group of each feature; `None` when groups are consecutive.
    pub g_idx: Option<Vec<u32>>,
    /// `[N]` bits of binary16 biases; a bias of zeros is dropped.
    pub bias: Option<Vec<u16>>,
    /// Features per group, a power of two.
    pub group_size: usize,
    /// Added to a stored zero point: 1 for the common format, 0 for `gptq_v2`.
    pub zero_offset: i32,
    /// Input features `K`.
    pub inputs: usize,
    /// Output features `N`.
    pub outputs: usize,
}

impl GptqFormat {
    /// From `quantization_config` or `quantize_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] when it declares another method, layout or width than 4 bits.
    pub fn read(config: &ConfigFile) -> Result<Self> {
        let only = |key: &'static str, allowed: &[&str], hint: &str| -> Result<Option<String>> {
            let keys = [key];
            let lookup = config.key(&keys);
            match lookup.string()? {
                Some(text) if !allowed.contains(&text) => Err(lookup.error(hint, text)),
                text => Ok(text.map(str::to_owned)),
            }
        };
        only("quant_method", &["gptq"], "gptq, for layers with qweight")?;
        let layouts = ["gptq", "gptq_v2"];
        let layout = only("checkpoint_format", &layouts, "gptq or gptq_v2")?;
        let bits = config.key(&["bits"]);
        if let Some(found) = bits.integer()?
            && found != 4
        {
            let expected = "4 (other widths of GPTQ are not supported; convert to EXL2)";
            return Err(bits.error(expected, found.to_string()));
        }
        let group_size = config.key(&["group_size"]);
        let size = match group_size.value() {
            Some(Value::Number(n)) if n.as_i64().is_some_and(|n| n <= 0) => None,
            _ => group_size.integer()?,
        };
        Ok(Self {
            true_zeros: layout.as_deref() == Some("gptq_v2"),
            group_size: size,
        })
    }
}

impl GptqShape {
    /// Reads and checks sizes and groups of the layer `key`; codes, zero points and scales are not
    /// looked at.
    ///
    /// # Errors
    /// As [`GptqLinear::read_as`].
    pub fn read(
        source: &(impl TensorSource + ?Sized),
        key: &str,
        format: GptqFormat,
    ) -> Result<Self> {
        let view = |suffix: &str| source.tensor(&format!("{key}.{suffix}"));
        let (weight, zeros) = (view("qweight")?, view("qzeros")?);
        let [word_rows, outputs] = weight.expect(Dtype::I32)?;
        let [groups, zero_columns] = zeros.expect(Dtype::I32)?;
        let inputs = word_rows.checked_mul(8);
        let Some(inputs) = inputs.filter(|&k| k > 0 && outputs > 0 && outputs.is_multiple_of(8))
        else {
            let found = format!("{:?}", weight.shape);
            return Err(weight.error("[inputs / 8, a multiple of 8 outputs]", found));
        };
        if groups == 0 || zero_columns != outputs / 8 {
            let expected = format!("shape [groups, {}]", outputs / 8);
            return Err(zeros.error(expected, format!("{:?}", zeros.shape)));
        }
        let group_size = group_size(&zeros, inputs, groups, format)?;
        let g_idx = match view("g_idx") {
            Ok(view) => read_g_idx(&view, inputs, groups, group_size)?,
            Err(Error::MissingTensor { .. }) => None,
            Err(other) => return Err(other),
        };
        Ok(Self {
            inputs,
            outputs,
            group_size,
            g_idx,
        })
    }
}

impl GptqLinear {
    /// Reads and checks the layer `key` of a model, by what its configuration declares.
    ///
    /// # Errors
    /// [`Error::Config`] when the configuration declares something other than 4-bit GPTQ,
    /// [`Error::MissingTensor`], or [`Error::Tensor`] with the broken rule.
    pub fn read(files: &ModelFiles, key: &str) -> Result<Self> {
        let format = match files.quantization_config()? {
            Some(config) => GptqFormat::read(&config)?,
            None => GptqFormat::default(),
        };
        Self::read_as(files, key, format)
    }

    /// As [`GptqLinear::read`], with the format given.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::Tensor`] with the broken rule.
    pub fn read_as(
        source: &(impl TensorSource + ?Sized),
        key: &str,
        format: GptqFormat,
    ) -> Result<Self> {
        let view = |suffix: &str| source.tensor(&format!("{key}.{suffix}"));
        let (weight, zeros, scales) = (view("qweight")?, view("qzeros")?, view("scales")?);
        let GptqShape {
            inputs,
            outputs,
            group_size,
            g_idx,
        } = GptqShape::read(source, key, format)?;
        let groups = inputs.div_ceil(group_size);
        if scales.shape != [groups, outputs] {
            let expected = format!("shape {:?}", [groups, outputs]);
            return Err(scales.error(expected, format!("{:?}", scales.shape)));
        }
        Ok(Self {
            qweight: weight.to_u32(),
            qzeros: zeros.to_u32(),
            scales: finite_halves(&scales)?,
            g_idx,
            bias: read_bias(source, key, outputs)?,
            group_size,
            zero_offset: i32::from(!format.true_zeros),
            inputs,
            outputs,
        })
    }

    /// Decodes the matrix by the letter of the format: `[K, N]` bits of binary16.
    pub fn dequantize_f16(&self) -> Vec<u16> {
        let n = self.outputs;
        let mut out = Vec::with_capacity(self.inputs * n);
        for k in 0..self.inputs {
            let group = |idx: &Vec<u32>| idx[k] as usize;
            let g = self.g_idx.as_ref().map_or(k / self.group_size, group);
            for j in 0..n {
                let code = self.qweight[k / 8 * n + j] >> (4 * (k % 8)) & 15;
                let stored = self.qzeros[g * n / 8 + j / 8] >> (4 * (j % 8)) & 15;
                let step = code as i32 - stored as i32 - self.zero_offset;
                let scale = f16::from_bits(self.scales[g * n + j]).to_f32();
                // Exact in f32: at most 5 bits times 11.
                out.push(f16::from_f32(step as f32 * scale).to_bits());
            }
        }
        out
    }
}

/// Scales in 16 bits; one that is no number would make every weight of its group none.
fn finite_halves(scales: &TensorView) -> Result<Vec<u16>> {
    let values = halves(scales)?;
    match values.iter().position(|s| s & 0x7c00 == 0x7c00) {
        None => Ok(values),
        Some(at) => {
            let found = format!("{} at {at}", f16::from_bits(values[at]));
            Err(scales.error("finite scales", found))
        }
    }
}

/// The smallest power of two that covers the inputs.
fn group_size(
    zeros: &TensorView,
    inputs: usize,
    groups: usize,
    format: GptqFormat,
) -> Result<usize> {
    let size = inputs.div_ceil(groups).next_power_of_two();
    let declared = format
        .group_size
        .is_none_or(|d| d == size || (groups == 1 && d >= inputs));
    if inputs.div_ceil(size) == groups && size >= 32 && declared {
        return Ok(size);
    }
    let declared = format
        .group_size
        .map(|d| format!(" (group_size {d} declared)"));
    Err(zeros.error(
        "groups of a power of two of features, at least 32",
        format!(
            "{groups} groups for {inputs} features{}",
            declared.unwrap_or_default()
        ),
    ))
}

/// The group of each feature, or `None` when they are just consecutive. Some writers store zeros
/// for that.
fn read_g_idx(
    view: &TensorView,
    inputs: usize,
    groups: usize,
    group_size: usize,
) -> Result<Option<Vec<u32>>> {
    let [len] = view.expect(Dtype::I32)?;
    if len != inputs {
        return Err(view.error(
            format!("{inputs} numbers for 4-bit codes"),
            format!("{len}; other widths of GPTQ are not supported"),
        ));
    }
    let idx = view.to_u32();
    if let Some(k) = idx.iter().position(|&g| g as usize >= groups) {
        return Err(view.error(
            format!("groups below {groups}"),
            format!("{} at feature {k}", idx[k] as i32),
        ));
    }
    let consecutive = idx
        .iter()
        .enumerate()
        .all(|(k, &g)| g as usize == k / group_size);
    let unset = idx.iter().all(|&g| g == 0);
    Ok((!consecutive && !unset).then_some(idx))
}

/// Numbers of a 16-bit or 32-bit float type, rounded to binary16.
fn halves(view: &TensorView) -> Result<Vec<u16>> {
    if view.dtype == Dtype::F16 {
        return Ok(view.to_u16());
    }
    let half = |x| f16::from_f32(x).to_bits();
    Ok(view.to_f32()?.into_iter().map(half).collect())
}

fn read_bias(
    source: &(impl TensorSource + ?Sized),
    key: &str,
    outputs: usize,
) -> Result<Option<Vec<u16>>> {
    let name = format!("{key}.bias");
    if !source.contains(&name) {
        return Ok(None);
    }
    let view = source.tensor(&name)?;
    if view.shape != [outputs] {
        let expected = format!("shape [{outputs}]");
        return Err(view.error(expected, format!("{:?}", view.shape)));
    }
    let bias = halves(&view)?;
    let zero = bias.iter().all(|b| b & 0x7fff == 0);
    Ok((!zero).then_some(bias))
}

#[cfg(test)]
mod tests;
