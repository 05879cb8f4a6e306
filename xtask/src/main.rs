//! Workspace tasks: `cargo xtask --help`.
//!
//! Few small dependencies keep the first run short; avoid adding more.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a task runner talks on stdout")]

mod bench;
mod bundle;
mod demo;
mod flags;
mod fuzz;
mod golden;
mod kernels;
mod test;
mod tidy;

use anyhow::{Context, Result};
use flags::XtaskCmd;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use xshell::Shell;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let flags = match flags::Xtask::from_env() {
        Ok(flags) => flags,
        Err(help) if help.is_help() => {
            // Whoever reads may have had enough.
            let _ = writeln!(std::io::stdout(), "{help}");
            return Ok(());
        }
        Err(error) => error.exit(),
    };
    let sh = Shell::new()?;
    sh.change_dir(root()?);
    match flags.subcommand {
        XtaskCmd::Test(flags) => test::run(&sh, &flags),
        XtaskCmd::Demo(_) => demo::run(&sh),
        XtaskCmd::Tidy(_) => tidy::run(&root()?),
        XtaskCmd::Fuzz(flags) => fuzz::run(&sh, &flags),
        XtaskCmd::Golden(flags) => golden::run(&sh, &flags),
        XtaskCmd::Kernels(flags) => kernels::run(&sh, &flags),
        XtaskCmd::Bench(flags) => bench::run(&sh, &flags),
        XtaskCmd::Bundle(flags) => bundle::run(&sh, &flags),
    }
}

/// The workspace's folder. `cargo run` names the manifest's folder at run time, so a binary that
/// moved with its checkout still finds it.
fn root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    Ok(manifest
        .parent()
        .context("xtask's manifest has no parent folder")?
        .to_path_buf())
}
