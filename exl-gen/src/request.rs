//! What a caller asks for and what it is told.

use std::fmt;
use std::time::Duration;

use crate::{Grammar, SamplerSettings, Speculation, Vectors};

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
    /// Most tokens of the answer, `prefix` included.
    pub max_new_tokens: usize,
    /// Stop tokens are not drawn before the answer has this many tokens.
    pub min_new_tokens: usize,
    /// Tokens the answer begins with. They count as drawn, and nothing in them is banned.
    pub prefix: Vec<u32>,
    /// The last prompt token is drawn again, from those that begin with its text, so that a prompt
    /// may end within a word. Only what is added to its text is shown; the token comes first among
    /// the answer's ids and does not count as one of them. Special tokens, incomplete characters and
    /// prompts of one token stay as they are. Not together with `prefix`.
    pub token_healing: bool,
    /// How tokens are chosen.
    pub sampler: SamplerSettings,
    /// Guesses tokens, to have several of them from one step. It does not change the answer. Jobs with
    /// vectors go without.
    pub speculation: Option<Speculation>,
    /// Steers away from another prompt.
    pub guidance: Option<Guidance>,
    /// The form the answer must have.
    pub grammar: Option<Grammar>,
    /// Ends the answer as soon as its grammar lets it end.
    pub prefer_end: bool,
    /// Tokens that end the answer, besides the tokenizer's end-of-text ids.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the answer.
    pub stop_strings: Vec<String>,
    /// Texts that must not appear, in any case of their letters. When one does, the tokens that spell
    /// it are taken back and the first of them is not drawn again there.
    pub banned_strings: Vec<String>,
    /// Goes on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Shows special tokens in the text.
    pub decode_special: bool,
    /// Tells the log-probability of every token and of this many of the likeliest.
    pub logprobs: Option<usize>,
    /// Jobs of a higher priority start first and may push others back into the queue. A job that
    /// waits rises by one for every 64 that start before it.
    pub priority: i32,
    /// The job ends when it is older than this.
    pub deadline: Option<Duration>,
    /// Adapters of the backend ([`crate::Backend::adapters`]); what they do is summed.
    pub adapters: Vec<AdapterUse>,
    /// Hidden states in place of tokens of the prompt, in the order of their positions. The prompt has
    /// some token for each; which one does not matter.
    pub vectors: Vec<Vectors>,
    /// Positions of the prompt, rising, whose last hidden states are told ([`Event::Hidden`]). From the
    /// first of them on nothing is taken from the cache. Not together with `token_healing`.
    pub hidden: Vec<usize>,
}

/// An adapter and how much of it is added.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterUse {
    /// Its name.
    pub name: String,
    /// 1 is what it was trained for.
    pub scale: f32,
}

/// Classifier-free guidance: tokens are drawn from `scale` times the log-probabilities after the
/// prompt and `1 - scale` times those after another one.
#[derive(Clone, Debug, PartialEq)]
pub struct Guidance {
    /// The other prompt; the answer follows it, too.
    pub negative: Vec<u32>,
    /// 1 has no effect, more steers away from the negative prompt.
    pub scale: f32,
}

impl Request {
    /// Up to 256 tokens with default sampling.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_new_tokens: 256,
            min_new_tokens: 0,
            prefix: Vec::new(),
            token_healing: false,
            sampler: SamplerSettings::default(),
            speculation: None,
            guidance: None,
            grammar: None,
            prefer_end: false,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            banned_strings: Vec::new(),
            ignore_eos: false,
            decode_special: false,
            logprobs: None,
            priority: 0,
            deadline: None,
            adapters: Vec::new(),
            vectors: Vec::new(),
            hidden: Vec::new(),
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
    /// The last hidden state of a position of the prompt, behind the final norm.
    Hidden {
        /// The position.
        position: usize,
        /// As wide as the model's hidden states.
        values: Vec<f32>,
    },
    /// New text, always whole characters.
    Text {
        /// The text; may be empty where tokens have none.
        text: String,
        /// The tokens that begin in it.
        token_ids: Vec<u32>,
        /// Log-probabilities of these tokens, if they were asked for; given tokens have none.
        logprobs: Vec<TokenLogprobs>,
    },
    /// Tokens were taken back because they spelled a banned string; they were never shown.
    Suppressed {
        /// Their text.
        text: String,
        /// The tokens.
        token_ids: Vec<u32>,
    },
    /// The end; nothing follows.
    Done(Done),
}

/// How likely a token was, by the model alone: before penalties, temperature and the like.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Why.
    pub reason: DoneReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, tokens found in the cache.
    pub cached_tokens: usize,
    /// Tokens drawn, a stop token included; those taken back are not counted.
    pub new_tokens: usize,
    /// Steps of the model after which the job drew tokens.
    pub steps: usize,
    /// Tokens guessed and computed with others in one step ([`Speculation`]).
    pub drafted_tokens: usize,
    /// Of those, tokens that were right.
    pub accepted_tokens: usize,
    /// Times the job gave its place to another one and came back.
    pub preemptions: usize,
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
    /// Its deadline passed.
    Deadline,
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
