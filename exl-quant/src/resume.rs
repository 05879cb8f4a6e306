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

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use exl_format::{
    CheckpointWriter, Exl2Linear, SafetensorsFile, WriterOptions, remove_leftovers, to_json_text,
    write_file_atomic,
};
use serde::de::DeserializeOwned;
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
    /// Computed on a GPU: the devices round differently, and a result is all of one.
    #[serde(default)]
    pub(crate) gpu: bool,
}

/// The journal's directory, locked against other conversions.
#[derive(Debug)]
pub(crate) struct Work {
    dir: PathBuf,
    /// The system lets go of the lock when this is closed, also by a kill.
    lock: File,
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
const MEASUREMENT: &str = "measurement.json";
const LOCK: &str = "lock";
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
        let ours = Self::exists(dir);
        let other = |e: std::io::Result<std::fs::DirEntry>| e.is_ok_and(|e| e.file_name() != LOCK);
        let occupied = std::fs::read_dir(dir).is_ok_and(|mut d| d.any(other));
        if occupied && !ours {
            return Err(refuse(
                "is not empty and no journal of ours; choose another --work",
            ));
        }
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let lock = lock(dir)?;
        if restart && ours {
            clear(dir)?;
        }
        remove_leftovers(dir)?;
        let measuring = dir.join(MEASURING);
        std::fs::create_dir_all(&measuring).map_err(|e| Error::io(&measuring, e))?;
        match read_json::<Settings>(&path)? {
            Some(found) if found != *settings => {
                return Err(refuse(&format!(
                    "holds an unfinished conversion with {}; finish it with its own settings, or \
                 discard it with --restart",
                    found.difference(settings)
                )));
            }
            Some(_) => {}
            None => write_file_atomic(&path, to_json_text(settings))?,
        }
        Ok(Self {
            dir: dir.to_owned(),
            lock,
        })
    }

    /// Whether a directory holds a journal.
    pub(crate) fn exists(dir: &Path) -> bool {
        matches!(
            exl_format::read_json::<Settings>(&dir.join(SETTINGS)),
            Ok(Some(_))
        )
    }

    /// Where the measurement lies.
    pub(crate) fn measurement(&self) -> PathBuf {
        self.dir.join(MEASUREMENT)
    }

    fn measuring(&self, name: &str, suffix: &str) -> PathBuf {
        self.dir.join(MEASURING).join(format!("{name}.{suffix}"))
    }

    /// What is known of a linear from an interrupted measurement.
    pub(crate) fn measured(&self, name: &str) -> Result<Option<LinearMeasurement>> {
        read_json(&self.measuring(name, "json"))
    }

    /// Keeps the curve of a linear.
    pub(crate) fn keep_measured(&self, linear: &LinearMeasurement) -> Result<()> {
        let path = self.measuring(&linear.name, "json");
        Ok(write_file_atomic(&path, to_json_text(linear))?)
    }

    /// The sensitivity of a linear from an interrupted measurement.
    pub(crate) fn sensitivity(&self, name: &str) -> Result<Option<f64>> {
        read_json(&self.measuring(name, "kl.json"))
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

    /// Removes the journal of a finished conversion. What others put beside it stays.
    pub(crate) fn remove(self) -> Result<()> {
        clear(&self.dir)?;
        drop(self.lock);
        let lock = self.dir.join(LOCK);
        std::fs::remove_file(&lock).map_err(|e| Error::io(lock, e))?;
        // Fails when something else is in it, and then it should.
        let _ = std::fs::remove_dir(&self.dir);
        Ok(())
    }
}

/// Reads a file of the journal.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    exl_format::read_json(path).map_err(|e| Error::Journal {
        file: path.to_owned(),
        what: format!("is damaged ({e}); discard the journal with --restart"),
    })
}

/// Takes the lock of a journal.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Journal {
            file: dir.to_owned(),
            what: "is in use by another conversion; wait for it, or choose another --work"
                .to_owned(),
        }),
        Err(TryLockError::Error(e)) => Err(Error::io(path, e)),
    }
}

/// Removes what journals consist of, and nothing else.
fn clear(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let gone = match &*name {
            MEASURING => std::fs::remove_dir_all(&path),
            name if name.ends_with("bpw") && path.is_dir() => std::fs::remove_dir_all(&path),
            SETTINGS | MEASUREMENT => std::fs::remove_file(&path),
            _ => Ok(()),
        };
        gone.map_err(|e| Error::io(path, e))?;
    }
    Ok(())
}

impl Settings {
    fn difference(&self, other: &Self) -> &'static str {
        if self.model != other.model {
            "another model"
        } else if self.calibration != other.calibration {
            "other calibration data"
        } else if self.converter != other.converter {
            "another version of this program"
        } else if self.gpu && !other.gpu {
            "a GPU at work (--device cuda)"
        } else if other.gpu && !self.gpu {
            "the CPU at work (--device cpu)"
        } else {
            "other options"
        }
    }
}

impl Journal {
    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

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

    /// A linear that was stored before.
    ///
    /// # Errors
    /// When its files are gone or damaged.
    pub(crate) fn stored(&self, name: &str) -> Result<Stored> {
        self.load(name)?.ok_or_else(|| Error::Journal {
            file: self.path(name, "safetensors"),
            what: "vanished; run the same command again".to_owned(),
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(model: &str) -> Settings {
        Settings {
            converter: "exl 0".to_owned(),
            model: model.to_owned(),
            calibration: "c".to_owned(),
            options: "o".to_owned(),
            gpu: false,
        }
    }

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir =
                std::env::temp_dir().join(format!("exl-journal-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_one_conversion_works_in_a_journal() {
        let dir = Dir::new("lock");
        let first = Work::open(&dir.0, &settings("a"), false).unwrap();
        let second = Work::open(&dir.0, &settings("a"), false).unwrap_err();
        assert!(second.to_string().contains("in use"), "{second}");
        drop(first);
        Work::open(&dir.0, &settings("a"), false).unwrap();
    }

    #[test]
    fn a_conversion_goes_on_where_it_computed() {
        let dir = Dir::new("device");
        let there = Settings {
            gpu: true,
            ..settings("a")
        };
        for (begun, other, flag) in [
            (&there, &settings("a"), "--device cuda"),
            (&settings("a"), &there, "--device cpu"),
        ] {
            drop(Work::open(&dir.0, begun, true).unwrap());
            let error = Work::open(&dir.0, other, false).unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
            drop(Work::open(&dir.0, begun, false).unwrap());
        }
    }

    #[test]
    fn a_restart_spares_what_is_not_the_journals() {
        let dir = Dir::new("foreign");
        std::fs::create_dir_all(&dir.0).unwrap();
        std::fs::write(dir.0.join(SETTINGS), "{\"theme\": \"dark\"}").unwrap();
        for restart in [false, true] {
            assert!(Work::open(&dir.0, &settings("a"), restart).is_err());
            assert!(dir.0.join(SETTINGS).is_file());
        }
        std::fs::remove_file(dir.0.join(SETTINGS)).unwrap();

        drop(Work::open(&dir.0, &settings("a"), false).unwrap());
        std::fs::write(dir.0.join("notes.txt"), "mine").unwrap();
        assert!(Work::open(&dir.0, &settings("b"), false).is_err());
        let work = Work::open(&dir.0, &settings("b"), true).unwrap();
        work.target("4.0bpw").unwrap();
        work.remove().unwrap();
        assert!(dir.0.join("notes.txt").is_file());
        assert!(!dir.0.join("4.0bpw").exists() && !dir.0.join(SETTINGS).exists());
    }
}
