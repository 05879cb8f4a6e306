//! A tokenizer's tokens as the grammar engine wants them.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use crate::tokenizer::Inner;
use crate::{Error, Result, Tokenizer};

/// Longer tokens are never allowed: the engine's tree is not as deep.
const MAX_TOKEN_BYTES: usize = 1000;
/// Bytes of all tokens; the engine's tree has no room for more.
const MAX_BYTES: usize = 4_000_000;

/// All that grammars of one tokenizer share.
pub(crate) struct Vocabulary {
    factory: ParserFactory,
    end: u32,
}

impl Vocabulary {
    /// Of a tokenizer and its library's object, which must take special tokens for text.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a vocabulary that is too large.
    pub(crate) fn new(tokenizer: &Tokenizer, literal: Arc<Inner>) -> Result<Self> {
        let words = words(tokenizer);
        if words.iter().map(Vec::len).sum::<usize>() > MAX_BYTES {
            return Err(error("the vocabulary is too large for grammars"));
        }
        let end = words.len() as u32 - 1;
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let env: TokEnv = Arc::new(Env { trie, literal });
        let mut factory = ParserFactory::new_simple(&env).map_err(error)?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory, end })
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }

    /// The token that stands for the end of an answer, behind those of the tokenizer. Which of its
    /// own tokens end an answer depends on the request.
    pub(super) fn end(&self) -> u32 {
        self.end
    }
}

fn error(reason: impl ToString) -> Error {
    Error::Grammar {
        kind: "vocabulary",
        reason: reason.to_string(),
    }
}

/// The bytes of every token, and the end. Special tokens are no text: a grammar has to name them.
fn words(tokenizer: &Tokenizer) -> Vec<Vec<u8>> {
    let special = |name: &[u8]| [&[TokTrie::SPECIAL_TOKEN_MARKER], name].concat();
    let word = |id: u32| match (tokenizer.token_bytes(id), tokenizer.is_special(id)) {
        (Some(bytes), _) if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
        (Some(_), true) => special(tokenizer.token(id).unwrap_or_default().as_bytes()),
        (Some(bytes), false) => bytes.to_vec(),
        (None, _) => Vec::new(),
    };
    let mut words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32).map(word).collect();
    words.push(special(b"<|exl end of answer|>"));
    words
}

struct Env {
    trie: TokTrie,
    literal: Arc<Inner>,
}

impl Env {
    /// The tokens of a text that goes on from another one. What the tokenizer puts before a text
    /// is taken off; behind a line break it puts it before that.
    fn tokens(&self, text: &str) -> Option<Vec<u32>> {
        ["", "\n"].iter().find_map(|before| {
            let whole = format!("{before}{text}");
            let encoding = self.literal.encode_fast(whole.as_str(), false).ok()?;
            let ids = encoding.get_ids();
            let bytes = |ids: &[u32]| -> Vec<u8> {
                let known = ids
                    .iter()
                    .filter(|&&id| (id as usize) < self.trie.vocab_size());
                known.flat_map(|&id| self.trie.token(id)).copied().collect()
            };
            (0..ids.len().min(4))
                .find(|&at| bytes(&ids[at..]) == text.as_bytes())
                .map(|at| ids[at..].to_vec())
        })
    }
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.tokens(text)
                .unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}
