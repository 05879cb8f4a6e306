//! Runs the `exl` program as a user would.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_input;
mod bench;
mod chat;
mod convert;
mod demo;
mod help;
mod lora;
mod pull;
mod sampling;
mod support;
mod tokenizers;
mod usage;
