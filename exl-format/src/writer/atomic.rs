//! Files that appear whole or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// A file under a temporary name of its own beside its final one; removed unless published.
///
/// It is locked while it is open, so that [`remove_leftovers`] spares it.
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
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let mut path = last.as_os_str().to_owned();
            path.push(format!(".{}-{number}{PARTIAL}", std::process::id()));
            let path = PathBuf::from(path);
            let mut options = File::options();
            let file = match options.read(true).write(true).create_new(true).open(&path) {
                // Left by a killed process that had our number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                opened => opened.map_err(Error::io("create", &path))?,
            };
            // Held by someone who is just removing it as a leftover. Where the system has no
            // locks, leftovers stay.
            if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
                continue;
            }
            return Ok(Self {
                file,
                path,
                last: last.to_owned(),
                published: false,
            });
        }
    }

    /// Where it is for now.
    pub(super) fn path(&self) -> &Path {
        &self.path
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

/// Removes temporary files that killed processes left in a directory; returns the final names of
/// those that a running one is writing.
///
/// # Errors
/// [`Error::Io`] when the system refuses.
pub fn remove_leftovers(dir: &Path) -> Result<Vec<String>> {
    let mut busy = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str());
        let Some(last) = name.and_then(final_name) else {
            continue;
        };
        match File::open(&path).map(|file| (file.try_lock(), file)) {
            Ok((Ok(()), _locked)) => {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
            Ok((Err(TryLockError::WouldBlock), _)) => busy.push(last.to_owned()),
            // It got its name meanwhile, or is not ours to remove.
            Ok((Err(TryLockError::Error(_)), _)) | Err(_) => {}
        }
    }
    Ok(busy)
}

/// The final name of a temporary one, `NAME.PROCESS-NUMBER.partial`.
fn final_name(name: &str) -> Option<&str> {
    let (last, number) = name.strip_suffix(PARTIAL)?.rsplit_once('.')?;
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let (process, number) = number.split_once('-')?;
    (digits(process) && digits(number)).then_some(last)
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
