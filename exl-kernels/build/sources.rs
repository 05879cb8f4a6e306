// Shared by build.rs and `cargo xtask kernels`: which sources a kernel pack was made from.

use std::io::Result;
use std::path::{Path, PathBuf};

/// FNV-1a, which no release of Rust changes.
pub(crate) struct Fnv(u64);

impl Fnv {
    pub(crate) const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds a piece. Its length too, so that where one ends and the next begins matters.
    pub(crate) fn add(&mut self, piece: &[u8]) {
        for byte in (piece.len() as u64).to_le_bytes().iter().chain(piece) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(crate) fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// Every `.cu` and `.cuh` file below a folder, in an order that does not depend on the machine.
pub(crate) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Hash of the names and the contents of all sources below a folder.
pub(crate) fn hash(dir: &Path) -> Result<String> {
    let mut hash = Fnv::new();
    for path in files(dir)? {
        let name = path.strip_prefix(dir).unwrap_or(&path);
        for part in name {
            hash.add(part.as_encoded_bytes());
        }
        hash.add(&std::fs::read(&path)?);
    }
    Ok(hash.hex())
}
