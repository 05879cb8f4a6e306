//! What others may want to know of a cache, such as a router that sends a request to the engine
//! that has its prefix already.

use crate::PageHash;

/// A change of what the cache can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheEvent {
    /// A full page can be found from now on. Where there are window pages, that it has one still is not
    /// told: then it may have to be computed again.
    Stored {
        /// Its name.
        hash: PageHash,
        /// Name of the page before it, or the root of its text.
        parent: Option<PageHash>,
        /// Its tokens.
        tokens: Vec<u32>,
    },
    /// A page cannot be found any more.
    Removed {
        /// Its name.
        hash: PageHash,
    },
    /// Nothing can be found any more.
    Cleared,
}
