use std::path::PathBuf;

/// What can go wrong between a prompt and its answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory without a tokenizer.
    #[error(
        "{}: no tokenizer here: none of tokenizer.json, tokenizer.model, *.tiktoken, and vocab.json \
         with merges.txt{more}; copy the one of the original model's repository into this directory",
        dir.display()
    )]
    TokenizerMissing {
        /// The directory looked into.
        dir: PathBuf,
        /// What is there of one.
        more: &'static str,
    },
    /// A file that cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tokenizer's file that is none.
    #[error("{path}: not a usable tokenizer: {reason}")]
    TokenizerInvalid {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// An entry of a configuration file has the wrong shape.
    #[error("{file}: `{key}` must be {expected}")]
    Config {
        /// The file.
        file: String,
        /// The entry.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A text the tokenizer refuses.
    #[error("the tokenizer cannot encode this text: {reason}")]
    Encode {
        /// Its own words.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error("token {id} is outside the vocabulary of {vocab} tokens")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A token of the tokenizer that the model has nothing for.
    #[error(
        "the tokenizer makes token {id} (`{token}`) of this text, but the model has only {rows} rows \
         of embeddings: the token was added to the tokenizer and not to the model"
    )]
    NoRow {
        /// The id.
        id: u32,
        /// Its spelling.
        token: String,
        /// Tokens that the model knows.
        rows: usize,
    },
    /// A chat template that does not compile or refuses a conversation.
    #[error("the chat template {what}{}: {reason}", at_line(*line))]
    Template {
        /// What happened.
        what: &'static str,
        /// Line in the template, 0 when unknown.
        line: usize,
        /// The construct, or the template's own words.
        reason: String,
    },
    /// Several templates and none of them the default.
    #[error("no chat template named `default` among: {names}")]
    NoTemplate {
        /// Those there are.
        names: String,
    },
    /// A sampling setting outside its range.
    #[error("{name} is {value}, but must be {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The range.
        expected: &'static str,
    },
    /// A grammar that cannot be used, or that an answer cannot follow.
    #[error("the {kind} cannot be used: {reason}")]
    Grammar {
        /// JSON schema, regular expression, and so on.
        kind: &'static str,
        /// Why.
        reason: String,
    },
    /// An order of the sampler's steps that cannot be.
    #[error("the sampler order is wrong: {reason}")]
    Order {
        /// Why.
        reason: String,
    },
    /// Logits nothing can be drawn from.
    #[error("no token can be chosen: {reason}")]
    Logits {
        /// Why.
        reason: String,
    },
    /// Prompt and answer can never fit into the cache.
    #[error(
        "the prompt has {prompt} tokens and {new} new ones are asked for, but {limit} is the most \
         one sequence can hold: shorten the prompt, ask for fewer tokens or enlarge the cache"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// New tokens asked for.
        new: usize,
        /// Tokens one sequence can hold.
        limit: usize,
    },
    /// A prompt without a single token.
    #[error("the prompt is empty: give at least one token (a BOS token will do)")]
    EmptyPrompt,
    /// Nothing more fits into the queue of waiting requests.
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
    /// The engine drains or has ended and takes no more requests.
    #[error("the engine is shutting down and takes no more requests")]
    Closed,
    /// A backend the engine cannot run with.
    #[error("the engine cannot run on this backend: {reason}")]
    Backend {
        /// Why.
        reason: String,
    },
    /// A draft model that cannot guess for the engine's model.
    #[error("the draft model cannot be used: {reason}")]
    DraftModel {
        /// Why.
        reason: String,
    },
    /// An adapter that the backend does not have.
    #[error("there is no adapter {name:?}, there are: {known}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// Vectors or hidden states that a request cannot have.
    #[error("{what}")]
    Extras {
        /// What is wrong.
        what: String,
    },
    /// Page table.
    #[error(transparent)]
    Cache(#[from] exl_cache::Error),
}

fn at_line(line: usize) -> String {
    match line {
        0 => String::new(),
        line => format!(" (line {line})"),
    }
}

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;
