//! Safetensors files over a memory map, with every claim of the header checked.

mod header;

use std::path::{Path, PathBuf};

use crate::{Bytes, Dtype, Error, Result};
pub(crate) use header::{MAX_DIMENSIONS, MAX_NAME_BYTES};

/// Longest header that is read, as in the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// Its name.
    pub name: String,
    /// The file it is in.
    pub file: PathBuf,
    /// Its element type.
    pub dtype: Dtype,
    /// Its sizes, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements, little-endian, row-major. Not aligned in general.
    pub data: Bytes,
}

/// Something that holds named tensors.
pub trait TensorSource {
    /// The tensor of this name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] when there is none.
    fn tensor(&self, name: &str) -> Result<TensorView>;

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;
}

/// An opened safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    data: Bytes,
    file_bytes: u64,
    /// Sorted by name.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: Box<str>,
    dtype: Dtype,
    shape: Box<[usize]>,
    start: usize,
    end: usize,
}

impl SafetensorsFile {
    /// Maps a file and checks its header; no tensor data is touched.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be mapped, [`Error::Header`] or [`Error::Tensor`] when
    /// the header breaks a rule: its length, its JSON, names that occur twice, unknown types, byte
    /// ranges that do not match type and shape, overlap, or reach beyond the file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path, Bytes::map(path)?)
    }

    /// As [`SafetensorsFile::open`], over bytes in memory; `path` is only named in errors.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`].
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let header = header::locate(path, &bytes)?;
        let data = bytes
            .slice(header.end..bytes.len())
            .expect("the header was found inside the file");
        let entries = header::parse(path, &bytes[header], data.len())?;
        Ok(Self {
            path: path.to_owned(),
            file_bytes: bytes.len() as u64,
            data,
            entries,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| &*e.name)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when the file holds no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|e| (e.end - e.start) as u64).sum()
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Position of a tensor in [`SafetensorsFile::names`].
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.entries.binary_search_by(|e| (*e.name).cmp(name)).ok()
    }

    pub(crate) fn at(&self, position: usize) -> TensorView {
        let entry = &self.entries[position];
        TensorView {
            name: entry.name.to_string(),
            file: self.path.clone(),
            dtype: entry.dtype,
            shape: entry.shape.to_vec(),
            data: self
                .data
                .slice(entry.start..entry.end)
                .expect("the header was checked against the file"),
        }
    }
}

impl TensorSource for SafetensorsFile {
    fn tensor(&self, name: &str) -> Result<TensorView> {
        let missing = || Error::MissingTensor {
            place: self.path.clone(),
            tensor: name.to_owned(),
        };
        Ok(self.at(self.position(name).ok_or_else(missing)?))
    }

    fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }
}

impl TensorView {
    /// An error about this tensor.
    pub(crate) fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::tensor(&self.file, &self.name, expected, found)
    }

    /// The sizes, when the tensor has this type and number of dimensions.
    pub(crate) fn expect<const D: usize>(&self, dtype: Dtype) -> Result<[usize; D]> {
        let shape: Option<[usize; D]> = self.shape.as_slice().try_into().ok();
        match shape {
            Some(shape) if self.dtype == dtype => Ok(shape),
            _ => Err(self.error(
                format!(
                    "{dtype} with {D} dimension{}",
                    if D == 1 { "" } else { "s" }
                ),
                format!("{} with shape {:?}", self.dtype, self.shape),
            )),
        }
    }

    /// The elements of an F32, F16 or BF16 tensor as `f32`, which holds all of them exactly.
    ///
    /// # Errors
    /// [`Error::Tensor`] for other types.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype {
            Dtype::F32 => Ok(self.to_u32().into_iter().map(f32::from_bits).collect()),
            Dtype::F16 => {
                let wide = |h| half::f16::from_bits(h).to_f32();
                Ok(self.to_u16().into_iter().map(wide).collect())
            }
            Dtype::Bf16 => {
                let wide = |h| half::bf16::from_bits(h).to_f32();
                Ok(self.to_u16().into_iter().map(wide).collect())
            }
            other => Err(self.error("F32, F16 or BF16", other.to_string())),
        }
    }

    /// The elements of a tensor of a 32-bit type as bit patterns.
    pub(crate) fn to_u32(&self) -> Vec<u32> {
        let (words, _) = self.data.as_chunks::<4>();
        words.iter().map(|w| u32::from_le_bytes(*w)).collect()
    }

    /// The elements of a tensor of a 16-bit type as bit patterns.
    pub(crate) fn to_u16(&self) -> Vec<u16> {
        let (halves, _) = self.data.as_chunks::<2>();
        halves.iter().map(|h| u16::from_le_bytes(*h)).collect()
    }
}

#[cfg(test)]
mod tests;
