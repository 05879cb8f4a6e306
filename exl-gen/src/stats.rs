//! Numbers about an engine.

use std::time::Duration;

use crate::MaskTimes;

/// What an engine did since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Jobs that ended by themselves.
    pub finished: u64,
    /// Jobs that were aborted.
    pub aborted: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Steps of the backend.
    pub steps: u64,
    /// Prompt tokens worked through.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cache instead.
    pub cached_tokens: u64,
    /// Times a job gave its place to another one.
    pub preemptions: u64,
    /// Tokens drawn.
    pub new_tokens: u64,
    /// Tokens guessed and computed with others in one step ([`crate::Speculation`]).
    pub drafted_tokens: u64,
    /// Of those, tokens that were right.
    pub accepted_tokens: u64,
    /// Steps of the draft model.
    pub draft_steps: u64,
    /// Time spent on guessing.
    pub drafting: Duration,
    /// Time inside the backend.
    pub busy: Duration,
    /// What the masks of ended jobs with a grammar took.
    pub masks: MaskTimes,
    /// What goes on now.
    pub load: Load,
}

/// What an engine is doing at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Jobs in the batch.
    pub running: usize,
    /// Jobs waiting for room.
    pub waiting: usize,
    /// Cache pages nobody owns.
    pub free_pages: usize,
    /// Of those, pages whose tokens can be found again.
    pub kept_pages: usize,
    /// Cache pages in all.
    pub pages: usize,
    /// Window pages that running jobs do not need, where some layers have pages of their own because
    /// they see a window only.
    pub free_window_pages: usize,
    /// Window pages in all.
    pub window_pages: usize,
    /// Pages of the draft model's cache that jobs own.
    pub draft_pages: usize,
}
