//! The error type of this crate.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with weights, plans and their execution.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A kernel refused its arguments.
    #[error("op {index} ({op}): {source}")]
    Op {
        /// Position in the plan.
        index: usize,
        /// Name of the op.
        op: &'static str,
        /// Why.
        source: exl_kernels::Error,
    },
    /// A weight could not be prepared.
    #[error("tensor {name}: {source}")]
    Weight {
        /// Name of the tensor.
        name: String,
        /// Why.
        source: exl_kernels::Error,
    },
    /// A plan asks for a weight that is not loaded.
    #[error("tensor {name} is not loaded, the plan needs it")]
    MissingWeight {
        /// Name of the tensor.
        name: String,
    },
    /// A weight has another shape or type than the plan says.
    #[error("tensor {name}: expected {expected}, found {found}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// The plan's shape.
        expected: String,
        /// The loaded shape.
        found: String,
    },
    /// The step does not fit the plan it is run with.
    #[error("step: {0}")]
    Step(String),
    /// A GPU or its driver refused.
    #[error("{0}")]
    Gpu(#[source] exl_kernels::Error),
    /// Memory could not be had.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was being allocated.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
}
