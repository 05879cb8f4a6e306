//! The measurement: rate-distortion curves, damping, and the sensitivity of the model's output.

use std::path::Path;

use exl_format::{read_json, to_json_text, write_file_atomic};
use serde::{Deserialize, Serialize};

use crate::{Curve, Error, Layout, Point, Result};

/// Version of the file's layout.
pub const MEASUREMENT_VERSION: u32 = 1;

/// Everything an allocation needs, for every later bitrate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Version of this layout.
    pub version: u32,
    /// Hash of the model it was made of.
    pub model: String,
    /// Hash of the calibration tokens.
    pub calibration: String,
    /// Rows measured.
    pub rows: usize,
    /// Tokens per row.
    pub length: usize,
    /// Every linear in model order, the head last.
    pub linears: Vec<LinearMeasurement>,
}

/// One linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearMeasurement {
    /// Its key.
    pub name: String,
    /// Input features.
    pub inputs: usize,
    /// Output features, padded.
    pub outputs: usize,
    /// Mean squared output per token.
    pub energy: f64,
    /// Damping that did best on the hold-out rows.
    pub damping: f64,
    /// Divergence of the model's predictions per unit of output error.
    pub sensitivity: f64,
    /// Share of the tokens that the linear sees: below 1 for experts.
    #[serde(default = "whole")]
    pub share: f64,
    /// Whether the sensitivity was interpolated between measured layers.
    pub interpolated: bool,
    /// The curve.
    pub points: Vec<LayoutPoint>,
}

fn whole() -> f64 {
    1.0
}

/// One point of a curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayoutPoint {
    /// Text form of the layout.
    pub layout: String,
    /// Size in bits.
    pub bits: u64,
    /// Output error on the hold-out rows.
    pub loss: f64,
}

impl LinearMeasurement {
    /// From a curve; sensitivity 0 until it is known.
    pub(super) fn new(name: &str, curve: &Curve, (damping, share): (f64, f64)) -> Self {
        let point = |p: &Point| LayoutPoint {
            layout: p.layout.to_string(),
            bits: p.bits,
            loss: p.loss,
        };
        Self {
            name: name.to_owned(),
            inputs: curve.inputs,
            outputs: curve.outputs,
            energy: curve.energy,
            damping,
            sensitivity: 0.0,
            share,
            interpolated: false,
            points: curve.points.iter().map(point).collect(),
        }
    }

    /// The layouts of the curve.
    ///
    /// # Errors
    /// [`Error::Layout`] when the file was damaged.
    pub fn layouts(&self) -> Result<Vec<Layout>> {
        self.points.iter().map(|p| p.layout.parse()).collect()
    }
}

impl Measurement {
    /// Reads a measurement and checks that it belongs to a model.
    ///
    /// # Errors
    /// [`Error::Journal`] when it is missing, damaged, newer, or of another model.
    pub fn read(path: &Path, model: &str) -> Result<Self> {
        let refuse = |what: String| Error::Journal {
            file: path.to_owned(),
            what,
        };
        let found: Option<Self> = read_json(path)?;
        let found = found.ok_or_else(|| refuse("there is no such measurement".into()))?;
        if found.version != MEASUREMENT_VERSION {
            return Err(refuse(format!(
                "its layout is version {}, this program reads {MEASUREMENT_VERSION}; measure again",
                found.version
            )));
        }
        if found.model != model {
            return Err(refuse(
                "it was made of another model (or of an earlier state of this one); \
                 leave --measurement out to measure again"
                    .into(),
            ));
        }
        for linear in &found.linears {
            let figures = [
                linear.energy,
                linear.damping,
                linear.sensitivity,
                linear.share,
            ];
            let losses = linear.points.iter().map(|p| p.loss);
            if linear.points.is_empty() || losses.chain(figures).any(|x| !x.is_finite() || x < 0.0)
            {
                return Err(refuse(format!("the curve of {} is damaged", linear.name)));
            }
            for (layout, point) in linear.layouts()?.iter().zip(&linear.points) {
                if layout.rows() != linear.inputs || layout.bits(linear.outputs) != point.bits {
                    return Err(refuse(format!("the curve of {} is damaged", linear.name)));
                }
            }
        }
        Ok(found)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(write_file_atomic(path, to_json_text(self))?)
    }

    /// The entry of a linear.
    pub fn linear(&self, name: &str) -> Option<&LinearMeasurement> {
        self.linears.iter().find(|l| l.name == name)
    }
}
