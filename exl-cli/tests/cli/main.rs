//! Runs the `exl` program as a user would.

mod bad_input;
mod bench;
mod chat;
mod convert;
mod demo;
mod help;
mod pull;
mod support;
mod usage;
