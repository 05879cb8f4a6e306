//! The `exl` command.
fn main() {}
