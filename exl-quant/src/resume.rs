//! The journal of a conversion: what is done survives a kill at any moment.
//!
//! ```text
//! WORK/settings.json            what the journal belongs to; another conversion is refused
//! WORK/measuring/KEY.json       curve of a linear, while the model is measured
//! WORK/measuring/KEY.kl.json    its sensitivity
//! WORK/measurement.json         once the model is measured
//! WORK/4.0bpw/KEY.json          figures of a linear, written before
//! WORK/4.0bpw/KEY.safetensors   its tensors: their presence means it is done
//! ```
//!
//! Every file is written aside and renamed.

use std::path::{Path, PathBuf};

use exl_format::{
    CheckpointWriter, Exl2Linear, SafetensorsFile, WriterOptions, read_json, to_json_text,
    write_file_atomic,
};
use serde::{Deserialize, Serialize};

use crate::pipeline::{LinearMeasurement, LinearStats};
use crate::{Error, Result};

/// What a journal belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Version of the converter: its numbers may change from one to the next.
    pub(crate) converter: String,
    /// Hash of the model.
    pub(crate) model: String,
    /// Hash of the calibration tokens.
    pub(crate) calibration: String,
    /// Everything else that changes the result, as text.
    pub(crate) options: String,
}

/// The journal's directory.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    dir: PathBuf,
}

/// The part of one target.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
}

/// A finished linear.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) linear: Exl2Linear,
    pub(crate) stats: LinearStats,
}

const SETTINGS: &str = "settings.json";
const MEASURING: &str = "measuring";
const FINISHED: &str = "finished";

impl Work {
    /// Opens or begins a journal.
    ///
    /// # Errors
    /// [`Error::Journal`] when the directory holds the journal of another conversion, or files
    /// that are none of ours.
    pub(crate) fn open(dir: &Path, settings: &Settings, restart: bool) -> Result<Self> {
        let refuse = |what: &str| Error::Journal {
            file: dir.to_owned(),
            what: what.to_owned(),
        };
        let path = dir.join(SETTINGS);
        let ours = path.is_file();
        let occupied = std::fs::read_dir(dir).is_ok_and(|mut d| d.next().is_some());
        if occupied && !ours {
            return Err(refuse(
                "is not empty and no journal of ours; choose another --work",
            ));
        }
        if restart && ours {
            std::fs::remove_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        }
        let measuring = dir.join(MEASURING);
        std::fs::create_dir_all(&measuring).map_err(|e| Error::io(&measuring, e))?;
        match read_json::<Settings>(&path)? {
            Some(found) if found != *settings => Err(refuse(&format!(
                "holds an unfinished conversion with {}; finish it with its own settings, or \
                 discard it with --restart",
                found.difference(settings)
            ))),
            Some(_) => Ok(Self {
                dir: dir.to_owned(),
            }),
            None => {
                write_file_atomic(&path, to_json_text(settings))?;
                Ok(Self {
                    dir: dir.to_owned(),
                })
            }
        }
    }

    /// Where the measurement lies.
    pub(crate) fn measurement(&self) -> PathBuf {
        self.dir.join("measurement.json")
    }

    fn measuring(&self, name: &str, suffix: &str) -> PathBuf {
        self.dir.join(MEASURING).join(format!("{name}.{suffix}"))
    }

    /// What is known of a linear from an interrupted measurement.
    pub(crate) fn measured(&self, name: &str) -> Result<Option<LinearMeasurement>> {
        Ok(read_json(&self.measuring(name, "json"))?)
    }

    /// Keeps the curve of a linear.
    pub(crate) fn keep_measured(&self, linear: &LinearMeasurement) -> Result<()> {
        let path = self.measuring(&linear.name, "json");
        Ok(write_file_atomic(&path, to_json_text(linear))?)
    }

    /// The sensitivity of a linear from an interrupted measurement.
    pub(crate) fn sensitivity(&self, name: &str) -> Result<Option<f64>> {
        Ok(read_json(&self.measuring(name, "kl.json"))?)
    }

    /// Keeps the sensitivity of a linear.
    pub(crate) fn keep_sensitivity(&self, name: &str, value: f64) -> Result<()> {
        let path = self.measuring(name, "kl.json");
        Ok(write_file_atomic(&path, to_json_text(&value))?)
    }

    /// The part of one target.
    pub(crate) fn target(&self, name: &str) -> Result<Journal> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        Ok(Journal { dir })
    }

    /// Removes the journal of a finished conversion.
    pub(crate) fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.dir).map_err(|e| Error::io(&self.dir, e))
    }
}

impl Settings {
    fn difference(&self, other: &Self) -> &'static str {
        if self.model != other.model {
            "another model"
        } else if self.calibration != other.calibration {
            "other calibration data"
        } else if self.converter != other.converter {
            "another version of this program"
        } else {
            "other options"
        }
    }
}

impl Journal {
    fn path(&self, name: &str, suffix: &str) -> PathBuf {
        self.dir.join(format!("{name}.{suffix}"))
    }

    /// Whether a linear is done.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path(name, "safetensors").is_file()
    }

    /// Whether the checkpoint of this target is complete.
    pub(crate) fn is_finished(&self) -> bool {
        self.dir.join(FINISHED).is_file()
    }

    /// Marks the checkpoint as complete.
    pub(crate) fn finish(&self) -> Result<()> {
        Ok(write_file_atomic(&self.dir.join(FINISHED), "")?)
    }

    /// A finished linear.
    ///
    /// # Errors
    /// When its files are damaged.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Stored>> {
        if !self.has(name) {
            return Ok(None);
        }
        let file = SafetensorsFile::open(&self.path(name, "safetensors"))?;
        let linear = Exl2Linear::read(&file, name)?;
        let stats_path = self.path(name, "json");
        let stats = read_json(&stats_path)?.ok_or_else(|| Error::Journal {
            file: stats_path,
            what: "is missing; discard the journal with --restart".to_owned(),
        })?;
        Ok(Some(Stored { linear, stats }))
    }

    /// Stores a finished linear.
    ///
    /// # Errors
    /// When the system refuses, a full disk for one.
    pub(crate) fn store(&self, name: &str, stored: &Stored) -> Result<()> {
        write_file_atomic(&self.path(name, "json"), to_json_text(&stored.stats))?;
        let tensors = stored.linear.to_tensors(name);
        let options = WriterOptions {
            base: name.to_owned(),
            shard_bytes: u64::MAX,
            replace: true,
        };
        let specs = tensors.iter().map(|t| t.spec.clone()).collect();
        let mut writer = CheckpointWriter::create(&self.dir, specs, &options)?;
        for tensor in &tensors {
            writer.write(&tensor.spec.name, &tensor.data)?;
        }
        writer.finish()?;
        Ok(())
    }
}
