#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod template;

pub use error::{Error, Result};
pub use template::{ChatInput, ChatTemplate, ChatTemplates, LocalTime};
