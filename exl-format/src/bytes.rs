//! Ranges of mapped files that keep the map alive.

use std::fmt;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use crate::Result;

/// A read-only range of bytes that owns a share of what it lies in: a mapped file, a vector, or a
/// computation that is done when the bytes are first looked at.
///
/// Clones are cheap and refer to the same memory. Mapped pages are read from disk on first touch
/// and may be dropped by the system at any time, so that opening a checkpoint costs no memory.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    range: Range<usize>,
}

enum Owner {
    Mapped(Mmap),
    Memory(Vec<u8>),
    Lazy(Lazy),
}

/// Bytes that are computed on first use.
struct Lazy {
    bytes: OnceLock<Vec<u8>>,
    make: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    len: usize,
}

impl Owner {
    fn all(&self) -> &[u8] {
        match self {
            Owner::Mapped(map) => map,
            Owner::Memory(bytes) => bytes,
            Owner::Lazy(lazy) => lazy.bytes.get_or_init(|| {
                let mut bytes = (lazy.make)();
                bytes.resize(lazy.len, 0);
                bytes
            }),
        }
    }

    /// Length of [`Owner::all`], without computing it.
    fn len(&self) -> usize {
        match self {
            Owner::Lazy(lazy) => lazy.len,
            other => other.all().len(),
        }
    }
}

impl Bytes {
    /// Maps a file.
    ///
    /// # Errors
    /// [`crate::Error::Io`] with the reason of the system.
    pub fn map(path: &Path) -> Result<Self> {
        Ok(Self::new(Owner::Mapped(crate::mmap::map_file(path)?)))
    }

    /// Tells the system that these bytes are not needed for now: pages of a mapped file leave
    /// this process' memory and come back from the file when they are read again. A hint without
    /// effect on bytes in memory.
    pub fn release(&self) {
        if let Owner::Mapped(map) = &*self.owner {
            crate::mmap::release(map, self.range.clone());
        }
    }

    /// `len` bytes that `make` computes when they are first looked at, once for all clones. What it
    /// gives beyond `len` is cut off, what is missing is zero.
    pub(crate) fn lazy(len: usize, make: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::new(Owner::Lazy(Lazy {
            bytes: OnceLock::new(),
            make: Box::new(make),
            len,
        }))
    }

    /// Their number, without computing them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    fn new(owner: Owner) -> Self {
        let range = 0..owner.len();
        Self {
            owner: Arc::new(owner),
            range,
        }
    }

    /// A part of these bytes, or `None` when `range` reaches beyond them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start;
        Some(Self {
            owner: self.owner.clone(),
            range: start + range.start..start + range.end,
        })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(Owner::Memory(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.all()[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_inside() {
        let all = Bytes::from((0..10).collect::<Vec<u8>>());
        let part = all.slice(2..6).unwrap();
        drop(all);
        assert_eq!(&*part, [2, 3, 4, 5]);
        assert_eq!(&*part.slice(1..3).unwrap(), [3, 4]);
        assert!(part.slice(4..4).unwrap().is_empty());
        assert!(part.slice(3..5).is_none());
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = part.slice(2..1);
        assert!(backwards.is_none());
        assert!(part.slice(usize::MAX..usize::MAX).is_none());
    }

    #[test]
    fn lazy_bytes_are_computed_once_and_only_when_looked_at() {
        let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = calls.clone();
        let all = Bytes::lazy(4, move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            vec![1, 2, 3]
        });
        let part = all.slice(1..4).unwrap();
        assert_eq!((all.len(), part.len()), (4, 3));
        assert_eq!(format!("{part:?}"), "Bytes(3)");
        assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 0);
        assert_eq!(&*part, [2, 3, 0]);
        assert_eq!(&*all, [1, 2, 3, 0]);
        assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 1);
    }

    #[test]
    fn maps_are_shared_between_threads() {
        fn shared<T: Send + Sync + 'static>(_: &T) {}
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let bytes = Bytes::map(&path).unwrap();
        shared(&bytes);
        assert_eq!(&*bytes, std::fs::read(&path).unwrap());
        bytes.release();
        assert_eq!(&*bytes, std::fs::read(&path).unwrap());
        let error = Bytes::map(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
}
