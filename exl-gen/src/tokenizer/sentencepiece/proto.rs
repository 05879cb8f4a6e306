//! What a SentencePiece model file says: its pieces, how it was trained, how it treats text.

use super::wire::{Fields, Value};
use crate::tokenizer::names::MAX_IDS;

/// A model file, as far as encoding and decoding need it.
#[derive(Clone, Debug)]
pub(super) struct Proto {
    /// By id.
    pub(super) pieces: Vec<Piece>,
    pub(super) trainer: Trainer,
    pub(super) normalizer: NormalizerSpec,
}

/// A token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Higher ones are preferred.
    pub(super) score: f32,
    pub(super) kind: Kind,
}

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// Stands for text that no piece covers; there is one.
    Unknown,
    /// Never comes from text.
    Control,
    /// Always taken where it occurs.
    UserDefined,
    /// Never comes out of encoding.
    Unused,
    /// One byte of a character that no piece covers.
    Byte,
}

/// The entries of the training settings that matter later, and their defaults.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Trainer {
    pub(super) algorithm: Algorithm,
    pub(super) byte_fallback: bool,
    /// The mark of a blank comes behind a word, not in front.
    pub(super) whitespace_as_suffix: bool,
    /// Ids of special pieces; -1 for none.
    pub(super) bos: i32,
    pub(super) eos: i32,
    pub(super) pad: i32,
}

/// How pieces are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// The most probable sequence of pieces.
    Unigram,
    /// Byte pair encoding, by score.
    Bpe,
}

/// What happens to a text first.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NormalizerSpec {
    /// Replacements of characters; empty for none.
    pub(super) charsmap: Vec<u8>,
    /// A blank is put in front.
    pub(super) add_dummy_prefix: bool,
    /// Blanks at both ends go, several become one.
    pub(super) remove_extra_whitespaces: bool,
    /// Blanks become marks.
    pub(super) escape_whitespaces: bool,
}

impl Default for Trainer {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            whitespace_as_suffix: false,
            bos: 1,
            eos: 2,
            pad: -1,
        }
    }
}

impl Default for NormalizerSpec {
    fn default() -> Self {
        Self {
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl Proto {
    /// Reads a model file.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut proto = Self {
            pieces: Vec::new(),
            trainer: Trainer::default(),
            normalizer: NormalizerSpec::default(),
        };
        for field in Fields::new(bytes) {
            match field? {
                (1, Value::Bytes(message)) => {
                    let id = proto.pieces.len();
                    if id >= MAX_IDS as usize {
                        return Err(format!("it has more than {MAX_IDS} pieces"));
                    }
                    let piece = Piece::read(message);
                    proto
                        .pieces
                        .push(piece.map_err(|e| format!("piece {id}: {e}"))?);
                }
                (2, Value::Bytes(message)) => proto.trainer.read(message)?,
                (3, Value::Bytes(message)) => proto.normalizer.read(message)?,
                (5, Value::Bytes(message)) => {
                    let mut spec = NormalizerSpec::default();
                    spec.read(message)?;
                    if !spec.charsmap.is_empty() {
                        return Err("it replaces characters when decoding".to_owned());
                    }
                }
                _ => {}
            }
        }
        match proto.pieces.is_empty() {
            true => Err("it holds no pieces: is it a SentencePiece model?".to_owned()),
            false => Ok(proto),
        }
    }

    /// The piece of an id out of the training settings, if there is one.
    pub(super) fn named(&self, id: i32) -> Option<&str> {
        let piece = self.pieces.get(usize::try_from(id).ok()?)?;
        Some(&piece.text)
    }
}

impl Piece {
    fn read(message: &[u8]) -> Result<Self, String> {
        let mut piece = Self {
            text: String::new(),
            score: 0.0,
            kind: Kind::Normal,
        };
        for field in Fields::new(message) {
            match field? {
                (1, Value::Bytes(text)) => {
                    let text = std::str::from_utf8(text);
                    piece.text = text.map_err(|_| "its text is not UTF-8")?.to_owned();
                }
                (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Varint(kind)) => piece.kind = Kind::from_number(kind)?,
                _ => {}
            }
        }
        if piece.text.is_empty() {
            return Err("it has no text".to_owned());
        }
        if !piece.score.is_finite() {
            return Err(format!("its score is {}", piece.score));
        }
        Ok(piece)
    }
}

impl Kind {
    fn from_number(number: u64) -> Result<Self, String> {
        Ok(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return Err(format!("it is of the unknown type {number}")),
        })
    }
}

impl Trainer {
    fn read(&mut self, message: &[u8]) -> Result<(), String> {
        for field in Fields::new(message) {
            match field? {
                (3, Value::Varint(kind)) => {
                    self.algorithm = match kind {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        3 => return Err("it cuts texts into words (model type 3)".to_owned()),
                        4 => return Err("it cuts texts into characters (model type 4)".to_owned()),
                        _ => return Err(format!("its model type {kind} is unknown")),
                    };
                }
                (24, Value::Varint(n)) => self.whitespace_as_suffix = n != 0,
                (35, Value::Varint(n)) => self.byte_fallback = n != 0,
                // Negative numbers are stored with 64 bits.
                (41, Value::Varint(n)) => self.bos = n as i32,
                (42, Value::Varint(n)) => self.eos = n as i32,
                (43, Value::Varint(n)) => self.pad = n as i32,
                _ => {}
            }
        }
        Ok(())
    }
}

impl NormalizerSpec {
    fn read(&mut self, message: &[u8]) -> Result<(), String> {
        for field in Fields::new(message) {
            match field? {
                (2, Value::Bytes(blob)) => self.charsmap = blob.to_vec(),
                (3, Value::Varint(n)) => self.add_dummy_prefix = n != 0,
                (4, Value::Varint(n)) => self.remove_extra_whitespaces = n != 0,
                (5, Value::Varint(n)) => self.escape_whitespaces = n != 0,
                _ => {}
            }
        }
        Ok(())
    }
}
