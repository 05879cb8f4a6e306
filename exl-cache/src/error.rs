use crate::SeqId;

/// What can go wrong in a page table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The pool has no room now; it may have later.
    #[error("the KV cache has {free} free pages of 256 tokens and {needed} are needed")]
    OutOfPages {
        /// Pages asked for.
        needed: usize,
        /// Pages free at that moment.
        free: usize,
    },
    /// The sequence can never fit, however long one waits.
    #[error(
        "{tokens} tokens need {needed} cache pages of 256 tokens, the whole cache has {capacity} \
         ({} tokens): shorten the prompt, ask for fewer new tokens or enlarge the cache",
        capacity.saturating_mul(crate::PAGE_TOKENS)
    )]
    NeverFits {
        /// Tokens asked for.
        tokens: usize,
        /// Pages those need.
        needed: usize,
        /// Usable pages of the pool.
        capacity: usize,
    },
    /// No such sequence: released, or of another table.
    #[error("sequence {0} is not in this page table")]
    UnknownSequence(SeqId),
    /// A position outside the pages the sequence owns.
    #[error("sequence {seq} owns cache for {reserved} tokens, position {position} lies behind it")]
    OutOfRange {
        /// The sequence.
        seq: SeqId,
        /// Tokens its pages hold.
        reserved: usize,
        /// The position asked for.
        position: usize,
    },
    /// Window pages for a page that holds tokens others may count on.
    #[error("sequence {seq} was not prepared for a write at position {position}")]
    Unprepared {
        /// The sequence.
        seq: SeqId,
        /// The position.
        position: usize,
    },
    /// A pool without a page, or larger than page ids reach.
    #[error("a cache of {pages} pages cannot work: 1 is the least, {max} the most")]
    PoolSize {
        /// Pages asked for.
        pages: usize,
        /// The largest pool.
        max: usize,
    },
}

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;
