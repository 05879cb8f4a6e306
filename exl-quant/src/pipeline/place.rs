//! Where results may go: looked at before hours of work, not after.

use std::path::{Path, PathBuf};

use exl_models::ModelSource;

use super::{ConvertOptions, budget};
use crate::{Error, Result};

/// What every result has.
pub(super) const CONFIG: &str = "config.json";
const ENDING: &str = "safetensors";
/// Base name of the files of tensors.
pub(super) const BASE: &str = "output";

fn refuse(dir: &Path, what: &str) -> Error {
    Error::Option {
        option: "--out",
        what: format!("{} {what}", dir.display()),
    }
}

/// Every directory that a result goes to.
fn outputs(options: &ConvertOptions) -> impl Iterator<Item = PathBuf> {
    let bits = if options.measure_only {
        &[][..]
    } else {
        &options.bits
    };
    bits.iter().map(|&b| budget::out_dir(options, b))
}

/// A path without links and dots, also when its end does not exist yet.
fn resolved(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            // Joining nothing would append a separator.
            return Ok(match rest.as_os_str().is_empty() {
                true => real,
                false => real.join(rest),
            });
        }
    }
    Ok(path)
}

/// Refuses to write into the model that is read.
pub(super) fn check_source(options: &ConvertOptions, source: &ModelSource) -> Result<()> {
    let from = resolved(source.files().dir())?;
    for dir in outputs(options) {
        let to = resolved(&dir)?;
        if to.starts_with(&from) {
            let what = "is the model itself or inside it; name another directory";
            return Err(refuse(&dir, what));
        }
    }
    Ok(())
}

/// Refuses directories that cannot take a result or hold something else. `resumed`: a journal says
/// that results there are this conversion's own.
pub(super) fn check_outputs(options: &ConvertOptions, resumed: bool) -> Result<()> {
    for dir in outputs(options) {
        if dir.exists() && !dir.is_dir() {
            return Err(refuse(&dir, "is a file; name a directory"));
        }
        let missing = dir.ancestors().take_while(|a| !a.exists());
        let made: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
            let path = entry.map_err(|e| Error::io(&dir, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.extension().is_some_and(|e| e == ENDING) && !name.starts_with(BASE) {
                let what =
                    format!("holds the weights of another model ({name}); name another directory");
                return Err(refuse(&dir, &what));
            }
            if name == CONFIG && !resumed && !options.restart {
                let what =
                    "holds a finished model; name another directory, or replace it with --restart";
                return Err(refuse(&dir, what));
            }
        }
        let probe = dir.join(".exl-write-test");
        let written = std::fs::write(&probe, "").and_then(|()| std::fs::remove_file(&probe));
        // They are made again when there is a result: a conversion that is interrupted leaves none.
        for folder in made {
            let _ = std::fs::remove_dir(folder);
        }
        written.map_err(|e| Error::io(&dir, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_tried_and_not_left_behind() {
        let root = std::env::temp_dir().join(format!("exl-place-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        let options = |out: &Path| ConvertOptions::new("model", out, vec![4.0]);
        check_outputs(&options(&root.join("a/b")), false).unwrap();
        assert!(!root.join("a").exists());
        // One that was there stays.
        check_outputs(&options(&root), false).unwrap();
        assert!(root.is_dir());
        std::fs::write(root.join("file"), "").unwrap();
        let error = check_outputs(&options(&root.join("file/out")), false).unwrap_err();
        assert!(error.to_string().contains("file/out"), "{error}");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
