//! A sequence of a job.

use exl_cache::{Prefix, SeqId};

/// A text that goes through the model for a job: its prompt and the answer, or the negative prompt
/// and the answer.
#[derive(Debug)]
pub(crate) struct Lane {
    /// The text so far.
    pub(crate) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(crate) cached: usize,
    pub(crate) seq: Option<SeqId>,
    /// Names of its pages, for the page table.
    pub(crate) prefix: Prefix,
}

impl Lane {
    pub(crate) fn new(tokens: Vec<u32>) -> Self {
        Self {
            prefix: Prefix::new(None, &tokens),
            tokens,
            cached: 0,
            seq: None,
        }
    }

    /// Tokens that have to go through the model before the next draw; 1 while decoding.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Forgets its place in the cache; all of it is a prompt when it comes back.
    pub(crate) fn leave(&mut self) {
        self.prefix = Prefix::new(None, &self.tokens);
        self.cached = 0;
        self.seq = None;
    }
}
