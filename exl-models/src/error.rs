//! The error type of this crate.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a model: its configuration, its weights, a step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No architecture file knows this name.
    #[error(
        "{file}: unknown architecture {found:?}, the nearest known one is {nearest:?}{differs}; \
         --assume-llama loads it as LlamaForCausalLM, which is right only when it is one under \
         another name"
    )]
    UnknownArchitecture {
        /// The configuration file.
        file: PathBuf,
        /// The name in the file.
        found: String,
        /// The known name closest to it.
        nearest: &'static str,
        /// In what the configuration differs from one of that name, as text.
        differs: String,
    },
    /// An option of the user that cannot be.
    #[error("{flag}: expected a number above 0, found {found}")]
    Option {
        /// The option's flag.
        flag: &'static str,
        /// Its value.
        found: String,
    },
    /// The checkpoint lacks a tensor the architecture needs.
    #[error("{dir}: no tensor {name} (looked for {tried}){more}")]
    MissingTensor {
        /// The model directory.
        dir: PathBuf,
        /// Base name of the tensor.
        name: String,
        /// The suffixes tried.
        tried: &'static str,
        /// How many others are missing, as text; empty when it is the only one.
        more: String,
    },
    /// A tensor has another shape or type than the configuration says.
    #[error("{file}: tensor {name}: expected {expected}, found {found}")]
    Tensor {
        /// The file that holds it.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// What the configuration says.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// Some linears of a block are quantized and others are not.
    #[error("{block} is partially quantized: {found}; all of its linears must be stored alike")]
    PartiallyQuantized {
        /// The block.
        block: String,
        /// How each linear is stored.
        found: String,
    },
    /// A weight holds NaN or infinity.
    #[error("{file}: tensor {name}: value {index} is {value}; the checkpoint is damaged")]
    NotFinite {
        /// The file that holds it.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Position of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// An adapter that cannot be used.
    #[error("{file}: {what}")]
    Adapter {
        /// Its configuration or its weights.
        file: PathBuf,
        /// What is wrong, and which entry or tensor it is about.
        what: String,
    },
    /// A step that the runner cannot run.
    #[error("step: {0}")]
    Step(String),
    /// Files could not be read.
    #[error(transparent)]
    Format(#[from] exl_format::Error),
    /// Weights could not be prepared or a plan failed.
    #[error(transparent)]
    Exec(#[from] exl_tensor::Error),
}
