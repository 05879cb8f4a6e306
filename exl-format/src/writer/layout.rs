//! Where every tensor goes: shards, offsets, headers.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::TensorSpec;
use crate::safetensors::{MAX_DIMENSIONS, MAX_NAME_BYTES};
use crate::{Error, MAX_HEADER_BYTES, Result};

/// The header is padded to this, so that aligned offsets are aligned in the file.
const ALIGN: usize = 8;
/// What a file offset can express.
const MAX_TENSOR_BYTES: u64 = i64::MAX as u64;

/// One file.
pub(super) struct ShardLayout {
    /// In file order.
    pub(super) tensors: Vec<Placed>,
    /// Bytes of all tensors.
    pub(super) bytes: u64,
}

pub(super) struct Placed {
    pub(super) spec: TensorSpec,
    /// Offset from the end of the header.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Cuts the tensors into files in their order. Inside a file, wider elements come first, so that
/// all are aligned without gaps, which the format does not allow.
pub(super) fn plan(specs: Vec<TensorSpec>, shard_bytes: u64) -> Result<Vec<ShardLayout>> {
    check(&specs)?;
    let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new()];
    let mut filled = 0u64;
    for spec in specs {
        filled = filled.saturating_add(spec.bytes());
        let last = shards.len() - 1;
        if filled > shard_bytes && !shards[last].is_empty() {
            filled = spec.bytes();
            shards.push(vec![spec]);
        } else {
            shards[last].push(spec);
        }
    }
    shards.into_iter().map(place).collect()
}

/// Names that a reader takes, each once, and sizes that fit a file.
fn check(specs: &[TensorSpec]) -> Result<()> {
    let mut seen = HashSet::new();
    for spec in specs {
        let what = || format!("tensor {:?}", spec.name);
        let named = !spec.name.is_empty() && spec.name.len() <= MAX_NAME_BYTES;
        if !named || spec.name == "__metadata__" || spec.name.chars().any(char::is_control) {
            let expected = format!("a name of 1 to {MAX_NAME_BYTES} bytes of plain text");
            return Err(Error::encode(what(), expected, "another"));
        }
        if !seen.insert(&spec.name) {
            return Err(Error::encode(what(), "each name once", "it twice"));
        }
        if spec.bytes() > MAX_TENSOR_BYTES || spec.shape.len() > MAX_DIMENSIONS {
            let found = format!("{} with shape {:?}", spec.dtype, spec.shape);
            return Err(Error::encode(what(), "a shape that fits a file", found));
        }
    }
    Ok(())
}

fn place(mut specs: Vec<TensorSpec>) -> Result<ShardLayout> {
    specs.sort_by_key(|s| std::cmp::Reverse(s.dtype.bits()));
    let mut layout = ShardLayout {
        tensors: Vec::with_capacity(specs.len()),
        bytes: 0,
    };
    for spec in specs {
        let (start, bytes) = (layout.bytes, spec.bytes());
        let end = start.checked_add(bytes).ok_or_else(|| {
            let expected = "offsets of 64 bits; use smaller shards";
            Error::encode(format!("tensor {}", spec.name), expected, "more")
        })?;
        layout.bytes = end;
        layout.tensors.push(Placed { spec, start, bytes });
    }
    let header = layout.header().len() as u64;
    if header > MAX_HEADER_BYTES {
        let expected = format!("at most {MAX_HEADER_BYTES} bytes; use smaller shards");
        return Err(Error::encode(
            "safetensors header",
            expected,
            header.to_string(),
        ));
    }
    Ok(layout)
}

impl ShardLayout {
    /// Length and padded JSON.
    pub(super) fn header(&self) -> Vec<u8> {
        let mut table = Map::new();
        table.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        for t in &self.tensors {
            let entry = json!({
                "dtype": t.spec.dtype.as_str(),
                "shape": t.spec.shape,
                "data_offsets": [t.start, t.start + t.bytes],
            });
            table.insert(t.spec.name.clone(), entry);
        }
        let mut json = Value::Object(table).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(ALIGN), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        header
    }
}
