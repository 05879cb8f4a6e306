#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod disk;
mod error;
mod events;
mod hash;
mod table;

pub use disk::{DiskPage, DiskTier};
pub use error::{Error, Result};
pub use events::CacheEvent;
pub use exl_tensor::{PAGE_TOKENS, least_window_pages};
pub use hash::{PageHash, Prefix, vector_ids};
pub use table::{Match, PageCopy, PageId, PageTable, SeqId, pages_for};
