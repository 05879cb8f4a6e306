//! Tests on whole models: against transformers, of plans, of damaged directories.
#![allow(clippy::unwrap_used)] // helpers of tests count as no tests for the lint

mod axes;
mod bad_input;
mod centers;
mod common;
mod drawn;
mod extras;
mod golden;
mod gpu;
mod greedy;
mod plans;
mod quantized;
mod windows;
