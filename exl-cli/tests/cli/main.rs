//! Runs the `exl` program as a user would.

mod help;
mod pull;
mod support;
mod usage;
