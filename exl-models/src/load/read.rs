//! One tensor set at a time, from the files to a weight.

use exl_format::{Exl2Linear, GptqFormat, GptqLinear, ModelFiles, TensorView};
use exl_tensor::{Buffer, DType, Weight};

use super::Storage;
use super::finite::spot_check;
use crate::{Error, Result, WeightKey, WeightKind};

/// Reads the weights of one model.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) gptq: GptqFormat,
    /// Unquantized tensors stay in the mapped file. Otherwise they are copied, so that nothing
    /// holds the map of a quantized checkpoint once it is loaded: its touched pages would count
    /// as memory of this process beside the repacked weights.
    pub(super) keep_mapped: bool,
}

impl Reader<'_> {
    /// Loads a weight.
    pub(super) fn weight(&self, key: &WeightKey, storage: Storage) -> Result<Weight> {
        match (storage, &key.kind) {
            (Storage::Exl2, _) => exl2(self.files, key),
            (Storage::Gptq, _) => gptq(self.files, key, self.gptq),
            (
                Storage::Tied,
                WeightKind::Head {
                    tied_to: Some(table),
                },
            ) => self.dense(key, table),
            (Storage::Tied | Storage::Dense, _) => self.dense(key, &key.name),
        }
    }

    /// Loads the bias of a weight; padding of quantized files is cut off.
    pub(super) fn bias(&self, key: &WeightKey, name: &str) -> Result<Weight> {
        let outputs = key.shape[0];
        let shapes: [&[usize]; 2] = [&[outputs], &[outputs.next_multiple_of(32)]];
        let view = dense_view(self.files, name, &shapes)?;
        spot_check(&view)?;
        head_of(&view, name, outputs)
    }

    fn dense(&self, key: &WeightKey, base: &str) -> Result<Weight> {
        let name = format!("{base}.weight");
        let WeightKind::HeadNorm { heads } = key.kind else {
            let view = dense_view(self.files, &name, &[&key.shape])?;
            spot_check(&view)?;
            let buffer = if self.keep_mapped {
                Buffer::from_owner(view.data.clone())
            } else {
                Buffer::from_owner(view.data.to_vec())
            };
            return Ok(Weight::dense(&key.name, dtype(&view)?, &key.shape, buffer)?);
        };
        let dim = key.shape[0];
        let view = dense_view(self.files, &name, &[&[dim], &[heads, dim]])?;
        spot_check(&view)?;
        check_equal_rows(&view, dim)?;
        head_of(&view, &key.name, dim)
    }
}

/// The first `n` elements of a tensor, as a vector.
fn head_of(view: &TensorView, name: &str, n: usize) -> Result<Weight> {
    let dtype = dtype(view)?;
    let bytes = view.data[..n * dtype.bytes()].to_vec();
    Ok(Weight::dense(name, dtype, &[n], Buffer::from_owner(bytes))?)
}

/// Converters write one norm for all heads as a row per head.
fn check_equal_rows(view: &TensorView, dim: usize) -> Result<()> {
    let row = dim * dtype(view)?.bytes();
    let mut rows = view.data.chunks_exact(row);
    let first = rows.next();
    if rows.all(|r| Some(r) == first) {
        return Ok(());
    }
    Err(Error::Tensor {
        file: view.file.clone(),
        name: view.name.clone(),
        expected: "the same row for every head".to_owned(),
        found: "rows that differ".to_owned(),
    })
}

fn exl2(files: &ModelFiles, key: &WeightKey) -> Result<Weight> {
    let linear = Exl2Linear::read(files, &key.name)?;
    check_linear(files, key, "q_weight", (linear.inputs, linear.outputs))?;
    let groups: Vec<exl_tensor::Group> = linear
        .groups
        .iter()
        .map(|g| exl_tensor::Group {
            bits: g.bits,
            rows: g.rows,
        })
        .collect();
    let parts = exl_tensor::Exl2Parts {
        q_weight: &linear.q_weight,
        q_scale: &linear.q_scale,
        q_scale_max: &linear.q_scale_max,
        groups: &groups,
        q_invperm: &linear.q_invperm,
        inputs: linear.inputs,
        outputs: linear.outputs,
        // Multipliers of the architecture are applied in f32 by the plan: inside the 16-bit
        // scales they would cost precision.
        prescale: 1.0,
    };
    let weight = Weight::exl2(&key.name, &parts)?;
    release(files, key, "q_weight");
    Ok(weight)
}

