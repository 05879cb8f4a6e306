//! The bytes behind every token id.

use serde_json::Value as Json;

use super::inner::Inner;
use super::invalid;
use super::names::MAX_IDS;
use crate::Result;

/// How a decoder turns the spelling of tokens into bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scheme {
    /// Letters stand for bytes (GPT-2's table).
    pub(super) byte_level: bool,
    /// `<0xNN>` stands for a byte.
    pub(super) byte_fallback: bool,
    /// Texts replaced inside each token, in order.
    pub(super) replace: Vec<(String, String)>,
    /// Put between tokens: only where there is no decoder at all.
    pub(super) separator: &'static str,
    /// Blanks taken off the front of a text, at most.
    pub(super) strip_start: usize,
    /// The first token of a text loses its word marks.
    pub(super) strip_marks: Option<char>,
}

/// Bytes of all tokens of a vocabulary, end to end.
#[derive(Debug)]
pub(super) struct Pieces {
    pub(super) scheme: Scheme,
    bytes: Vec<u8>,
    /// Where each token starts; one more than there are ids.
    starts: Vec<u32>,
    known: Vec<bool>,
    special: Vec<bool>,
}

impl Pieces {
    pub(super) fn new(inner: &Inner, scheme: Scheme) -> Result<Self> {
        let vocab = inner.get_vocab(true);
        let len = vocab.values().max().map_or(0, |&id| id as usize + 1);
        // Ids come from a file; a huge one would otherwise take much memory for few tokens.
        if len > (4 * vocab.len() + (1 << 20)).min(MAX_IDS as usize) {
            return Err(invalid(format!("the largest token id is {}", len - 1)));
        }
        let mut pieces = Self {
            scheme,
            bytes: Vec::new(),
            starts: Vec::with_capacity(len + 1),
            known: vec![false; len],
            special: vec![false; len],
        };
        let table = byte_table();
        for id in 0..len as u32 {
            pieces.starts.push(pieces.bytes.len() as u32);
            if let Some(token) = inner.id_to_token(id) {
                pieces.known[id as usize] = true;
                pieces.scheme.append(&token, &table, &mut pieces.bytes);
            }
        }
        pieces.starts.push(pieces.bytes.len() as u32);
        for (id, token) in inner.get_added_tokens_decoder() {
            pieces.special[id as usize] = token.special;
        }
        Ok(pieces)
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let range = *self.starts.get(id)? as usize..*self.starts.get(id + 1)? as usize;
        self.known[id].then(|| &self.bytes[range])
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

impl Scheme {
    /// That of a decoder of tokenizer.json, null for none.
    pub(super) fn read(decoder: &Json) -> Result<Self> {
        let mut scheme = Self::default();
        if decoder.is_null() {
            scheme.separator = " ";
        } else {
            scheme.add(decoder)?;
        }
        Ok(scheme)
    }

    fn add(&mut self, decoder: &Json) -> Result<()> {
        match decoder["type"].as_str().unwrap_or_default() {
            "Sequence" => {
                for part in decoder["decoders"].as_array().into_iter().flatten() {
                    self.add(part)?;
                }
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let from = decoder["pattern"]["String"]
                    .as_str()
                    .filter(|s| !s.is_empty());
                let to = decoder["content"].as_str();
                let pair = from.zip(to).ok_or_else(|| {
                    invalid("its decoder replaces a regular expression".to_owned())
                })?;
                self.replace.push((pair.0.to_owned(), pair.1.to_owned()));
            }
            "Strip" => {
                let stop = decoder["stop"].as_u64().unwrap_or(0);
                if decoder["content"].as_str() != Some(" ") || stop != 0 {
                    return Err(invalid(format!("its decoder strips {decoder}")));
                }
                self.strip_start += decoder["start"].as_u64().unwrap_or(0) as usize;
            }
            "Metaspace" => {
                let mark = decoder["replacement"]
                    .as_str()
                    .and_then(|s| s.chars().next());
                let mark = mark.unwrap_or('\u{2581}');
                let prepends = match decoder["prepend_scheme"].as_str() {
                    Some(scheme) => scheme != "never",
                    None => decoder["add_prefix_space"].as_bool().unwrap_or(true),
                };
                self.replace.push((mark.to_string(), " ".to_owned()));
                self.strip_marks = prepends.then_some(mark);
            }
            other => {
                return Err(invalid(format!(
                    "its decoder is of type `{other}`; known are ByteLevel, ByteFallback, \
                     Metaspace, Replace, Strip, Fuse and sequences of them"
                )));
            }
        }
        Ok(())
    }

    /// Appends the bytes of a token in the middle of a text.
    fn append(&self, token: &str, table: &[Option<u8>; 512], out: &mut Vec<u8>) {
        let mut token = token.to_owned();
        for (from, to) in &self.replace {
            token = token.replace(from, to);
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&token)
        {
            out.push(byte);
            return;
        }
        let mapped: Option<Vec<u8>> = token
            .chars()
            .map(|c| table.get(c as usize).copied().flatten())
            .collect();
        match mapped {
            // A token with a letter outside the table is spelled as it is.
            Some(bytes) if self.byte_level => out.extend(bytes),
            _ => out.extend(token.as_bytes()),
        }
    }
}

/// `<0x41>` is 0x41.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// GPT-2's letters for bytes: printable bytes stand for themselves, the others for the letters from
/// U+0100 on.
pub(super) fn letters() -> [char; 256] {
    let mut next = 'Ā'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(byte),
        _ => next.next().unwrap_or_default(),
    })
}

/// The same by code point: the byte of every letter.
fn byte_table() -> [Option<u8>; 512] {
    let mut table = [None; 512];
    for (byte, letter) in (0..=255).zip(letters()) {
        table[letter as usize] = Some(byte);
    }
    table
}
