//! Small JSON files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// Longest JSON file that is read: the index of the largest published model has 9 MB.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a JSON file; `None` when there is none of that name.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Json`] when it is not what was expected.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    let value = serde_json::from_str(&text).map_err(|e| Error::Json {
        file: path.to_owned(),
        what: e.to_string(),
    })?;
    Ok(Some(value))
}

/// Reads a text file of limited size; `None` when there is none of that name.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io("open", path))?,
    };
    let mut text = String::new();
    let read = file
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(Error::io("read", path))?;
    if read as u64 > MAX_BYTES {
        return Err(Error::Json {
            file: path.to_owned(),
            what: format!("larger than {} MiB", MAX_BYTES >> 20),
        });
    }
    Ok(Some(text))
}

/// JSON text with an indent of four spaces and a final newline, as converters of this format
/// write `config.json`.
pub fn to_json_text<T: Serialize>(value: &T) -> String {
    let mut out = Vec::new();
    let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, indent);
    value
        .serialize(&mut serializer)
        .expect("plain data serializes into memory");
    out.push(b'\n');
    String::from_utf8(out).expect("serde_json writes UTF-8")
}

/// A value as it appears in an error: whole objects would hide the message.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Null => "null".to_owned(),
        scalar => {
            let text = scalar.to_string();
            if text.chars().count() <= 40 {
                return text;
            }
            text.chars().take(37).chain("...".chars()).collect()
        }
    }
}
