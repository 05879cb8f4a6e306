//! `quality.json`: what a conversion cost, tensor by tensor, and what it lost.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, read_json, to_json_text, write_file_atomic};

/// Version of the layout of the file; readers refuse newer ones.
pub const QUALITY_VERSION: u32 = 1;

/// The report beside a converted checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Version of this layout.
    pub version: u32,
    /// Name and version of the program that wrote it.
    pub converter: String,
    /// Bits per weight that were asked for.
    pub target_bits_per_weight: f64,
    /// What was calibrated with.
    pub calibration: Calibration,
    /// Every quantized tensor in model order.
    pub tensors: Vec<TensorQuality>,
    /// Sums.
    pub totals: Totals,
    /// Comparison with the original, if it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,
}

/// Calibration data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Name of the data, `(default)` for the built-in.
    pub dataset: String,
    /// Rows.
    pub rows: usize,
    /// Tokens per row.
    pub length: usize,
    /// Hash of the tokens, in hexadecimal.
    pub hash: String,
}

/// One quantized linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorQuality {
    /// Its key, without a suffix.
    pub name: String,
    /// Size in bits by the accounting of the format.
    pub bits: u64,
    /// The groups, as in `1x5b_64g/2x4b_128g`: one of 64 rows, then two of 128.
    pub groups: String,
    /// `bits` over the number of weights.
    pub bits_per_weight: f64,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Squared difference of its outputs from those of the original weights on the same inputs, relative
    /// to these, on the calibration rows. Rounding that makes up for errors of earlier layers differs
    /// on purpose.
    pub train_loss: f64,
    /// The same on rows that were held out.
    pub holdout_loss: f64,
}

/// Sums over the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Bits of the decoder's linears over their weights: what a target bitrate means.
    pub bits_per_weight: f64,
    /// Bits of the head over its weights.
    pub head_bits_per_weight: f64,
    /// Bytes of all tensors, unquantized ones included.
    pub bytes: u64,
    /// Bytes of all tensors of the original.
    pub original_bytes: u64,
}

/// Comparison with the original on held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean Kullback-Leibler divergence from the original, natural logarithm.
    pub mean_kl: f64,
    /// Its 99th percentile over positions.
    pub p99_kl: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
    /// Perplexity.
    pub perplexity: f64,
    /// Perplexity of the original.
    pub original_perplexity: f64,
    /// Positions compared.
    pub tokens: usize,
}

impl Quality {
    /// Name of the file beside a checkpoint.
    pub const FILE: &str = "quality.json";

    /// Reads a report; `None` when there is none of that name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], or [`Error::Config`] when its layout is newer.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let found: Option<Self> = read_json(path)?;
        match found {
            Some(q) if q.version > QUALITY_VERSION => Err(Error::Config {
                file: path.to_owned(),
                key: "version".to_owned(),
                expected: format!("at most {QUALITY_VERSION}; a newer program wrote it"),
                found: q.version.to_string(),
            }),
            other => Ok(other),
        }
    }

    /// Writes the report, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_file_atomic(path, to_json_text(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Quality {
        Quality {
            version: QUALITY_VERSION,
            converter: "exl 0.1.0".to_owned(),
            target_bits_per_weight: 4.0,
            calibration: Calibration {
                dataset: "(default)".to_owned(),
                rows: 100,
                length: 2048,
                hash: "0123abcd".to_owned(),
            },
            tensors: vec![TensorQuality {
                name: "model.layers.0.self_attn.q_proj".to_owned(),
                bits: 53_085_696,
                groups: "1x4b_128g/2x3b_128g".to_owned(),
                bits_per_weight: 3.16415,
                bytes: 6_635_712,
                train_loss: 0.012,
                holdout_loss: 0.013,
            }],
            totals: Totals {
                bits_per_weight: 3.998,
                head_bits_per_weight: 6.1,
                bytes: 1 << 31,
                original_bytes: 7 << 31,
            },
            evaluation: None,
        }
    }

    #[test]
    fn round_trip() {
        let path = std::env::temp_dir().join(format!("exl-quality-{}", std::process::id()));
        assert_eq!(Quality::read(&path).unwrap(), None);
        let mut quality = sample();
        quality.write(&path).unwrap();
        assert_eq!(Quality::read(&path).unwrap().unwrap(), quality);
        quality.evaluation = Some(Evaluation {
            mean_kl: 0.07,
            p99_kl: 0.5,
            top1: 0.82,
            perplexity: 27.2,
            original_perplexity: 25.7,
            tokens: 12_288,
        });
        quality.write(&path).unwrap();
        assert_eq!(Quality::read(&path).unwrap().unwrap(), quality);
        quality.version += 1;
        quality.write(&path).unwrap();
        let error = Quality::read(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("a newer program wrote it, found 2"),
            "{error}"
        );
        std::fs::write(&path, "{\"version\": 1}").unwrap();
        let error = Quality::read(&path).unwrap_err().to_string();
        assert!(error.contains("not valid JSON: missing field"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}
