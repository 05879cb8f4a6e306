//! The header: eight bytes of length, then JSON that names type, shape and byte range of each
//! tensor.
//!
//! It is read in one pass into the final table. Nothing is reserved by what the header claims, and
//! limits on names, dimensions and tensors bound what a hostile one can make us keep.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Entry, MAX_HEADER_BYTES};
use crate::{Dtype, Error, Result};

/// Tensors of one file. A model of a thousand experts per layer stays far below in one shard.
const MAX_TENSORS: usize = 1 << 20;
pub(crate) const MAX_NAME_BYTES: usize = 1024;
pub(crate) const MAX_DIMENSIONS: usize = 16;

/// Where the JSON lies.
pub(super) fn locate(path: &Path, bytes: &[u8]) -> Result<Range<usize>> {
    let size = bytes.len();
    let Some(first) = bytes.first_chunk::<8>() else {
        let what = format!("{size} bytes, but the header alone needs more than 8; it is cut short");
        return Err(Error::header(path, what));
    };
    let length = u64::from_le_bytes(*first);
    if length > MAX_HEADER_BYTES {
        let what = format!(
            "a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed; this is no \
             safetensors file"
        );
        return Err(Error::header(path, what));
    }
    let end = 8 + length as usize;
    if end > size {
        let what = format!("the header ends at byte {end}, the file at {size}; it is cut short");
        return Err(Error::header(path, what));
    }
    Ok(8..end)
}

/// The table of tensors, sorted by name.
pub(super) fn parse(path: &Path, json: &[u8], data_bytes: usize) -> Result<Vec<Entry>> {
    let mut json_reader = serde_json::Deserializer::from_slice(json);
    let raw = Table
        .deserialize(&mut json_reader)
        .and_then(|raw| json_reader.end().map(|()| raw));
    let mut raw = raw.map_err(|e| Error::header(path, format!("header: {e}")))?;
    raw.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = raw.windows(2).find(|w| w[0].name == w[1].name) {
        let what = format!("tensor {} is listed twice", pair[0].name);
        return Err(Error::header(path, what));
    }
    let entries: Vec<Entry> = raw
        .into_iter()
        .map(|r| r.check(path, data_bytes))
        .collect::<Result<_>>()?;
    check_overlap(path, &entries)?;
    Ok(entries)
}

fn check_overlap(path: &Path, entries: &[Entry]) -> Result<()> {
    let mut order: Vec<&Entry> = entries.iter().filter(|e| e.start < e.end).collect();
    order.sort_unstable_by_key(|e| e.start);
    match order.windows(2).find(|w| w[1].start < w[0].end) {
        None => Ok(()),
        Some(pair) => {
            let what = format!(
                "tensors {} (bytes {} to {}) and {} (bytes {} to {}) overlap",
                pair[0].name, pair[0].start, pair[0].end, pair[1].name, pair[1].start, pair[1].end
            );
            Err(Error::header(path, what))
        }
    }
}

struct Raw {
    name: Box<str>,
    dtype: Dtype,
    shape: Vec<usize>,
    range: [u64; 2],
}

impl Raw {
    fn check(self, path: &Path, data_bytes: usize) -> Result<Entry> {
        let [start, end] = self.range;
        let error = |expected: String, found: String| {
            Err(Error::tensor(path, &*self.name, expected, found))
        };
        if end > data_bytes as u64 {
            return error(
                format!("bytes inside the {data_bytes} bytes of data (a longer file)"),
                format!("data_offsets {start} to {end}; the file is cut short or damaged"),
            );
        }
        if start > end {
            return error(
                "data_offsets in order".to_owned(),
                format!("{start} to {end}"),
            );
        }
        let Some(bytes) = self.dtype.bytes_of(&self.shape) else {
            return error(
                "a size in whole bytes that fits the address space".to_owned(),
                format!("{} with shape {:?}", self.dtype, self.shape),
            );
        };
        if bytes as u64 != end - start {
            return error(
                format!("{bytes} bytes ({} with shape {:?})", self.dtype, self.shape),
                format!("{} bytes (data_offsets {start} to {end})", end - start),
            );
        }
        Ok(Entry {
            dtype: self.dtype,
            shape: self.shape.into_boxed_slice(),
            start: start as usize,
            end: end as usize,
            name: self.name,
        })
    }
}

