//! Pages on disk: prefixes that survive a restart.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::{PAGE_TOKENS, PageHash};

#[cfg(test)]
mod tests;

/// First bytes of every file; another layout has another number.
const MAGIC: &[u8; 8] = b"exlpage1";
/// Magic, name, whether there is a parent, its name, tokens, length of the content.
const HEADER: usize = 8 + 16 + 1 + 16 + 4 * PAGE_TOKENS + 8;
/// BLAKE3 of all before it.
const CHECKSUM: usize = 32;
/// Unfinished files older than this belong to nobody any more.
const STALE: Duration = Duration::from_secs(3600);

/// A full page with its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPage {
    /// Name of the page before it.
    pub parent: Option<PageHash>,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Keys and values, as the cache stores them.
    pub content: Vec<u8>,
}

/// Full pages in a folder, by name. Folders of several models may lie in one place; each holds what
/// one model computes with one kind of cache.
///
/// Files are written aside and renamed, and checked when they are read: a damaged one is removed and
/// counts as missing.
#[derive(Debug)]
pub struct DiskTier {
    folder: PathBuf,
    limit: u64,
    /// Not held while files are read or written.
    index: Mutex<Index>,
}

/// What lies in the folder.
#[derive(Debug, Default)]
struct Index {
    bytes: u64,
    /// Size and time of last use, a count.
    files: HashMap<PageHash, (u64, u64)>,
    clock: u64,
}

impl Index {
    fn forget(&mut self, hash: &PageHash) {
        if let Some((size, _)) = self.files.remove(hash) {
            self.bytes -= size;
        }
    }

    fn insert(&mut self, hash: PageHash, size: u64) {
        self.forget(&hash);
        self.clock += 1;
        self.bytes += size;
        self.files.insert(hash, (size, self.clock));
    }

    fn oldest(&self) -> Option<PageHash> {
        let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used);
        oldest.map(|(hash, _)| *hash)
    }
}

