//! Calibration tokens: rows of equal length from a file or from the built-in text.

mod builtin;
mod read;

pub use builtin::{Chat, ChatTurn, builtin};
pub use read::token_ids;

use std::path::Path;

use crate::{Error, Result};

/// Turns text into token ids, without special tokens added.
pub type Encode<'a> = dyn Fn(&str) -> std::result::Result<Vec<u32>, String> + 'a;

/// Tokens to calibrate with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// File name, or `(default)` for the built-in text.
    pub dataset: String,
    /// Rows of equal length.
    pub rows: Vec<Vec<u32>>,
}

impl Calibration {
    /// Reads `rows` rows of `length` tokens from a file.
    ///
    /// - `.parquet`: the column `text`, else all string columns joined by a space;
    /// - `.jsonl`: the field `text` of every line, else all its string fields joined by a space;
    /// - `.txt`: the text as it is;
    /// - `.safetensors`: the tensor `input_ids` `[rows, length]`, at least as large as asked for.
    ///
    /// Texts are encoded one by one and concatenated; reading stops when there is enough.
    ///
    /// # Errors
    /// [`Error::Calibration`] with what was found and needed, [`Error::Io`].
    pub fn from_file(path: &Path, encode: &Encode<'_>, rows: usize, length: usize) -> Result<Self> {
        let name = path
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let suffix = path.extension().map_or_else(String::new, |e| {
            e.to_ascii_lowercase().to_string_lossy().into_owned()
        });
        let total = rows.checked_mul(length).filter(|&n| n > 0);
        let total = total.ok_or_else(|| Error::Calibration {
            file: path.display().to_string(),
            what: format!("cannot give {rows} rows of {length} tokens; change --rows or --length"),
        })?;
        let rows = match suffix.as_str() {
            "safetensors" => read::token_rows(path, rows, length)?,
            _ => {
                let mut stream = Stream::new(path, encode, total);
                match suffix.as_str() {
                    "txt" => read::text(path, &mut stream)?,
                    "jsonl" | "json" => read::json_lines(path, &mut stream)?,
                    "parquet" => read::parquet(path, &mut stream)?,
                    _ => {
                        return Err(stream.refuse(
                            "its name must end in .parquet, .jsonl, .txt or .safetensors".into(),
                        ));
                    }
                }
                stream.rows(rows, length)?
            }
        };
        Ok(Self {
            dataset: name,
            rows,
        })
    }

    /// Tokens per row.
    pub fn length(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// Hash of the tokens and their shape, in hexadecimal.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for row in &self.rows {
            hasher.update(&(row.len() as u64).to_le_bytes());
            hasher.update(bytemuck::cast_slice(row));
        }
        hasher.finalize().to_hex()[..32].to_owned()
    }

    /// Checks every token against the vocabulary.
    ///
    /// # Errors
    /// [`Error::Calibration`] naming the first one outside.
    pub fn check_vocabulary(&self, vocab: usize) -> Result<()> {
        match self.rows.iter().flatten().find(|&&t| t as usize >= vocab) {
            None => Ok(()),
            Some(t) => Err(Error::Calibration {
                file: self.dataset.clone(),
                what: format!(
                    "token {t} is outside the model's vocabulary of {vocab}; \
                     was it made with another tokenizer?"
                ),
            }),
        }
    }
}

/// Tokens collected from texts until there are enough.
struct Stream<'a> {
    file: String,
    encode: &'a Encode<'a>,
    tokens: Vec<u32>,
    needed: usize,
}

impl<'a> Stream<'a> {
    fn new(path: &Path, encode: &'a Encode<'a>, needed: usize) -> Self {
        Self {
            file: path.display().to_string(),
            encode,
            tokens: Vec::new(),
            needed,
        }
    }

    fn refuse(&self, what: String) -> Error {
        Error::Calibration {
            file: self.file.clone(),
            what,
        }
    }

    /// Adds a text; true when there is enough.
    fn add(&mut self, text: &str) -> Result<bool> {
        if self.tokens.len() < self.needed {
            let tokens = (self.encode)(text).map_err(|e| self.refuse(e))?;
            self.tokens.extend(tokens);
        }
        Ok(self.tokens.len() >= self.needed)
    }

    fn rows(self, rows: usize, length: usize) -> Result<Vec<Vec<u32>>> {
        if self.tokens.len() < rows * length {
            return Err(self.refuse(format!(
                "holds {} tokens, {rows} rows of {length} need {}; \
                 give more text, or lower --rows or --length",
                self.tokens.len(),
                rows * length
            )));
        }
        Ok(self
            .tokens
            .chunks_exact(length)
            .take(rows)
            .map(<[u32]>::to_vec)
            .collect())
    }
}

#[cfg(test)]
mod tests;
