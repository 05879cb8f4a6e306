//! `cargo xtask fuzz`.

use crate::flags;
use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

const DEFAULT_SECONDS: u32 = 60;
const TARGETS: &str = "exl-format/fuzz/fuzz_targets";

/// Runs one fuzz target for a while; a crash is an error and leaves its input behind.
pub(crate) fn run(sh: &Shell, flags: &flags::Fuzz) -> Result<()> {
    let name = &flags.name;
    let targets = targets(sh)?;
    if !targets.contains(name) {
        bail!("no fuzz target {name:?}; there are: {}", targets.join(", "));
    }
    let missing = cmd!(sh, "cargo fuzz --version")
        .quiet()
        .ignore_stdout()
        .ignore_stderr()
        .run()
        .is_err();
    if missing {
        bail!("cargo-fuzz is not installed; run: cargo install cargo-fuzz --locked");
    }
    let limit = format!(
        "-max_total_time={}",
        flags.seconds.unwrap_or(DEFAULT_SECONDS)
    );
    let _dir = sh.push_dir("exl-format");
    // `cargo run` names its own toolchain in the environment; the fuzzer needs another one.
    cmd!(sh, "rustup run nightly cargo fuzz run {name} -- {limit}")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .run()?;
    Ok(())
}

fn targets(sh: &Shell) -> Result<Vec<String>> {
    let mut names: Vec<String> = sh
        .read_dir(TARGETS)
        .with_context(|| format!("cannot list the fuzz targets in {TARGETS}"))?
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}
