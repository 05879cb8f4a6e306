//! The commands, one file each.

mod bench;
mod chat;
mod compare;
mod convert;
mod doctor;
mod eval;
mod generate;
mod info;
mod pages;
mod pull;

use crate::args::{Cli, Command, exllama_short_flags};
use crate::ui::Ui;
use anyhow::Result;
use clap::Parser;
use std::io::IsTerminal;

/// Reads the command line and does what it says.
pub(crate) fn run() -> Result<()> {
    let cli = Cli::parse_from(exllama_short_flags(std::env::args_os()));
    init_tracing(cli.verbose, cli.quiet);
    let ui = Ui::new(cli.quiet);
    match cli.command {
        Command::Convert(args) => convert::run(&args, &ui),
        Command::Eval(args) => eval::run(&args, &ui),
        Command::Compare(args) => compare::run(&args, &ui),
        Command::Generate(args) => generate::run(&args, &ui),
        Command::Chat(args) => chat::run(&args, &ui),
        Command::Info(args) => info::run(&args, &ui),
        Command::Bench(args) => bench::run(&args, &ui),
        Command::Doctor(args) => doctor::run(&args, &ui),
        Command::Pull(args) => pull::run(&args, &ui),
        Command::Completions(args) => pages::completions(&args),
        Command::Man(_) => pages::man(),
    }
}

/// Warnings of the libraries go to stderr; -v and -vv or EXL_LOG show more.
fn init_tracing(verbose: u8, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("EXL_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal() && !plain)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}
