#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod table;

pub use error::{Error, Result};
pub use exl_tensor::PAGE_TOKENS;
pub use table::{PageCopy, PageId, PageTable, SeqId, pages_for};
