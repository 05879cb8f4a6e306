//! Headers of quantized linears against the configuration: what can be told without their data.

use exl_format::{Dtype, ModelFiles, TensorView};

use crate::{Error, Result, WeightKey};

/// An axis whose length follows from the data, which the reader checks.
const ANY: usize = usize::MAX;

const I32: &[Dtype] = &[Dtype::I32];
const FLOATS: &[Dtype] = &[Dtype::F16, Dtype::Bf16, Dtype::F32];

/// Checks the five tensors of an EXL2 linear.
pub(super) fn check_exl2(files: &ModelFiles, key: &WeightKey) -> Result<()> {
    let inputs = key.shape[1];
    let outputs = outputs(files, key, "q_weight")?;
    let groups = first_axis(files, key, "q_scale_max")?;
    let rule = |suffix, dtypes, shape: &[usize]| check(files, key, suffix, (dtypes, shape));
    rule("q_weight", I32, &[ANY, outputs])?;
    rule("q_invperm", I32, &[inputs])?;
    rule("q_scale_max", &[Dtype::F16], &[ANY])?;
    rule("q_scale", I32, &[groups, outputs / 8])?;
    rule("q_groups", &[Dtype::I16], &[groups.saturating_mul(2)])
}

/// Checks the three or four tensors of a GPTQ linear.
pub(super) fn check_gptq(files: &ModelFiles, key: &WeightKey) -> Result<()> {
    let inputs = key.shape[1];
    let outputs = outputs(files, key, "qweight")?;
    let groups = first_axis(files, key, "qzeros")?;
    let rule = |suffix, dtypes, shape: &[usize]| check(files, key, suffix, (dtypes, shape));
    rule("qweight", I32, &[inputs / 8, outputs])?;
    rule("qzeros", I32, &[ANY, outputs / 8])?;
    rule("scales", FLOATS, &[groups, outputs])?;
    match files.contains(&format!("{}.g_idx", key.name)) {
        true => rule("g_idx", I32, &[inputs]),
        false => Ok(()),
    }
}

/// Outputs as stored: files may pad them to a multiple of 32.
fn outputs(files: &ModelFiles, key: &WeightKey, suffix: &str) -> Result<usize> {
    let wanted = key.shape[0];
    let padded = wanted.next_multiple_of(32);
    let stored = files.tensor(&format!("{}.{suffix}", key.name))?;
    Ok(if stored.shape.last() == Some(&padded) {
        padded
    } else {
        wanted
    })
}

fn first_axis(files: &ModelFiles, key: &WeightKey, suffix: &str) -> Result<usize> {
    let view = files.tensor(&format!("{}.{suffix}", key.name))?;
    Ok(view.shape.first().copied().unwrap_or(0))
}

/// Compares a header with the allowed types and the shape, in which [`ANY`] leaves an axis open.
fn check(
    files: &ModelFiles,
    key: &WeightKey,
    suffix: &str,
    (dtypes, shape): (&[Dtype], &[usize]),
) -> Result<()> {
    let view = files.tensor(&format!("{}.{suffix}", key.name))?;
    let mut axes = view.shape.iter().zip(shape);
    let fits =
        view.shape.len() == shape.len() && axes.all(|(have, want)| [*have, ANY].contains(want));
    if fits && dtypes.contains(&view.dtype) {
        return Ok(());
    }
    Err(refusal(&view, dtypes, shape))
}

fn refusal(view: &TensorView, dtypes: &[Dtype], shape: &[usize]) -> Error {
    let axis = |n: &usize| match *n {
        ANY => "any".to_owned(),
        n => n.to_string(),
    };
    let shape: Vec<String> = shape.iter().map(axis).collect();
    let types: Vec<&str> = dtypes.iter().map(|d| d.as_str()).collect();
    Error::Tensor {
        file: view.file.clone(),
        name: view.name.clone(),
        expected: format!("{} of shape [{}]", types.join(" or "), shape.join(", ")),
        found: format!("{} of shape {:?}", view.dtype.as_str(), view.shape),
    }
}
