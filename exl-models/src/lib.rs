#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter;
pub mod arch;
pub mod blocks;
mod error;
mod layout;
mod load;
mod model;
mod params;
pub mod rope;
mod runner;
mod spec;

pub use adapter::Adapter;
pub use arch::{Arch, detect, parse};
pub use error::{Error, Result};
/// How long a part of a step took.
pub use exl_tensor::PartTime;
pub use layout::{Module, Site, WeightKey, WeightKind, layout, sites};
pub use load::{LoadOptions, ModelSource, Progress, Storage, check_finite};
pub use model::{
    BlockPart, MemoryRequest, MemoryUse, Model, WindowPages, block_plan, memory_for, plan,
};
pub use runner::{
    Backend, Draw, LogitRows, Runner, RunnerOptions, SampleParams, SeqSlice, SliceExtras, Vectors,
};
pub use spec::{
    AttnSpec, DenseMlp, EmbedSpec, HeadNormOver, HeadNormSpec, HeadSpec, LayerSpec, LinearSpec,
    MlpSpec, MoeSpec, NormKind, NormSpec, PositionsSpec, SharedExpert, Spec,
};
