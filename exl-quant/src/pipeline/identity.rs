//! Which model a measurement or a journal belongs to.

use exl_format::ModelFiles;

use crate::{Error, Result};

/// Bytes sampled at a time.
const SAMPLE: u64 = 1 << 20;

/// A hash over the configuration, the names and sizes of all weight files, and samples of their
/// content: beginning (the header), middle and end. Reading every byte of a large model would cost
/// more than measuring it.
pub(super) fn model_hash(files: &ModelFiles) -> Result<String> {
    use std::io::{Read, Seek, SeekFrom};

    let mut hasher = blake3::Hasher::new();
    let config = files.dir().join("config.json");
    hasher.update(&std::fs::read(&config).map_err(|e| Error::io(&config, e))?);
    for file in files.files() {
        let path = file.path();
        let size = file.file_bytes();
        let name = path
            .file_name()
            .map_or(Vec::new(), |n| n.to_string_lossy().into_owned().into());
        hasher.update(&name);
        hasher.update(&size.to_le_bytes());
        let mut handle = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        for start in [0, size / 2, size.saturating_sub(SAMPLE)] {
            let mut sample = Vec::new();
            handle
                .seek(SeekFrom::Start(start))
                .and_then(|_| (&mut handle).take(SAMPLE).read_to_end(&mut sample))
                .map_err(|e| Error::io(path, e))?;
            hasher.update(&sample);
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}
