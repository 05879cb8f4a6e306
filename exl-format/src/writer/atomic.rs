//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A file under a temporary name beside its final one; removed unless published.
#[derive(Debug)]
pub(super) struct Partial {
    file: File,
    path: PathBuf,
    last: PathBuf,
    published: bool,
}

/// The ending of temporary names.
pub(super) const PARTIAL: &str = ".partial";

impl Partial {
    pub(super) fn create(last: &Path) -> Result<Self> {
        let mut path = last.as_os_str().to_owned();
        path.push(PARTIAL);
        let path = PathBuf::from(path);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self {
            file,
            path,
            last: last.to_owned(),
            published: false,
        })
    }

    /// Does something to the file; errors name the file it will become.
    pub(super) fn act<T>(
        &mut self,
        action: &'static str,
        act: impl FnOnce(&mut File) -> io::Result<T>,
    ) -> Result<T> {
        act(&mut self.file).map_err(Error::io(action, &self.last))
    }

    /// Gives the file its final name. Its data must be on disk already.
    pub(super) fn publish(mut self) -> Result<()> {
        fs::rename(&self.path, &self.last).map_err(Error::io("rename to", &self.last))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Already failing: a leftover with a temporary name is harmless.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a file so that it is either there with all of `bytes` or not at all; an older one stays
/// until then.
///
/// # Errors
/// [`Error::Io`] when the system refuses.
pub fn write_file_atomic(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut partial = Partial::create(path)?;
    partial.act("write", |file| {
        file.write_all(bytes.as_ref())?;
        file.sync_all()
    })?;
    partial.publish()?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes names given to files in a directory survive a power failure.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    // A bare file name has the empty path as its parent.
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    if cfg!(unix) {
        let opened = File::open(dir).and_then(|d| d.sync_all());
        opened.map_err(Error::io("sync", dir))?;
    }
    Ok(())
}
