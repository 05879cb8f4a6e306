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
    /// This machine has no CUDA driver that could be loaded.
    #[error("no NVIDIA driver: {reason}; install driver R525 or newer")]
    NoDriver {
        /// What was missing.
        reason: String,
    },
    /// The driver is older than what the kernels were built for.
    #[error(
        "the NVIDIA driver supports CUDA {}.{} and {}.{} is needed; install driver R{release} or newer",
        found.0, found.1, needed.0, needed.1
    )]
    DriverTooOld {
        /// CUDA version of the driver, major and minor.
        found: (u32, u32),
        /// Oldest version that works.
        needed: (u32, u32),
        /// The driver's release that brought it.
        release: u32,
    },
    /// The kernels of this program run on other GPUs only.
    #[error(
        "GPU {ordinal} ({name}) has compute capability {}.{}, for which this program has no kernels; \
         it has those for {architectures}",
        capability.0, capability.1
    )]
    NoKernels {
        /// The GPU.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Its compute capability, major and minor.
        capability: (u32, u32),
        /// What the kernels were compiled for.
        architectures: String,
    },
    /// The driver works and sees no GPU.
    #[error("the NVIDIA driver sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice,
    /// No GPU has this ordinal.
    #[error("GPU {ordinal} does not exist; the driver sees {count}")]
    NoSuchDevice {
        /// What was asked for.
        ordinal: u32,
        /// Number of GPUs.
        count: u32,
    },
    /// A call of the CUDA driver failed.
    #[error("GPU: {call}: {meaning} (CUDA error {code})")]
    Driver {
        /// Function of the driver.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// What the code stands for.
        meaning: &'static str,
    },
    /// Device memory does not suffice.
    #[error(
        "GPU {ordinal}: {what} needs {} MiB of device memory and {} of {} MiB are free",
        bytes.div_ceil(1 << 20), free >> 20, total >> 20
    )]
    OutOfMemory {
        /// The GPU.
        ordinal: u32,
        /// What the memory is for.
        what: String,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes free at that time.
        free: u64,
        /// Bytes of the GPU.
        total: u64,
    },
    /// Device memory does not suffice for something whose size only the driver knows.
    #[error(
        "GPU {ordinal}: {what} needs more device memory than the {} of {} MiB that are free",
        free >> 20, total >> 20
    )]
    OutOfDriverMemory {
        /// The GPU.
        ordinal: u32,
        /// What the memory is for.
        what: String,
        /// Bytes free at that time.
        free: u64,
        /// Bytes of the GPU.
        total: u64,
    },
    /// The system lets no more host memory be pinned for copies to and from a GPU.
    #[error("{} MiB of host memory could not be pinned for copies to and from the GPU", bytes.div_ceil(1 << 20))]
    OutOfPinnedMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// A GPU kernel could not be loaded or launched.
    #[error("GPU kernel {kernel}: {problem}")]
    Kernel {
        /// `module::entry`, or the module alone.
        kernel: String,
        /// What happened.
        problem: String,
    },
    /// A GPU kernel left its outputs: a bug of the kernel.
    #[error("{ops}: {what}")]
    Stray {
        /// Names of the ops that ran.
        ops: String,
        /// What was found changed.
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
    /// A matrix in device memory where the host computes.
    pub(crate) fn not_on_host(op: &'static str) -> Self {
        Self::argument(format!("{op}.matrix"), "host memory", "device memory")
    }

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
