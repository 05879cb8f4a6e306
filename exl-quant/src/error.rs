//! The error type of this crate.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong while quantizing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Calibration data cannot be used.
    #[error("calibration data {file}: {what}")]
    Calibration {
        /// The file, or `(built-in)`.
        file: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// A number that is not finite, or a matrix that cannot be factored.
    #[error("{tensor}: {what}")]
    Numeric {
        /// Name of the tensor.
        tensor: String,
        /// What was found.
        what: String,
    },
    /// Sizes that do not belong together.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// What was measured.
        what: String,
        /// The rule.
        expected: String,
        /// What came.
        found: String,
    },
    /// A layout or recipe that the format cannot hold.
    #[error("layout '{layout}': {what}")]
    Layout {
        /// Text form of the layout.
        layout: String,
        /// The broken rule.
        what: String,
    },
    /// A setting outside its range.
    #[error("{option}: {what}")]
    Option {
        /// Flag or field.
        option: &'static str,
        /// What is wrong and what is allowed.
        what: String,
    },
    /// The bit budget cannot be met.
    #[error("{what}")]
    Budget {
        /// Smallest and wanted size.
        what: String,
    },
    /// More memory needed than allowed.
    #[error(
        "--max-ram {allowed_gb:.2} is too small: this conversion needs about {} GB ({what}); raise it, or \
         lower --rows or --length",
        enough(*needed_gb)
    )]
    Memory {
        /// Computed need, in 10^9 bytes, as the flag.
        needed_gb: f64,
        /// The promise.
        allowed_gb: f64,
        /// Largest parts.
        what: String,
    },
    /// More device memory needed than allowed or free.
    #[error(
        "this conversion needs about {} GB of device memory and {allowed_gb:.2} are {limit} ({what}); \
         raise it, lower --length, or use --device cpu",
        enough(*needed_gb)
    )]
    DeviceMemory {
        /// Computed need, in 10^9 bytes, as the flag.
        needed_gb: f64,
        /// The promise, or what is free.
        allowed_gb: f64,
        /// Which of the two.
        limit: &'static str,
        /// Largest parts.
        what: String,
    },
    /// A measurement or journal that belongs to something else, or is damaged.
    #[error("{}: {what}", file.display())]
    Journal {
        /// The file.
        file: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// What was written does not decode to what was meant.
    #[error("check of the written checkpoint failed: {what}")]
    Verify {
        /// Tensor, place, values.
        what: String,
    },
    /// The stop flag was set.
    #[error("interrupted; run the same command again to continue")]
    Interrupted,
    /// Files of the checkpoint.
    #[error(transparent)]
    Format(#[from] exl_format::Error),
    /// The model's forward pass.
    #[cfg(feature = "pipeline")]
    #[error(transparent)]
    Model(#[from] exl_models::Error),
    /// Buffers and plans.
    #[error(transparent)]
    Tensor(#[from] exl_tensor::Error),
}

impl Error {
    /// An [`Error::Shape`].
    pub(crate) fn shape(
        what: impl Into<String>,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Error::Shape {
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Numeric`].
    pub(crate) fn numeric(tensor: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Numeric {
            tensor: tensor.into(),
            what: what.into(),
        }
    }

    /// An [`Error::Io`].
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            source,
        }
    }
}

/// With two digits, never less: what a flag can be raised to.
fn enough(gb: f64) -> String {
    format!("{:.2}", (gb * 100.0).ceil() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_told_in_the_unit_of_the_flag() {
        let error = Error::Memory {
            needed_gb: 9.301,
            allowed_gb: 8.0,
            what: "hidden states 7.00".to_owned(),
        };
        let text = error.to_string();
        let parts = ["--max-ram 8.00 is too small", "about 9.31 GB (hidden"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}
