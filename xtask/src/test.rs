//! `cargo xtask test`.

use crate::{flags, kernels};
use anyhow::Result;
use std::ffi::OsString;
use xshell::{Shell, cmd};

/// Runs unit, integration and doc tests of the whole workspace, or of the packages asked for.
pub(crate) fn run(sh: &Shell, flags: &flags::Test) -> Result<()> {
    kernels::run_for_this_machine(sh)?;
    let args = &flags.args;
    let mut scope: Vec<OsString> = vec!["--locked".into()];
    if !selects_packages(args) {
        scope.push("--workspace".into());
    }
    if has_nextest(sh) {
        let scope = &scope;
        cmd!(sh, "cargo nextest run {scope...} --no-tests pass {args...}").run()?;
        if args.is_empty() {
            // Nextest does not know doc tests.
            cmd!(sh, "cargo test {scope...} --doc").run()?;
        } else {
            eprintln!("doc tests run only without extra arguments: cargo test --doc -p CRATE");
        }
    } else {
        cmd!(sh, "cargo test {scope...} {args...}").run()?;
    }
    Ok(())
}

fn has_nextest(sh: &Shell) -> bool {
    cmd!(sh, "cargo nextest --version")
        .quiet()
        .ignore_stdout()
        .ignore_stderr()
        .run()
        .is_ok()
}

fn selects_packages(args: &[OsString]) -> bool {
    args.iter().any(|arg| {
        let arg = arg.to_string_lossy();
        arg == "--workspace" || arg.starts_with("--package") || arg.starts_with("-p")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_selection_replaces_the_whole_workspace() {
        let selects = |line: &str| {
            let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            selects_packages(&args)
        };
        assert!(selects("-p exl-format"));
        assert!(selects("--package=exl-format"));
        assert!(selects("--workspace"));
        assert!(!selects("some_test --no-fail-fast"));
        assert!(!selects(""));
    }
}
