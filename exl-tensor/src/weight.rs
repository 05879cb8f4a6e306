//! Weights in the form the executors read.

use half::slice::HalfFloatSliceExt;
use std::collections::HashMap;
use std::sync::Arc;

use exl_kernels::cuda::{CudaMatrix, DeviceRegion};
use exl_kernels::ops::Matrix;
use exl_kernels::{DType, Exl2Parts, GptqParts, Mem, Place, QuantMatrix};

use crate::{Buffer, Error, Result};

/// Where the bytes of a dense weight are.
#[derive(Clone, Debug)]
enum Storage {
    Host(Buffer),
    Gpu(DeviceRegion),
}

impl Storage {
    fn len(&self) -> usize {
        match self {
            Storage::Host(buffer) => buffer.len(),
            Storage::Gpu(region) => region.bytes(),
        }
    }
}

/// Where a quantized matrix is.
#[derive(Debug)]
enum QuantStorage {
    Host(QuantMatrix),
    Gpu(CudaMatrix),
}

/// An unquantized tensor: `[outputs, inputs]` for a linear layer, `[n]` for a norm or a bias.
#[derive(Clone, Debug)]
pub struct DenseWeight {
    dtype: DType,
    shape: Vec<usize>,
    data: Storage,
}

/// Which quantized format a weight came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantKind {
    /// Mixed 2 to 8 bits.
    Exl2,
    /// 4 bits with zero points.
    Gptq,
}

/// A quantized linear weight, repacked for the CPU or the GPU.
#[derive(Debug)]
pub struct QuantWeight {
    kind: QuantKind,
    matrix: QuantStorage,
}

/// Brings the parts of weights to a GPU.
pub(crate) trait Upload {
    fn bytes(&mut self, bytes: &[u8]) -> Result<DeviceRegion>;
    fn matrix(&mut self, matrix: &QuantMatrix) -> Result<CudaMatrix>;
}

/// One named weight.
#[derive(Debug)]
pub enum Weight {
    /// F32, F16 or BF16.
    Dense(DenseWeight),
    /// EXL2 or GPTQ.
    Quant(QuantWeight),
}

impl Weight {
    /// A dense weight over bytes that are kept alive. Bytes that are not aligned for their type
    /// (files promise no alignment) are copied.
    ///
    /// # Errors
    /// [`Error::Shape`] when `shape` and the byte count disagree.
    pub fn dense(name: &str, dtype: DType, shape: &[usize], data: Buffer) -> Result<Self> {
        let wanted = shape
            .iter()
            .try_fold(dtype.bytes(), |n, &d| n.checked_mul(d));
        if wanted != Some(data.len()) {
            return Err(Error::Shape {
                name: name.to_owned(),
                expected: format!("{shape:?} of {dtype:?}"),
                found: format!("{} bytes", data.len()),
            });
        }
        let aligned = data.as_bytes().as_ptr().align_offset(dtype.bytes()) == 0;
        let data = if aligned {
            data
        } else {
            realigned(data.as_bytes())
        };
        Ok(Weight::Dense(DenseWeight {
            dtype,
            shape: shape.to_vec(),
            data: Storage::Host(data),
        }))
    }

    /// A dense F32 constant.
    pub fn constant(values: &[f32]) -> Self {
        let data = Buffer::from_slice(values);
        Weight::Dense(DenseWeight {
            dtype: DType::F32,
            shape: vec![values.len()],
            data: Storage::Host(data),
        })
    }

    /// Repacks an EXL2 matrix.
    ///
    /// # Errors
    /// [`Error::Weight`] when the parts break a rule of the format.
    pub fn exl2(name: &str, parts: &Exl2Parts<'_>) -> Result<Self> {
        let matrix = QuantMatrix::from_exl2(parts).map_err(|e| weight_error(name, e))?;
        Ok(Weight::Quant(QuantWeight {
            kind: QuantKind::Exl2,
            matrix: QuantStorage::Host(matrix),
        }))
    }

    /// Repacks a GPTQ matrix.
    ///
    /// # Errors
    /// [`Error::Weight`] when the parts break a rule of the format.
    pub fn gptq(name: &str, parts: &GptqParts<'_>) -> Result<Self> {
        let matrix = QuantMatrix::from_gptq(parts).map_err(|e| weight_error(name, e))?;
        Ok(Weight::Quant(QuantWeight {
            kind: QuantKind::Gptq,
            matrix: QuantStorage::Host(matrix),
        }))
    }

    /// A dense weight in device memory.
    pub(crate) fn dense_on_gpu(dtype: DType, shape: &[usize], region: DeviceRegion) -> Self {
        Weight::Dense(DenseWeight {
            dtype,
            shape: shape.to_vec(),
            data: Storage::Gpu(region),
        })
    }

    /// A quantized matrix in device memory.
    pub(crate) fn on_gpu(kind: QuantKind, matrix: CudaMatrix) -> Self {
        Weight::Quant(QuantWeight {
            kind,
            matrix: QuantStorage::Gpu(matrix),
        })
    }