fn gptq(files: &ModelFiles, key: &WeightKey, format: GptqFormat) -> Result<Weight> {
    let linear = GptqLinear::read_as(files, &key.name, format)?;
    check_linear(files, key, "qweight", (linear.inputs, linear.outputs))?;
    let parts = exl_tensor::GptqParts {
        qweight: &linear.qweight,
        qzeros: &linear.qzeros,
        scales: &linear.scales,
        g_idx: linear.g_idx.as_deref(),
        group_size: linear.group_size,
        zero_offset: linear.zero_offset,
        inputs: linear.inputs,
        outputs: linear.outputs,
    };
    let weight = Weight::gptq(&key.name, &parts)?;
    release(files, key, "qweight");
    Ok(weight)
}

/// The codes are repacked: the file's copy need not count as memory of this process.
fn release(files: &ModelFiles, key: &WeightKey, suffix: &str) {
    if let Ok(view) = files.tensor(&format!("{}.{suffix}", key.name)) {
        view.data.release();
    }
}

/// Quantized files may pad the outputs to a multiple of 32.
fn check_linear(
    files: &ModelFiles,
    key: &WeightKey,
    suffix: &str,
    (inputs, outputs): (usize, usize),
) -> Result<()> {
    let (wanted_outputs, wanted_inputs) = (key.shape[0], key.shape[1]);
    let fits = outputs == wanted_outputs || outputs == wanted_outputs.next_multiple_of(32);
    if inputs == wanted_inputs && fits {
        return Ok(());
    }
    let name = format!("{}.{suffix}", key.name);
    Err(Error::Tensor {
        file: files.tensor(&name)?.file.clone(),
        name,
        expected: format!("{wanted_inputs} inputs and {wanted_outputs} outputs"),
        found: format!("{inputs} inputs and {outputs} outputs"),
    })
}

/// A dense tensor of one of the given shapes (empty ones do not count).
pub(super) fn dense_view(
    files: &ModelFiles,
    name: &str,
    shapes: &[&[usize]],
) -> Result<TensorView> {
    let view = files.tensor(name)?;
    dtype(&view)?;
    let wanted: Vec<&&[usize]> = shapes.iter().filter(|s| !s.is_empty()).collect();
    if wanted.iter().any(|s| view.shape == **s) {
        return Ok(view);
    }
    Err(Error::Tensor {
        file: view.file.clone(),
        name: name.to_owned(),
        expected: format!("shape {:?}", wanted[0]),
        found: format!("shape {:?}", view.shape),
    })
}

/// Element type of a dense weight.
pub(crate) fn dtype(view: &TensorView) -> Result<DType> {
    match view.dtype {
        exl_format::Dtype::F32 => Ok(DType::F32),
        exl_format::Dtype::F16 => Ok(DType::F16),
        exl_format::Dtype::Bf16 => Ok(DType::Bf16),
        other => Err(Error::Tensor {
            file: view.file.clone(),
            name: view.name.clone(),
            expected: "F32, F16 or BF16".to_owned(),
            found: format!("{other:?}"),
        }),
    }
}

/// Whether a tensor holds nothing but zeros, of either sign.
pub(super) fn zero_bias(files: &ModelFiles, name: &str) -> Result<bool> {
    let view = files.tensor(name)?;
    let width = dtype(&view)?.bytes();
    // Little-endian: the sign bit is the top bit of the last byte of a value.
    let zero = |v: &[u8]| v.iter().rev().skip(1).all(|&b| b == 0) && v[width - 1] & 0x7f == 0;
    Ok(view.data.chunks_exact(width).all(zero))
}
