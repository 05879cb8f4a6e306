//! The command line of `cargo xtask`.
#![allow(missing_docs, unreachable_pub, reason = "the structs are generated")]

use std::ffi::OsString;
use std::path::PathBuf;

xflags::xflags! {
    /// Tasks of the exl workspace.
    cmd xtask {
        /// Run every test, doc tests included (with cargo-nextest when it is installed).
        cmd test {
            /// Passed on to the test runner; put them after `--`, as in `-- -p exl-format`.
            repeated args: OsString
        }

        /// Build `exl`, quantize the bundled model, compare it with its original, let it speak.
        cmd demo {}

        /// Check the rules of the repository that no compiler checks.
        cmd tidy {}

        /// Run a fuzz target of exl-format (needs cargo-fuzz and a nightly toolchain).
        cmd fuzz {
            /// Name of the target: a file of exl-format/fuzz/fuzz_targets.
            required name: String
            /// How long to run (default: 60).
            optional --seconds seconds: u32
        }

        /// Compile the CUDA kernels into target/kernels/exl.pack, which exl-kernels embeds.
        cmd kernels {
            /// Only for these architectures, as in sm_90a,sm_120 (default: all).
            optional --arch list: String
            /// Compile and check, without writing the pack.
            optional --check
            /// How many to compile at a time (default: one per core).
            optional --jobs jobs: usize
            /// Print what was made as JSON.
            optional --json
            /// Print registers and spills of every kernel.
            optional -v, --verbose
        }

        /// Measure: the benches of the workspace, and whole models with random weights, in one report.
        cmd bench {
            /// As in `exl bench --device` (default: a GPU if there is one).
            optional --device name: String
            /// Models to measure, as in tinyllama-1.1b:4.0,llama2-7b:2.5 (default: tinyllama-1.1b:4.0).
            optional --shapes list: String
            /// Leave out the benches of single parts, which take minutes.
            optional --only-models
            /// Where the report goes (default: target/bench).
            optional --out folder: PathBuf
        }

        /// Make a folder that tests and measures exl on a GPU machine without cargo.
        cmd bundle {
            /// Where to put it (default: target/bundle).
            optional --out folder: PathBuf
        }

        /// Compute the golden fixtures of exl-models anew, with PyTorch and transformers from PyPI.
        cmd golden {
            /// Only these, as in `olmo3 arcee` (default: every case and the extras).
            repeated cases: String
        }
    }
}
