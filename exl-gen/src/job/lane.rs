//! A sequence of a job.

use exl_cache::{PageHash, Prefix, SeqId};

/// A text that goes through the model for a job: its prompt and the answer, or the negative prompt
/// and the answer.
#[derive(Debug)]
pub(crate) struct Lane {
    /// The text so far.
    pub(crate) tokens: Vec<u32>,
    /// The text with the draft that the next step checks; empty without one.
    ahead: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(crate) cached: usize,
    pub(crate) seq: Option<SeqId>,
    /// Names of its pages, for the page table.
    pub(crate) prefix: Prefix,
    /// What keeps it apart from texts with other adapters.
    pub(crate) root: Option<PageHash>,
    /// Tokens that may be found in the cache; all but the last when absent.
    pub(crate) limit: Option<usize>,
}

impl Lane {
    pub(crate) fn new(tokens: Vec<u32>) -> Self {
        Self {
            prefix: Prefix::new(None, &tokens),
            tokens,
            ahead: Vec::new(),
            cached: 0,
            seq: None,
            root: None,
            limit: None,
        }
    }

    /// Tokens that have to go through the model before the next draw; 1 while decoding.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Guesses what follows the text, for the next step to check.
    pub(crate) fn set_draft(&mut self, draft: impl IntoIterator<Item = u32>) {
        self.ahead.clear();
        self.ahead.extend_from_slice(&self.tokens);
        self.ahead.extend(draft);
    }

    /// What is guessed to follow the text.
    pub(crate) fn draft(&self) -> &[u32] {
        self.ahead.get(self.tokens.len()..).unwrap_or_default()
    }

    /// Leaves at most `len` tokens of the draft.
    pub(crate) fn trim_draft(&mut self, len: usize) {
        self.ahead.truncate(self.tokens.len() + len);
    }

    /// The draft, which is then over.
    pub(crate) fn take_draft(&mut self) -> Vec<u32> {
        let draft = self.draft().to_vec();
        self.ahead.clear();
        draft
    }

    /// The next `rows` tokens that go through the model, those of the draft among them.
    pub(crate) fn rows(&self, rows: usize) -> &[u32] {
        match self.draft().is_empty() {
            true => &self.tokens[self.cached..self.cached + rows],
            false => &self.ahead[self.cached..self.cached + rows],
        }
    }

    /// The text with `drafted` tokens of its draft.
    pub(crate) fn text(&self, drafted: usize) -> &[u32] {
        match drafted {
            0 => &self.tokens,
            more => &self.ahead[..self.tokens.len() + more],
        }
    }

    /// Its first tokens, as many as may be found in the cache: the last token is computed in any case,
    /// for its logits.
    pub(crate) fn findable(&self) -> usize {
        let all = self.tokens.len().saturating_sub(1);
        self.limit.map_or(all, |limit| limit.min(all))
    }

    /// Forgets its place in the cache; all of it is a prompt when it comes back.
    pub(crate) fn leave(&mut self) {
        self.prefix = Prefix::new(self.root, &self.tokens).up_to(self.findable());
        self.ahead.clear();
        self.cached = 0;
        self.seq = None;
    }
}
