//! Tests on whole models: against transformers, of plans, of damaged directories.

mod bad_input;
mod common;
mod golden;
mod greedy;
mod plans;
