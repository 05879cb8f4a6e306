//! What goes beside the tensors: configuration, tokenizer, templates.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::atomic::{PARTIAL, Partial, sync_dir};
use crate::{Error, Result};

/// Endings of files that hold or index weights.
const WEIGHTS: [&str; 12] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
    ".gguf",
    ".onnx",
    ".index.json",
];
/// Files that say what the weights are: true of the source only.
const ABOUT_WEIGHTS: [&str; 3] = ["config.json", "quality.json", "quantize_config.json"];

/// Copies every regular file directly inside `src` to `dst`, except weights, their indexes, and what
/// describes them (config.json, quality.json); returns their names. Nothing is copied when both are the same directory.
///
/// # Errors
/// [`Error::Io`] when the system refuses.
pub fn copy_side_files(src: &Path, dst: &Path) -> Result<Vec<String>> {
    fs::create_dir_all(dst).map_err(Error::io("create", dst))?;
    let real = |p: &Path| p.canonicalize().map_err(Error::io("open", p));
    if real(src)? == real(dst)? {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(src).map_err(Error::io("list", src))? {
        let entry = entry.map_err(Error::io("list", src))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let weights = WEIGHTS.iter().any(|e| name.ends_with(e))
            || name.ends_with(PARTIAL)
            || ABOUT_WEIGHTS.contains(&&*name);
        // Through links: hub caches consist of them.
        if !weights && entry.path().is_file() {
            names.push(name);
        }
    }
    names.sort();
    for name in &names {
        copy(&src.join(name), &dst.join(name))?;
    }
    sync_dir(dst)?;
    Ok(names)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io("open", from))?;
    let mut partial = Partial::create(to)?;
    partial.act("write", |file| {
        io::copy(&mut source, file)?;
        file.sync_all()
    })?;
    partial.publish()
}

/// The `quantization_config` of an EXL2 checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizationConfig {
    /// Version of the converter.
    pub version: String,
    /// Bits per weight that were asked for.
    pub bits: f64,
    /// Bits of the head.
    pub head_bits: u32,
    /// Calibration rows.
    pub rows: usize,
    /// Tokens per row.
    pub length: usize,
    /// Name of the calibration data, `(default)` for the built-in.
    pub dataset: String,
}

/// Puts `quantization_config` into a parsed `config.json`, replacing an older one.
///
/// # Errors
/// [`Error::Encode`] when `config` is no object.
pub fn patch_quantization_config(config: &mut Value, what: &QuantizationConfig) -> Result<()> {
    let Some(object) = config.as_object_mut() else {
        let found = crate::json::brief(config);
        return Err(Error::encode("config.json", "an object", found));
    };
    let block = json!({
        "quant_method": "exl2",
        "version": what.version,
        "bits": what.bits,
        "head_bits": what.head_bits,
        "calibration": {
            "rows": what.rows,
            "length": what.length,
            "dataset": what.dataset,
        },
    });
    object.insert("quantization_config".to_owned(), block);
    Ok(())
}
