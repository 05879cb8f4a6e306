//! Writes what was quantized as an EXL2 checkpoint.

use std::collections::HashMap;
use std::path::Path;

use exl_format::{
    CheckpointWriter, Dtype, Exl2Builder, Exl2Linear, QuantizationConfig, TensorSpec,
    WriterOptions, Written, copy_side_files, patch_quantization_config, read_json, to_json_text,
    write_file_atomic,
};
use exl_models::{ModelSource, WeightKey};
use exl_quant::{Error, Quantized, Result};
use exl_tensor::Weights;
use half::f16;

/// Codes and scales as they go into a file.
pub(crate) fn pack(name: &str, q: &Quantized, bias: Option<Vec<u16>>) -> Result<Exl2Linear> {
    let n = q.outputs;
    let mut builder = Exl2Builder::new(n);
    let mut row = 0;
    for (g, group) in q.layout.groups().iter().enumerate() {
        let codes = &q.codes[row * n..(row + group.rows) * n];
        let scales = &q.scale_codes[g * n..][..n];
        builder.push_group(group.bits, codes, scales, q.scale_max[g])?;
        row += group.rows;
    }
    Ok(builder.finish(name, &q.order, bias)?)
}

/// Writes `linears` and, as 16-bit floats, everything else of `source` into `out`.
pub(crate) fn write(
    source: &ModelSource,
    out: &Path,
    linears: &HashMap<String, Exl2Linear>,
    config: &QuantizationConfig,
) -> Result<Written> {
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    for key in source.layout() {
        match linears.get(&key.name) {
            Some(linear) => {
                let parts = linear.to_tensors(&key.name);
                tensors.extend(parts.into_iter().map(|t| (t.spec, t.data)));
            }
            None => tensors.push(plain(source, key)?),
        }
    }
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = CheckpointWriter::create(out, specs, &WriterOptions::default())?;
    for (spec, data) in &tensors {
        writer.write(&spec.name, data)?;
    }
    let written = writer.finish()?;
    copy_side_files(source.files().dir(), out)?;
    let file = "config.json";
    let path = source.files().dir().join(file);
    let mut json = read_json(&path)?.ok_or_else(|| Error::Io {
        path: path.clone(),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    patch_quantization_config(&mut json, config)?;
    write_file_atomic(&out.join(file), to_json_text(&json))?;
    Ok(written)
}

/// An embedding or a norm: neither has a bias.
fn plain(source: &ModelSource, key: &WeightKey) -> Result<(TensorSpec, Vec<u8>)> {
    let mut weights = Weights::new();
    source.load_key(key, &mut weights)?;
    let weight = weights.get(&key.name).expect("the key was loaded above");
    let values = weight.to_f32(&key.name)?;
    let spec = TensorSpec {
        name: format!("{}.weight", key.name),
        dtype: Dtype::F16,
        shape: key.shape.clone(),
    };
    let bytes = |x: f32| f16::from_f32(x).to_bits().to_le_bytes();
    Ok((spec, values.into_iter().flat_map(bytes).collect()))
}
