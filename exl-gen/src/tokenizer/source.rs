//! Which files a model directory keeps its tokenizer in.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::tokenizer::ranks;
use crate::{Error, Result};

/// Larger files are no tokenizers.
const MAX_BYTES: u64 = 1 << 28;
/// What a file begins with that only points to the real one.
const POINTER: &[u8] = b"version https://git-lfs";
/// Enough of a file to tell what it is.
const START: u64 = 4096;

/// How a tokenizer is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenizerFormat {
    /// tokenizer.json of Hugging Face tokenizers.
    Json,
    /// A SentencePiece model that pairs neighbours by score.
    SentencePieceBpe,
    /// A SentencePiece model of piece probabilities.
    SentencePieceUnigram,
    /// Ranks of tiktoken; they hold no rule that cuts a text into words, so here is whose is used.
    Ranks(&'static str),
    /// vocab.json and merges.txt; here is whose rule cuts a text into words.
    Merges(&'static str),
}

impl fmt::Display for TokenizerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json => f.write_str("Hugging Face tokenizers"),
            Self::SentencePieceBpe => f.write_str("SentencePiece, BPE"),
            Self::SentencePieceUnigram => f.write_str("SentencePiece, unigram"),
            Self::Ranks(whose) => write!(f, "tiktoken, words as in {whose}"),
            Self::Merges(whose) => write!(f, "byte-level BPE, words as in {whose}"),
        }
    }
}

/// The files of a tokenizer, by what has to be done with them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    Json(PathBuf),
    SentencePiece(PathBuf),
    Ranks(PathBuf),
    Merges { vocab: PathBuf, merges: PathBuf },
}

impl Source {
    /// Looks into a directory. What says most goes first: tokenizer.json, tokenizer.model (of
    /// SentencePiece or of tiktoken, as its content shows), a .tiktoken file, vocab.json with
    /// merges.txt.
    ///
    /// # Errors
    /// [`Error::TokenizerMissing`], [`Error::TokenizerInvalid`] for several .tiktoken files,
    /// [`Error::Io`].
    pub(super) fn find(dir: &Path) -> Result<Self> {
        let json = dir.join("tokenizer.json");
        if exists(&json)? {
            return Ok(Self::Json(json));
        }
        let model = dir.join("tokenizer.model");
        if exists(&model)? {
            return Ok(match ranks::is_ranks(&start(&model)?) {
                true => Self::Ranks(model),
                false => Self::SentencePiece(model),
            });
        }
        if let Some(path) = rank_file(dir)? {
            return Ok(Self::Ranks(path));
        }
        let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        match (exists(&vocab)?, exists(&merges)?) {
            (true, true) => Ok(Self::Merges { vocab, merges }),
            (true, false) => Err(missing(dir, "; vocab.json is there, merges.txt is not")),
            (false, true) => Err(missing(dir, "; merges.txt is there, vocab.json is not")),
            (false, false) => Err(missing(dir, "")),
        }
    }

    /// All files, the one that errors name first.
    pub(super) fn files(&self) -> Vec<&Path> {
        match self {
            Self::Json(path) | Self::SentencePiece(path) | Self::Ranks(path) => vec![path],
            Self::Merges { vocab, merges } => vec![vocab, merges],
        }
    }
}

fn missing(dir: &Path, more: &'static str) -> Error {
    Error::TokenizerMissing {
        dir: dir.to_owned(),
        more,
    }
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|source| io(path, source))
}

fn start(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|source| io(path, source))?;
    let read = file.take(START).read_to_end(&mut bytes);
    read.map_err(|source| io(path, source))?;
    Ok(bytes)
}

/// The file of ranks in a directory.
fn rank_file(dir: &Path) -> Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io(dir, source)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|source| io(dir, source))?.path();
        if path.extension().is_some_and(|e| e == "tiktoken") && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    match &found[..] {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [one, two, ..] => Err(Error::TokenizerInvalid {
            path: one.clone(),
            reason: format!("{} lies beside it: which one is it?", two.display()),
        }),
    }
}

/// The whole of a tokenizer's file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).map_err(|source| io(path, source))?;
    let refuse = |reason: String| Error::TokenizerInvalid {
        path: path.to_owned(),
        reason,
    };
    if size.len() > MAX_BYTES {
        return Err(refuse(format!("it has {} bytes", size.len())));
    }
    let bytes = std::fs::read(path).map_err(|source| io(path, source))?;
    match bytes.starts_with(POINTER) {
        true => Err(refuse(
            "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`".to_owned(),
        )),
        false => Ok(bytes),
    }
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        source,
    }
}
