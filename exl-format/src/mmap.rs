//! The one place that maps files: all unsafe code of this crate.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::{Error, Result};

/// Maps a whole file for reading.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened, is no regular file, or cannot be mapped.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let kind = file.metadata().map_err(Error::io("open", path))?;
    if !kind.is_file() {
        let reason = std::io::Error::other("not a regular file");
        return Err(Error::io("map", path)(reason));
    }
    // SAFETY: the map is read-only and never handed out but as `&[u8]` of plain bytes, for which
    // every bit pattern is valid. What remains is the rule that nobody else truncates or rewrites
    // a checkpoint in place while it is open; this crate itself only ever replaces files by
    // renaming, which leaves existing maps untouched. The README says so.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// Drops the pages of a range from this process' memory, where the system can.
pub(crate) fn release(map: &Mmap, range: std::ops::Range<usize>) {
    #[cfg(unix)]
    // SAFETY: the map is read-only and backed by its file: dropped pages, also those of neighbours
    // that share one, come back with the same bytes.
    let _ = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
    };
    #[cfg(not(unix))]
    let _ = (map, range);
}
