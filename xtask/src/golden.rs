//! `cargo xtask golden`.

use crate::flags;
use anyhow::{Result, bail};
use xshell::{Shell, cmd};

const VENV: &str = "target/golden-venv";
const SCRIPTS: &str = "exl-models/tests/golden";
/// Pinned, so that the fixtures can be made again bit for bit on the same machine.
const PACKAGES: [&str; 5] = [
    "torch==2.15.0",
    "transformers==4.57.1",
    "numpy==2.4.6",
    "safetensors==0.8.0",
    "peft==0.21.2",
];

/// Runs the scripts that compute golden fixtures, in an environment of their own; or only the one
/// that knows cases by name, for the cases asked for.
pub(crate) fn run(sh: &Shell, flags: &flags::Golden) -> Result<()> {
    let python = format!("{VENV}/bin/python");
    if !sh.path_exists(&python) {
        cmd!(sh, "python3 -m venv {VENV}").run()?;
    }
    cmd!(sh, "{python} -m pip install --quiet")
        .args(PACKAGES)
        .run()?;
    let cases = &flags.cases;
    if !cases.is_empty() {
        cmd!(sh, "{python} {SCRIPTS}/make.py {cases...}").run()?;
        return Ok(());
    }
    let mut ran = 0;
    for path in sh.read_dir(SCRIPTS)? {
        if path.extension().is_some_and(|e| e == "py") {
            cmd!(sh, "{python} {path}").run()?;
            ran += 1;
        }
    }
    if ran == 0 {
        bail!("no script in {SCRIPTS}");
    }
    println!("{ran} script(s) ran; `git diff --stat` shows what changed");
    Ok(())
}
