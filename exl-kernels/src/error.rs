//! The error type of this crate.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in a kernel call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong size, type or place.
    #[error("{0}")]
    Argument(Box<Mismatch>),
    /// The back end has no implementation for these arguments.
    #[error("{op}: {what} is not supported")]
    Unsupported {
        /// Name of the op.
        op: &'static str,
        /// What was asked for.
        what: String,
    },
}

/// What an argument had to be and what it was.
#[derive(Debug, thiserror::Error)]
#[error("{argument}: expected {expected}, found {found}")]
pub struct Mismatch {
    /// `op.field` or a description of the argument.
    pub argument: String,
    /// The rule.
    pub expected: String,
    /// What came.
    pub found: String,
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(
        argument: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Error::Argument(Box::new(Mismatch {
            argument: argument.into(),
            expected: expected.into(),
            found: found.into(),
        }))
    }
}
