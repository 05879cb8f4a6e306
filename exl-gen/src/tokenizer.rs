//! Text to token ids and back, in whatever form a model brings its tokenizer.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value as Json};
use tokenizers::{AddedToken, PreTokenizerWrapper};

use crate::grammar::Vocabulary;
use crate::{Error, Result};

mod added;
mod byte_level;
mod config;
mod detokenizer;
mod family;
mod inner;
mod merge;
mod names;
mod pieces;
mod prefixes;
mod ranks;
mod sentencepiece;
mod source;
#[cfg(test)]
pub(crate) mod tests;

pub use config::TokenizerConfig;
use config::{Defaults, Settings};
pub use detokenizer::Detokenizer;
pub(crate) use inner::Inner;
use inner::{AnyModel, AnyNormalizer};
use pieces::{Pieces, Scheme};
use source::Source;
pub use source::TokenizerFormat;

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
    format: TokenizerFormat,
    files: Vec<PathBuf>,
}

/// What a tokenizer is put together from.
struct Parts {
    model: AnyModel,
    normalizer: Option<AnyNormalizer>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Found in a text before anything is done to it.
    added: Vec<AddedToken>,
    scheme: Scheme,
    defaults: Defaults,
    format: TokenizerFormat,
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
    /// Reads the tokenizer of a model directory: tokenizer.json, else tokenizer.model, else a
    /// .tiktoken file, else vocab.json with merges.txt. Special tokens and their rules come from
    /// tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json and
    /// generation_config.json where these are.
    ///
    /// # Errors
    /// [`Error::TokenizerMissing`], [`Error::Io`], [`Error::TokenizerInvalid`], [`Error::Config`],
    /// [`Error::UnknownToken`].
    pub fn open(dir: &Path) -> Result<Self> {
        let source = Source::find(dir)?;
        let settings = Settings::open(dir)?;
        let made = match &source {
            Source::Json(path) => {
                let bytes = source::read(path)?;
                Self::build(&bytes, &settings)
            }
            Source::SentencePiece(path) => {
                let bytes = source::read(path)?;
                Self::assemble(sentencepiece::build(&bytes, &settings), &settings)
            }
            Source::Ranks(path) => {
                let bytes = source::read(path)?;
                Self::assemble(byte_level::from_ranks(&bytes, &settings), &settings)
            }
            Source::Merges { vocab, merges } => {
                let (vocab, merges) = (source::read(vocab)?, source::read(merges)?);
                let parts = byte_level::from_merges(&vocab, &merges, &settings);
                Self::assemble(parts, &settings)
            }
        };
        let files = source.files();
        let mut made = made.map_err(|error| match error {
            // Where several files make a tokenizer, the error knows which one it is.
            Error::TokenizerInvalid { path, reason } => Error::TokenizerInvalid {
                path: match path.as_os_str().is_empty() {
                    true => files[0].to_owned(),
                    false => dir.join(path),
                },
                reason,
            },
            other => other,
        })?;
        made.files = files.into_iter().map(Path::to_owned).collect();
        Ok(made)
    }

    /// From the text of a tokenizer.json and, where there is one, tokenizer_config.json.
    ///
    /// # Errors
    /// [`Error::TokenizerInvalid`], [`Error::Config`].
    pub fn from_json(tokenizer: &[u8], tokenizer_config: Option<&Json>) -> Result<Self> {
        let settings = Settings {
            tokenizer: tokenizer_config.cloned().unwrap_or(Json::Null),
            ..Settings::default()
        };
        Self::build(tokenizer, &settings).map_err(|error| match error {
            Error::TokenizerInvalid { reason, .. } => Error::TokenizerInvalid {
                path: "tokenizer.json".into(),
                reason,
            },
            other => other,
        })
    }

    fn build(bytes: &[u8], settings: &Settings) -> Result<Self> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        check_merges(&json["model"])?;
        let mut inner = Inner::from_bytes(bytes).map_err(|e| invalid(e.to_string()))?;
        inner
            .with_truncation(None)
            .map_err(|e| invalid(e.to_string()))?
            .with_padding(None);
        settings.add_tokens(&mut inner)?;
        let scheme = Scheme::read(json.get("decoder").unwrap_or(&Json::Null))?;
        let format = TokenizerFormat::Json;
        Self::finish(inner, scheme, settings, (&Defaults::default(), format))
    }

    fn assemble(parts: Result<Parts>, settings: &Settings) -> Result<Self> {
        let parts = parts?;
        let mut inner = Inner::new(parts.model);
        inner
            .with_normalizer(parts.normalizer)
            .map_err(|e| invalid(e.to_string()))?
            .with_pre_tokenizer(parts.pre_tokenizer);
        inner
            .add_tokens(parts.added)
            .map_err(|e| invalid(e.to_string()))?;
        let kind = (&parts.defaults, parts.format);
        Self::finish(inner, parts.scheme, settings, kind)
    }

    fn finish(
        inner: Inner,
        scheme: Scheme,
        settings: &Settings,
        (defaults, format): (&Defaults, TokenizerFormat),
    ) -> Result<Self> {
        let pieces = Pieces::new(&inner, scheme)?;
        let config = settings.resolve(&inner, pieces.len(), defaults)?;
        let (prefix, suffix) = surroundings(&inner, &config)?;
        Ok(Self {
            inner,
            literal: OnceLock::new(),
            vocabulary: OnceLock::new(),
            pieces,
            config,
            prefix,
            suffix,
            format,
            files: Vec::new(),
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

    /// Whether a model with `rows` rows of embeddings knows all these tokens. Vocabularies may be
    /// larger than models: tokens that were added to one need not have been added to the other.
    ///
    /// # Errors
    /// [`Error::NoRow`] with the first token that it does not know, [`Error::UnknownToken`] for one
    /// that is not this tokenizer's either.
    pub fn check(&self, ids: &[u32], rows: usize) -> Result<()> {
        let unknown = ids.iter().find(|&&id| id as usize >= rows);
        match unknown.map(|&id| (id, self.token(id))) {
            None => Ok(()),
            Some((id, Some(token))) => Err(Error::NoRow { id, token, rows }),
            Some((id, None)) => Err(Error::UnknownToken { id, vocab: rows }),
        }
    }

    /// How it was written down.
    pub fn format(&self) -> TokenizerFormat {
        self.format
    }

    /// The files it was read from; none if it was not read from a directory.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
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

/// Refuses pairs that are longer than every token: the library counts on there being none.
fn check_merges(model: &Json) -> Result<()> {
    let vocab = model["vocab"].as_object();
    let longest = vocab.and_then(|vocab| vocab.keys().map(String::len).max());
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for merge in model["merges"].as_array().into_iter().flatten() {
        let pair = match merge.as_str() {
            Some(line) => line.split_once(' '),
            None => merge[0].as_str().zip(merge[1].as_str()),
        };
        let fits = |(left, right): (&str, &str)| {
            right.len() >= prefix.len() && Some(left.len() + right.len() - prefix.len()) <= longest
        };
        if !pair.is_none_or(fits) {
            return Err(invalid(format!("the pair {merge} makes no token")));
        }
    }
    Ok(())
}

/// An error in a file that [`Tokenizer::open`] names.
fn invalid(reason: String) -> Error {
    Error::TokenizerInvalid {
        path: PathBuf::new(),
        reason,
    }
}
