//! The error type of this crate.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with the files of a model, or go wrong while writing them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "list", "write".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A path that is no model directory.
    #[error("{}: {what}; expected a directory with config.json and *.safetensors", dir.display())]
    NotAModel {
        /// The path.
        dir: PathBuf,
        /// What is missing.
        what: String,
    },
    /// A shard of a set of files is not there.
    #[error(
        "{}: {shard} is missing ({reason}); download it again or remove what refers to it",
        dir.display()
    )]
    MissingShard {
        /// The model directory.
        dir: PathBuf,
        /// The name of the file.
        shard: String,
        /// How the file is known to be needed.
        reason: String,
    },
    /// A safetensors header that cannot be trusted.
    #[error("{}: damaged safetensors file: {what}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// The broken rule, with the tensor where there is one.
        what: String,
    },
    /// A tensor that no file holds.
    #[error("{}: no tensor {tensor}", place.display())]
    MissingTensor {
        /// The directory or file that was searched.
        place: PathBuf,
        /// The name.
        tensor: String,
    },
    /// A tensor that two files hold.
    #[error(
        "tensor {tensor} is in both {} and {}; remove the file that does not belong to the model",
        first.display(),
        second.display()
    )]
    DuplicateTensor {
        /// The name.
        tensor: String,
        /// A file with it.
        first: PathBuf,
        /// Another one.
        second: PathBuf,
    },
    /// A tensor of the wrong type, shape or content.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", file.display())]
    Tensor {
        /// The file.
        file: PathBuf,
        /// The name.
        tensor: String,
        /// The rule.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A file that is not the JSON it should be.
    #[error("{}: not valid JSON: {what}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Reason and position.
        what: String,
    },
    /// A configuration key that is missing or holds something else.
    #[error("{}: {key}: expected {expected}, found {found}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The key, or the alternatives.
        key: String,
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Data that the format cannot hold, given to an encoder or a writer.
    #[error("{what}: expected {expected}, found {found}")]
    Encode {
        /// The part: a tensor, a group, an option.
        what: String,
        /// The rule.
        expected: String,
        /// What was given.
        found: String,
    },
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn header(file: &Path, what: impl Into<String>) -> Self {
        Error::Header {
            file: file.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn tensor(
        file: &Path,
        tensor: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Error::Tensor {
            file: file.to_owned(),
            tensor: tensor.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn encode(
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Error::Encode {
            what: what.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}
