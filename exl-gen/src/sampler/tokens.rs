//! Sets of tokens.

use crate::Tokenizer;

/// Token ids as bits.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenSet {
    words: Vec<u64>,
}

impl TokenSet {
    pub(super) fn from_ids(ids: &[u32]) -> Self {
        let mut set = Self::default();
        ids.iter().for_each(|&id| set.insert(id));
        set
    }

    /// All special tokens, and the tokens whose bytes contain one of `texts`.
    pub(super) fn containing<T: AsRef<[u8]>>(tokenizer: &Tokenizer, texts: &[T]) -> Self {
        let mut set = Self::default();
        let texts: Vec<&[u8]> = texts.iter().map(AsRef::as_ref).collect();
        let contains = |bytes: &[u8], text: &[u8]| {
            !text.is_empty() && bytes.windows(text.len()).any(|part| part == text)
        };
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            if tokenizer.is_special(id) || texts.iter().any(|text| contains(bytes, text)) {
                set.insert(id);
            }
        }
        set
    }

    fn insert(&mut self, id: u32) {
        let word = id as usize / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id % 64);
    }

    pub(super) fn contains(&self, id: u32) -> bool {
        self.words
            .get(id as usize / 64)
            .is_some_and(|word| word >> (id % 64) & 1 == 1)
    }
}
