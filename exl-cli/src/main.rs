//! The `exl` command: quantize, judge, run and inspect EXL2 language models.
#![forbid(unsafe_code)]

mod answer;
mod args;
mod calibration;
mod cmd;
mod failure;
mod grammar;
mod guessing;
mod hub;
mod machine;
mod memory;
mod rows;
mod sampling;
mod session;
mod signal;
mod synth;
mod ui;

use std::process::ExitCode;

fn main() -> ExitCode {
    failure::install_panic_hook();
    failure::guard(cmd::run)
}
