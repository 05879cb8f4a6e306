//! The file kinds.

use std::io::{BufRead, BufReader};
use std::path::Path;

use exl_format::{Dtype, SafetensorsFile, TensorSource};
use serde_json::Value;

use super::Stream;
use crate::{Error, Result};

/// Text taken from a plain file at a time, so that a large file is not encoded for a few rows.
const TEXT_CHUNK: usize = 1 << 18;

pub(super) fn text(path: &Path, stream: &mut Stream<'_>) -> Result<()> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        stream.refuse(format!(
            "is not UTF-8 text (byte {})",
            e.utf8_error().valid_up_to()
        ))
    })?;
    let mut rest = text.as_str();
    while !rest.is_empty() {
        // Cut after a line so that no word is torn.
        let mut end = rest.len().min(TEXT_CHUNK);
        while !rest.is_char_boundary(end) {
            end += 1;
        }
        let end = rest[end..].find('\n').map_or(rest.len(), |n| end + n + 1);
        if stream.add(&rest[..end])? {
            break;
        }
        rest = &rest[end..];
    }
    Ok(())
}

pub(super) fn json_lines(path: &Path, stream: &mut Stream<'_>) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| Error::io(path, e))?;
        if line.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&line).map_err(|e| {
            stream.refuse(format!(
                "line {}: {e}; one JSON object per line is expected",
                i + 1
            ))
        })?;
        let text = match &value {
            Value::String(text) => Some(text.clone()),
            Value::Object(fields) => match fields.get("text").and_then(Value::as_str) {
                Some(text) => Some(text.to_owned()),
                None => {
                    let all: Vec<&str> = fields.values().filter_map(Value::as_str).collect();
                    (!all.is_empty()).then(|| all.join(" "))
                }
            },
            _ => None,
        };
        let Some(text) = text else {
            return Err(stream.refuse(format!("line {} has no string field", i + 1)));
        };
        if stream.add(&text)? {
            break;
        }
    }
    Ok(())
}

#[cfg(feature = "parquet")]
pub(super) fn parquet(path: &Path, stream: &mut Stream<'_>) -> Result<()> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;

    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let bad = |stream: &Stream<'_>, e: parquet::errors::ParquetError| {
        stream.refuse(format!(
            "cannot be read as Parquet (snappy or uncompressed): {e}"
        ))
    };
    let reader = SerializedFileReader::new(file).map_err(|e| bad(stream, e))?;
    let rows = reader.get_row_iter(None).map_err(|e| bad(stream, e))?;
    for row in rows {
        let row = row.map_err(|e| bad(stream, e))?;
        let mut all: Vec<&str> = Vec::new();
        let mut text = None;
        for (name, field) in row.get_column_iter() {
            if let Field::Str(value) = field {
                all.push(value);
                if name == "text" {
                    text = Some(value.as_str());
                }
            }
        }
        if all.is_empty() {
            return Err(stream.refuse("has no column of strings".into()));
        }
        let joined = text.map_or_else(|| all.join(" "), str::to_owned);
        if stream.add(&joined)? {
            break;
        }
    }
    Ok(())
}

#[cfg(not(feature = "parquet"))]
pub(super) fn parquet(_: &Path, stream: &mut Stream<'_>) -> Result<()> {
    Err(stream.refuse("this program was built without the feature `parquet`".into()))
}

pub(super) fn token_rows(path: &Path, rows: usize, length: usize) -> Result<Vec<Vec<u32>>> {
    let refuse = |what: String| Error::Calibration {
        file: path.display().to_string(),
        what,
    };
    let file = SafetensorsFile::open(path)?;
    let ids = file.tensor("input_ids")?;
    let &[have, width] = &ids.shape[..] else {
        return Err(refuse(format!(
            "input_ids has shape {:?}, expected [rows, length]",
            ids.shape
        )));
    };
    if rows > have || length > width {
        return Err(refuse(format!(
            "holds {have} rows of {width} tokens, {rows} of {length} are needed; \
             lower --rows or --length"
        )));
    }
    let ids = token_ids(&ids.data, ids.dtype)
        .ok_or_else(|| refuse("input_ids must be I32 or I64 and not negative".into()))?;
    Ok(ids
        .chunks_exact(width)
        .take(rows)
        .map(|row| row[..length].to_vec())
        .collect())
}

/// Little-endian integers of 32 or 64 bits as token ids; `None` for another type or a negative one.
pub fn token_ids(data: &[u8], dtype: Dtype) -> Option<Vec<u32>> {
    match dtype {
        Dtype::I32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| u32::try_from(i32::from_le_bytes(*b)).ok())
            .collect(),
        Dtype::I64 => data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| u32::try_from(i64::from_le_bytes(*b)).ok())
            .collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_both_widths_are_read_and_negative_ones_refused() {
        let narrow: Vec<u8> = [1i32, 70_000]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        assert_eq!(token_ids(&narrow, Dtype::I32), Some(vec![1, 70_000]));
        let wide: Vec<u8> = [1i64, 2].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(token_ids(&wide, Dtype::I64), Some(vec![1, 2]));
        assert_eq!(token_ids(&(-1i32).to_le_bytes(), Dtype::I32), None);
        assert_eq!(token_ids(&narrow, Dtype::F32), None);
    }
}