/// The whole header.
struct Table;

impl<'de> DeserializeSeed<'de> for Table {
    type Value = Vec<Raw>;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Vec<Raw>, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table {
    type Value = Vec<Raw>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Raw>, A::Error> {
        let mut tensors = Vec::new();
        let mut metadata = false;
        while let Some(name) = map.next_key_seed(Name)? {
            if &*name == "__metadata__" {
                if std::mem::replace(&mut metadata, true) {
                    return Err(A::Error::custom("__metadata__ is listed twice"));
                }
                map.next_value_seed(Metadata)?;
                continue;
            }
            if tensors.len() == MAX_TENSORS {
                let what = format!("more than {MAX_TENSORS} tensors");
                return Err(A::Error::custom(what));
            }
            tensors.push(map.next_value_seed(Tensor(name))?);
        }
        Ok(tensors)
    }
}

/// A tensor name of acceptable length, without line breaks that would garble messages.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Box<str>;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Box<str>, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Box<str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor name")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Box<str>, E> {
        if text.len() > MAX_NAME_BYTES {
            let what = format!(
                "a tensor name of {} bytes, at most {MAX_NAME_BYTES}",
                text.len()
            );
            return Err(E::custom(what));
        }
        if text.chars().any(char::is_control) {
            return Err(E::custom(format!(
                "tensor name {text:?} has control characters"
            )));
        }
        Ok(text.into())
    }
}

/// `__metadata__`: strings only, not kept.
struct Metadata;

impl<'de> DeserializeSeed<'de> for Metadata {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Metadata {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("__metadata__ as an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(AnyString)?;
        }
        Ok(())
    }
}

struct AnyString;

impl<'de> DeserializeSeed<'de> for AnyString {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for AnyString {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}

/// Type, shape and range of the tensor of this name.
struct Tensor(Box<str>);

impl<'de> DeserializeSeed<'de> for Tensor {
    type Value = Raw;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Raw, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tensor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {} as an object", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let name = self.0;
        let custom = |what: String| A::Error::custom(format!("tensor {name}: {what}"));
        let inside = |e: A::Error| A::Error::custom(format!("tensor {name}: {e}"));
        let (mut dtype, mut shape, mut range) = (None, None, None);
        while let Some(key) = map.next_key_seed(Name)? {
            let repeated = match &*key {
                "dtype" => {
                    let found = map.next_value_seed(TypeName);
                    dtype.replace(found.map_err(inside)?).is_some()
                }
                "shape" => {
                    let found = map.next_value_seed(Numbers);
                    shape.replace(found.map_err(inside)?).is_some()
                }
                "data_offsets" => {
                    let found = map.next_value_seed(Numbers);
                    range.replace(found.map_err(inside)?).is_some()
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if repeated {
                return Err(custom(format!("{key} is given twice")));
            }
        }
        let missing = |key: &str| custom(format!("no {key}"));
        let shape: Vec<u64> = shape.ok_or_else(|| missing("shape"))?;
        let shape = shape.into_iter().map(usize::try_from).collect();
        let range = range.ok_or_else(|| missing("data_offsets"))?;
        Ok(Raw {
            dtype: dtype.ok_or_else(|| missing("dtype"))?,
            shape: Result::map_err(shape, |e| custom(format!("shape: {e}")))?,
            range: <[u64; 2]>::try_from(range)
                .map_err(|r| custom(format!("{} data_offsets, expected 2", r.len())))?,
            name,
        })
    }
}

struct TypeName;

impl<'de> DeserializeSeed<'de> for TypeName {
    type Value = Dtype;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Dtype, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for TypeName {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of an element type")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Dtype, E> {
        Dtype::from_name(text).ok_or_else(|| {
            let short: String = text.chars().take(32).collect();
            E::custom(format!("unknown element type {short:?}"))
        })
    }
}

/// A short list of whole numbers.
struct Numbers;

impl<'de> DeserializeSeed<'de> for Numbers {
    type Value = Vec<u64>;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Vec<u64>, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of whole numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = seq.next_element()? {
            if numbers.len() == MAX_DIMENSIONS {
                let what = format!("more than {MAX_DIMENSIONS} dimensions");
                return Err(A::Error::custom(what));
            }
            numbers.push(number);
        }
        Ok(numbers)
    }
}
