//! What tells one model from another.

use super::ModelSource;
use crate::Result;

/// Pieces of a large tensor that are looked at.
const PIECES: usize = 16;
/// Bytes of such a piece; tensors of up to [`PIECES`] of them are looked at as a whole.
const PIECE_BYTES: usize = 4096;

impl ModelSource {
    /// A name for what the model computes, 64 hexadecimal digits: of its specification, and of every
    /// tensor's name, type, shape and content. Of large tensors 16 pieces of 4 KiB count, evenly spread,
    /// so that naming a model does not read all of it; training or quantizing it again changes them.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let files = self.files();
        let mut names: Vec<&str> = files.names().collect();
        names.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        let mut text = |part: &str| {
            // With its length, so that no two lists of parts read the same.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        };
        text(&format!("{:?}", self.spec()));
        for name in &names {
            let tensor = files.tensor(name)?;
            text(name);
            text(&format!("{:?} {:?}", tensor.dtype, tensor.shape));
        }
        for name in names {
            let tensor = files.tensor(name)?;
            let bytes: &[u8] = &tensor.data;
            if bytes.len() <= PIECES * PIECE_BYTES {
                hasher.update(bytes);
                continue;
            }
            for piece in 0..PIECES {
                let start = (bytes.len() - PIECE_BYTES) / (PIECES - 1) * piece;
                hasher.update(&bytes[start..start + PIECE_BYTES]);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}
