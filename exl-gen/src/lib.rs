#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod sampler;
mod stop;
mod template;
mod tokenizer;

pub use error::{Error, Result};
pub use sampler::{Philox, Sampled, Sampler, SamplerSettings};
pub use stop::{StopStrings, StopText};
pub use template::{ChatInput, ChatTemplate, ChatTemplates, LocalTime};
pub use tokenizer::{Detokenizer, Encode, Tokenizer, TokenizerConfig};
