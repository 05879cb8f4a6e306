//! Text to token ids and back, around `tokenizer.json`.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer as Inner;

use crate::grammar::Vocabulary;
use crate::{Error, Result};

mod config;
mod detokenizer;
mod pieces;
#[cfg(test)]
pub(crate) mod tests;

pub use config::TokenizerConfig;
pub use detokenizer::Detokenizer;
use pieces::Pieces;

/// How a text is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encode {
    /// Text that spells a special token becomes that token. Off for text of strangers.
    pub parse_special: bool,
    /// Adds what the model expects around a text, as a rule a BOS token in front.
    pub add_special: bool,
}

impl Encode {
    /// A plain text: BOS rules apply, special tokens are not parsed.
    pub const TEXT: Self = Self {
        parse_special: false,
        add_special: true,
    };
    /// The output of a chat template, which spells its special tokens, BOS included.
    pub const PROMPT: Self = Self {
        parse_special: true,
        add_special: false,
    };
}

/// A model's tokenizer. Cheap to share behind an `Arc`; all methods take `&self`.
pub struct Tokenizer {
    inner: Inner,
    /// The same one with special tokens as plain text; made when first asked for.
    literal: OnceLock<Arc<Inner>>,
    /// Its tokens for grammars; made when first asked for.
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    pieces: Pieces,
    config: TokenizerConfig,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads tokenizer.json of a model directory, and special ids from tokenizer_config.json,
    /// config.json and generation_config.json where these are.
    ///
    /// # Errors
    /// [`Error::TokenizerMissing`], [`Error::Io`], [`Error::TokenizerInvalid`], [`Error::Config`].
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::TokenizerMissing { path });
            }
            Err(source) => return Err(Error::Io { path, source }),
        };
        let settings = config::Settings::open(dir)?;
        Self::build(&bytes, &settings).map_err(|error| match error {
            Error::TokenizerInvalid { reason, .. } => Error::TokenizerInvalid { path, reason },
            other => other,
        })
    }

    /// From the text of a tokenizer.json and, where there is one, tokenizer_config.json.
    ///
    /// # Errors
    /// [`Error::TokenizerInvalid`], [`Error::Config`].
    pub fn from_json(tokenizer: &[u8], tokenizer_config: Option<&Json>) -> Result<Self> {
        let settings = config::Settings {
            tokenizer: tokenizer_config.cloned().unwrap_or(Json::Null),
            ..config::Settings::default()
        };
        Self::build(tokenizer, &settings)
    }

    fn build(bytes: &[u8], settings: &config::Settings) -> Result<Self> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        let mut inner = Inner::from_bytes(bytes).map_err(|e| invalid(e.to_string()))?;
        inner
            .with_truncation(None)
            .map_err(|e| invalid(e.to_string()))?
            .with_padding(None);
        settings.add_tokens(&mut inner)?;
        let pieces = Pieces::new(&inner, json.get("decoder").unwrap_or(&Json::Null))?;
        let config = settings.resolve(&inner, pieces.len())?;
        let (prefix, suffix) = surroundings(&inner, &config)?;
        Ok(Self {
            inner,
            literal: OnceLock::new(),
            vocabulary: OnceLock::new(),
            pieces,
            config,
            prefix,
            suffix,
        })
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// [`Error::Encode`] when the tokenizer has no token for a part of it.
    pub fn encode(&self, text: &str, how: Encode) -> Result<Vec<u32>> {
        let inner = if how.parse_special {
            &self.inner
        } else {
            self.literal()
        };
        let encoding = inner
            .encode_fast(text, false)
            .map_err(|error| Error::Encode {
                reason: error.to_string(),
            })?;
        if !how.add_special {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.prefix, encoding.get_ids(), &self.suffix].concat())
    }

    /// The text of a whole sequence, as transformers decodes it (without tidying up blanks).
    /// Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary vanish.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut state = Detokenizer::new(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&state.push(self, id));
        }
        text.push_str(&state.finish());
        text
    }

    /// The bytes a token stands for in the middle of a text; not always whole characters. None
    /// for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.bytes(id)
    }

    /// Ids of the tokens that are not special and whose bytes begin with `start`, in rising order.
    pub fn ids_beginning_with(&self, start: &[u8]) -> Vec<u32> {
        let begins = |&id: &u32| {
            let bytes = self.pieces.bytes(id);
            bytes.is_some_and(|bytes| bytes.starts_with(start)) && !self.is_special(id)
        };
        (0..self.vocab_size() as u32).filter(begins).collect()
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token is a special one, whose text is not part of an answer.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// Largest id plus one. A model's head may have more rows; those are never sampled.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Special ids and their texts.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// All ids that end a text: those of config.json, generation_config.json and the tokenizer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.config.eos
    }

    /// Begin-of-text id.
    pub fn bos_id(&self) -> Option<u32> {
        self.config.bos
    }

    /// `bos_token` and the like, as chat templates expect them.
    pub fn template_variables(&self) -> &Map<String, Json> {
        &self.config.texts
    }

    fn literal(&self) -> &Arc<Inner> {
        self.literal.get_or_init(|| {
            let mut literal = self.inner.clone();
            literal.set_encode_special_tokens(true);
            Arc::new(literal)
        })
    }

    /// What grammars need of it.
    pub(crate) fn vocabulary(&self) -> Result<&Vocabulary> {
        let made = self.vocabulary.get_or_init(|| {
            Vocabulary::new(self, Arc::clone(self.literal())).map_err(|error| error.to_string())
        });
        made.as_ref().map_err(|reason| Error::Grammar {
            kind: "vocabulary",
            reason: reason.clone(),
        })
    }

    fn pieces(&self) -> &Pieces {
        &self.pieces
    }
}

/// What encoding puts before and after a text: the post-processor's tokens, overruled by
/// `add_bos_token` and `add_eos_token` of tokenizer_config.json.
fn surroundings(inner: &Inner, config: &TokenizerConfig) -> Result<(Vec<u32>, Vec<u32>)> {
    let encode = |special: bool| {
        inner
            .encode_fast("a", special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| invalid(error.to_string()))
    };
    let (bare, full) = (encode(false)?, encode(true)?);
    let at = (0..=full.len().saturating_sub(bare.len())).find(|&at| full[at..].starts_with(&bare));
    let (mut prefix, mut suffix) = match at {
        Some(at) => (full[..at].to_vec(), full[at + bare.len()..].to_vec()),
        None => (Vec::new(), Vec::new()),
    };
    if let (Some(add), Some(bos)) = (config.add_bos, config.bos_of_tokenizer()) {
        prefix.retain(|&id| id != bos);
        if add {
            prefix.insert(0, bos);
        }
    }
    if let (Some(add), Some(eos)) = (config.add_eos, config.eos_of_tokenizer()) {
        suffix.retain(|&id| id != eos);
        if add {
            suffix.push(eos);
        }
    }
    Ok((prefix, suffix))
}

fn invalid(reason: String) -> Error {
    Error::TokenizerInvalid {
        path: "tokenizer.json".into(),
        reason,
    }
}
