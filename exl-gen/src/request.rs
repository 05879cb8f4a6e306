//! What a caller asks for and what it is told.

use std::fmt;
use std::time::Duration;

use crate::{Grammar, SamplerSettings};

/// Number of a job, unique within an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub(crate) u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids, BOS included where the model wants one.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer; cache for all of them is reserved when the job starts.
    pub max_new_tokens: usize,
    /// Stop tokens are not drawn before the answer has this many tokens.
    pub min_new_tokens: usize,
    /// How tokens are chosen.
    pub sampler: SamplerSettings,
    /// The form the answer must have.
    pub grammar: Option<Grammar>,
    /// Ends the answer as soon as its grammar lets it end.
    pub prefer_end: bool,
    /// Tokens that end the answer, besides the tokenizer's end-of-text ids.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the answer.
    pub stop_strings: Vec<String>,
    /// Goes on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Shows special tokens in the text.
    pub decode_special: bool,
}

impl Request {
    /// Up to 256 tokens with default sampling.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_new_tokens: 256,
            min_new_tokens: 0,
            sampler: SamplerSettings::default(),
            grammar: None,
            prefer_end: false,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            ignore_eos: false,
            decode_special: false,
        }
    }
}

/// What happens to a job, in this order: started, prefill, text, done.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The job left the queue and owns its cache pages.
    Started {
        /// Seed of its draws.
        seed: u64,
    },
    /// Prompt tokens worked through.
    Prefill {
        /// Tokens done.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// New text, always whole characters.
    Text {
        /// The text; may be empty where tokens have none.
        text: String,
        /// The tokens that begin in it.
        token_ids: Vec<u32>,
    },
    /// The end; nothing follows.
    Done(Done),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Why.
    pub reason: DoneReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens drawn, a stop token included.
    pub new_tokens: usize,
    /// Time spent.
    pub timings: Timings,
}

/// Why a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DoneReason {
    /// This stop token was drawn.
    StopToken(u32),
    /// This stop string appeared.
    StopString(String),
    /// The grammar is satisfied and lets nothing follow.
    Grammar,
    /// `max_new_tokens` were drawn.
    MaxTokens,
    /// Aborted by its caller or by the end of the engine.
    Aborted,
    /// Something failed; other jobs go on.
    Error(String),
}

/// Where a job's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// In the queue.
    pub queued: Duration,
    /// From the start to the first token.
    pub prefill: Duration,
    /// From the first token to the end.
    pub decode: Duration,
}
