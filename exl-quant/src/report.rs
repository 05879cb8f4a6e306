//! What a conversion tells its caller.

use std::path::PathBuf;

use exl_format::Quality;
use serde::Serialize;

/// One finished bitrate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvertReport {
    /// Bits per weight asked for.
    pub bits: f64,
    /// The checkpoint's directory.
    pub out: PathBuf,
    /// Size of the original's weight files.
    pub original_file_bytes: u64,
    /// Size of the weight files written, headers included.
    pub file_bytes: u64,
    /// Divergence that the allocation expected.
    pub predicted_kl: f64,
    /// Time since the bitrate was begun in this run.
    pub seconds: f64,
    /// The report beside the checkpoint; its evaluation is on the hold-out calibration rows.
    pub quality: Quality,
}