impl DiskTier {
    /// Opens the folder for `model` within `place`, made if need be. `model` says all that the
    /// content of pages depends on: weights, kind of cache, number of bytes. The files there are
    /// kept within `limit` bytes; those used least recently go.
    ///
    /// # Errors
    /// What the system says about the folder.
    pub fn open(place: &Path, model: &str, limit: u64) -> io::Result<Self> {
        let name = blake3::hash(model.as_bytes()).to_hex();
        let folder = place.join(&name.as_str()[..32]);
        fs::create_dir_all(&folder)?;
        let mut found: Vec<(SystemTime, PageHash, u64)> = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let about = entry.metadata()?;
            let changed = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            match name_of(&entry.file_name().to_string_lossy()) {
                Some(hash) => found.push((changed, hash, about.len())),
                None if changed.elapsed().is_ok_and(|age| age > STALE) => {
                    // Somebody else may have removed it just now.
                    let _ = fs::remove_file(entry.path());
                }
                None => {}
            }
        }
        found.sort_unstable_by_key(|(changed, hash, _)| (*changed, *hash));
        let mut index = Index::default();
        for (_, hash, size) in found {
            index.insert(hash, size);
        }
        let tier = Self {
            folder,
            limit,
            index: Mutex::new(index),
        };
        tier.make_room(0)?;
        Ok(tier)
    }

    /// Numbers stay usable even if a thread died while it held them.
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.index().bytes
    }

    /// Pages there are.
    pub fn pages(&self) -> usize {
        self.index().files.len()
    }

    /// Whether a page is there, as far as can be told without reading it.
    pub fn contains(&self, hash: &PageHash) -> bool {
        self.index().files.contains_key(hash)
    }

    /// Stores a page under its name, which is given back; what is there already stays. A page larger
    /// than the whole limit is not stored.
    ///
    /// # Errors
    /// What the system says; nothing is left then under the page's name.
    ///
    /// # Panics
    /// When the page is not full.
    pub fn store(&self, page: &DiskPage) -> io::Result<PageHash> {
        assert_eq!(
            page.tokens.len(),
            PAGE_TOKENS,
            "only full pages have a name"
        );
        let hash = PageHash::of(page.parent, &page.tokens);
        let size = (HEADER + page.content.len() + CHECKSUM) as u64;
        if self.contains(&hash) || size > self.limit {
            return Ok(hash);
        }
        self.make_room(size)?;
        let aside = self
            .folder
            .join(format!("{hash}.{}.part", std::process::id()));
        let written = write(&aside, &header(hash, page), &page.content)
            .and_then(|()| fs::rename(&aside, self.path(&hash)));
        if let Err(error) = written {
            // The first error is the one to tell.
            let _ = fs::remove_file(&aside);
            return Err(error);
        }
        self.index().insert(hash, size);
        Ok(hash)
    }

    /// Reads a page of `bytes` bytes of content. None when it is not there; a file that is damaged or
    /// holds something else is removed and is not there either.
    ///
    /// # Errors
    /// What the system says of a file that is there.
    pub fn load(&self, hash: &PageHash, bytes: usize) -> io::Result<Option<DiskPage>> {
        if !self.contains(hash) {
            return Ok(None);
        }
        let file = match File::open(self.path(hash)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.index().forget(hash);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let expected = HEADER + bytes + CHECKSUM;
        let mut whole = Vec::with_capacity(expected + 1);
        // One byte more than expected shows that a file is too long.
        (&file).take(expected as u64 + 1).read_to_end(&mut whole)?;
        let Some(page) = read(&whole, hash, expected) else {
            drop(file);
            self.remove(hash)?;
            return Ok(None);
        };
        // The order of use is kept for the next start; without it only the order is lost.
        let _ = file.set_modified(SystemTime::now());
        self.index().insert(*hash, expected as u64);
        Ok(Some(page))
    }

    /// Removes what was used least recently until `size` more bytes fit.
    fn make_room(&self, size: u64) -> io::Result<()> {
        loop {
            let index = self.index();
            let full = index.bytes + size > self.limit;
            let Some(hash) = index.oldest().filter(|_| full) else {
                return Ok(());
            };
            drop(index);
            self.remove(&hash)?;
        }
    }

    fn remove(&self, hash: &PageHash) -> io::Result<()> {
        self.index().forget(hash);
        match fs::remove_file(self.path(hash)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, hash: &PageHash) -> PathBuf {
        self.folder.join(format!("{hash}.page"))
    }
}

fn name_of(file: &str) -> Option<PageHash> {
    let digits = file
        .strip_suffix(".page")
        .filter(|d| d.len() == 32 && d.is_ascii())?;
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes.into())
}

fn header(hash: PageHash, page: &DiskPage) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER);
    bytes.extend(MAGIC);
    bytes.extend(hash.bytes());
    bytes.push(u8::from(page.parent.is_some()));
    bytes.extend(page.parent.map_or([0; 16], |parent| parent.bytes()));
    bytes.extend(page.tokens.iter().flat_map(|token| token.to_le_bytes()));
    bytes.extend((page.content.len() as u64).to_le_bytes());
    bytes
}

fn write(path: &Path, header: &[u8], content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut hasher = blake3::Hasher::new();
    for part in [header, content] {
        hasher.update(part);
        file.write_all(part)?;
    }
    file.write_all(hasher.finalize().as_bytes())
}

/// The page in a file, if it is the one it should be.
fn read(whole: &[u8], hash: &PageHash, expected: usize) -> Option<DiskPage> {
    if whole.len() != expected {
        return None;
    }
    let (body, checksum) = whole.split_at(whole.len() - CHECKSUM);
    if blake3::hash(body).as_bytes() != checksum {
        return None;
    }
    let (header_bytes, content) = body.split_at(HEADER);
    let (start, rest) = header_bytes.split_at(8 + 16);
    let (parent, rest) = rest.split_at(1 + 16);
    let name: [u8; 16] = parent[1..].try_into().ok()?;
    let words = rest[..4 * PAGE_TOKENS].chunks_exact(4);
    let page = DiskPage {
        parent: (parent[0] == 1).then(|| name.into()),
        tokens: words
            .map(|word| word.try_into().map(u32::from_le_bytes))
            .collect::<Result<_, _>>()
            .ok()?,
        content: content.to_vec(),
    };
    let named = start == [&MAGIC[..], &hash.bytes()].concat();
    let right = named && PageHash::of(page.parent, &page.tokens) == *hash;
    (right && header(*hash, &page) == header_bytes).then_some(page)
}
