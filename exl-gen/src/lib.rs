#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backend;
mod engine;
mod error;
mod grammar;
mod job;
mod request;
mod sampler;
mod schedule;
pub mod sim;
mod speculation;
mod stats;
mod stop;
mod template;
mod tokenizer;

pub use backend::{
    AdapterInfo, Backend, BackendError, Draw, LogitRows, Mixed, RunnerBackend, SampleParams,
    SeqSlice, SliceExtras, Vectors, WindowCache,
};
pub use engine::{Answer, DiskOptions, Engine, EngineHandle, EngineOptions, JobStream};
pub use error::{Error, Result};
pub use grammar::{Grammar, Guide, MaskTimes};
pub use request::{
    AdapterUse, Done, DoneReason, Event, Guidance, JobId, Request, Timings, TokenLogprobs,
};
pub use sampler::{Mirostat, Philox, Sampled, Sampler, SamplerSettings, Stage};
pub use speculation::{DraftModel, Speculation};
pub use stats::{Load, Stats};
pub use stop::{StopStrings, StopText};
pub use template::{ChatInput, ChatTemplate, ChatTemplates, LocalTime};
pub use tokenizer::{Detokenizer, Encode, Tokenizer, TokenizerConfig, TokenizerFormat};