    /// Bytes this weight occupies in memory (mapped bytes count).
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Dense(d) => d.data.len(),
            Weight::Quant(q) => match &q.matrix {
                QuantStorage::Host(m) => m.bytes(),
                QuantStorage::Gpu(m) => m.bytes(),
            },
        }
    }

    /// Shape as the plan sees it: `[outputs, inputs]` for matrices.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Weight::Dense(d) => d.shape.clone(),
            Weight::Quant(q) => match &q.matrix {
                QuantStorage::Host(m) => vec![m.outputs(), m.inputs()],
                QuantStorage::Gpu(m) => vec![m.outputs(), m.inputs()],
            },
        }
    }

    /// Format of a quantized weight.
    pub fn quant_kind(&self) -> Option<QuantKind> {
        match self {
            Weight::Dense(_) => None,
            Weight::Quant(q) => Some(q.kind),
        }
    }

    /// The weight as a linear layer's matrix.
    pub fn matrix(&self) -> Matrix<'_> {
        match self {
            Weight::Dense(d) => Matrix::Dense(d.mem()),
            Weight::Quant(q) => match &q.matrix {
                QuantStorage::Host(m) => Matrix::Quant(m),
                QuantStorage::Gpu(m) => Matrix::Cuda(m),
            },
        }
    }

    /// The weight's dense region, if it is dense.
    pub fn mem(&self) -> Option<Mem<'_>> {
        match self {
            Weight::Dense(d) => Some(d.mem()),
            Weight::Quant(_) => None,
        }
    }

    /// A copy of a weight in host memory on a GPU.
    pub(crate) fn copied(&self, to: &mut dyn Upload) -> Result<Self> {
        match self {
            Weight::Dense(d) => {
                let Storage::Host(data) = &d.data else {
                    return Ok(Weight::Dense(d.clone()));
                };
                Ok(Weight::Dense(DenseWeight {
                    data: Storage::Gpu(to.bytes(data.as_bytes())?),
                    ..d.clone()
                }))
            }
            Weight::Quant(q) => {
                let QuantStorage::Host(m) = &q.matrix else {
                    return Err(Error::Step("a weight is on a GPU already".to_owned()));
                };
                Ok(Weight::on_gpu(q.kind, to.matrix(m)?))
            }
        }
    }

    /// The weight as F32 `[outputs, inputs]` (a quantized one through its format's own rounding).
    ///
    /// # Errors
    /// [`Error::Weight`] when decoding fails or the weight is not in host memory.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>> {
        let elsewhere = || {
            let error = exl_kernels::Error::argument("weight", "host memory", "device memory");
            weight_error(name, error)
        };
        match self {
            Weight::Dense(d) => match &d.data {
                Storage::Host(data) => Ok(floats(data.as_bytes(), d.dtype)),
                Storage::Gpu(_) => Err(elsewhere()),
            },
            Weight::Quant(q) => {
                let QuantStorage::Host(matrix) = &q.matrix else {
                    return Err(elsewhere());
                };
                let (k, n) = (matrix.inputs(), matrix.outputs());
                let mut rows = vec![0.0; k * n];
                matrix
                    .dequantize(&mut rows)
                    .map_err(|e| weight_error(name, e))?;
                let mut out = vec![0.0; k * n];
                for (i, row) in rows.chunks_exact(n).enumerate() {
                    for (j, &v) in row.iter().enumerate() {
                        out[j * k + i] = v;
                    }
                }
                Ok(out)
            }
        }
    }
}

impl DenseWeight {
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn mem(&self) -> Mem<'_> {
        match &self.data {
            Storage::Host(data) => {
                let bytes = data.as_bytes();
                // SAFETY: the bytes live as long as `self`, are never written, and
                // `Weight::dense` checked their alignment.
                unsafe { Mem::from_raw(bytes.as_ptr(), bytes.len(), self.dtype, Place::Host) }
            }
            Storage::Gpu(region) => region
                .mem(0, region.bytes(), self.dtype)
                .expect("regions are aligned for every element type"),
        }
    }
}

fn floats(bytes: &[u8], dtype: DType) -> Vec<f32> {
    // Loops that compilers make wide: a layer of a large model has a billion weights.
    let pairs = bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::F32 => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|&b| f32::from_le_bytes(b)).collect()
        }
        DType::F16 => {
            let halves: Vec<half::f16> = pairs.map(|&b| half::f16::from_le_bytes(b)).collect();
            halves.to_f32_vec()
        }
        DType::Bf16 => pairs
            .map(|&b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
            .collect(),
        DType::I32 | DType::U8 => bytes.iter().map(|&b| f32::from(b)).collect(),
    }
}

fn weight_error(name: &str, source: exl_kernels::Error) -> Error {
    Error::Weight {
        name: name.to_owned(),
        source,
    }
}

fn realigned(bytes: &[u8]) -> Buffer {
    let mut words = vec![0i32; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut::<i32, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
    struct Words(Vec<i32>, usize);
    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[..self.1]
        }
    }
    Buffer::from_owner(Words(words, bytes.len()))
}

/// Weights by name. Cheap to clone: the weights are shared.
#[derive(Clone, Debug, Default)]
pub struct Weights(HashMap<String, Arc<Weight>>);

impl Weights {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a weight.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        self.0.insert(name.into(), Arc::new(weight));
    }

    /// Adds or replaces a shared weight.
    pub fn insert_shared(&mut self, name: impl Into<String>, weight: Arc<Weight>) {
        self.0.insert(name.into(), weight);
    }

    /// Drops a weight.
    pub fn remove(&mut self, name: &str) -> Option<Arc<Weight>> {
        self.0.remove(name)
    }

    /// A weight by name.
    pub fn get(&self, name: &str) -> Option<&Arc<Weight>> {
        self.0.get(name)
    }

    /// All names and weights, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<Weight>)> {
        self.0.iter().map(|(n, w)| (n.as_str(), w))
    }

    /// Bytes of all weights; shared ones count once.
    pub fn bytes(&self) -> usize {
        let mut seen = std::collections::HashSet::new();
        self.0
            .values()
            .filter(|w| seen.insert(Arc::as_ptr(w)))
            .map(|w| w.bytes())
            .sum()
    }
}
