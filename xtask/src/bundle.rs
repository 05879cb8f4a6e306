//! `cargo xtask bundle`: a folder that tests and measures `exl` on a GPU machine without cargo.

use crate::kernels;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

const DEFAULT_OUT: &str = "target/bundle";
const SCRIPT: &str = include_str!("bundle/run.sh");
/// Package, test binary and its name in the bundle: the GPU tests of kernels, models and engine.
const TEST: (&str, &str, &str) = ("exl-cli", "gpu", "gpu_tests");
/// What the tests look for, where they look for it.
const FILES: [&str; 2] = ["testdata/demo-4m", "testdata/demo-eval.txt"];
const GOLDEN: &str = "exl-models/tests/golden";
/// What goes through a slow line to a rented machine without a thought.
const MOST_BYTES: u64 = 60_000_000;

/// Compiles all kernels, builds what the bundle holds, and puts it into a folder.
pub(crate) fn run(sh: &Shell, flags: &crate::flags::Bundle) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "the bundle is for Linux and is made there"
    );
    let out = flags.out.clone().unwrap_or_else(|| DEFAULT_OUT.into());
    kernels::run_all(sh)?;
    println!("Building exl and its GPU tests (the first time takes minutes)");
    // The kernels travel once, beside the two programs.
    let target = sh
        .var_os("CARGO_TARGET_DIR")
        .map_or_else(|| "target".into(), PathBuf::from);
    let none = sh.current_dir().join(&target).join("kernels/none.pack");
    sh.write_file(&none, "")?;
    let _without = sh.push_env("EXL_KERNEL_PACK", &none);
    cmd!(sh, "cargo build --profile small --locked --package exl-cli").run()?;
    let (package, test, name) = TEST;
    let messages = cmd!(
        sh,
        "cargo test --profile small --locked --package {package}"
    )
    .args(["--test", test, "--no-run", "--message-format=json"])
    .read()?;
    let test = executable(&messages, test)?;

    // Made beside the old one, which goes only when this one is whole.
    let new = out.with_extension("new");
    sh.remove_path(&new)?;
    sh.create_dir(&new)?;
    for (file, name) in [(target.join("small/exl"), "exl"), (test, name)] {
        let to = new.join(name);
        cmd!(sh, "strip -o {to} {file}")
            .run()
            .context("`strip` comes with the C compiler's package (binutils)")?;
    }
    sh.copy_file(target.join("kernels/exl.pack"), new.join("kernels.pack"))?;
    for file in FILES {
        copy(sh, file.as_ref(), &new)?;
    }
    // Models alone, without what makes them.
    let made = |path: &Path| path.is_dir() && !path.ends_with("families");
    for model in sh.read_dir(GOLDEN)?.iter().filter(|path| made(path)) {
        let name = model.file_name().unwrap_or_default();
        copy(sh, &Path::new(GOLDEN).join(name), &new)?;
    }
    let script = new.join("run.sh");
    sh.write_file(&script, SCRIPT)?;
    cmd!(sh, "chmod +x {script}").run()?;
    let bytes = check_size(&files(&sh.current_dir().join(&new))?)?;
    sh.remove_path(&out)?;
    cmd!(sh, "mv {new} {out}").run()?;
    println!(
        "{}: {:.1} MB; copy it to a machine with an NVIDIA GPU and run\n  ./run.sh RESULTS",
        out.display(),
        bytes as f64 / 1e6
    );
    Ok(())
}

/// Copies a file or folder to the same place below another root.
fn copy(sh: &Shell, path: &Path, root: &Path) -> Result<()> {
    let folder = root.join(path.parent().unwrap_or(Path::new("")));
    sh.create_dir(&folder)?;
    Ok(cmd!(sh, "cp -r {path} {folder}").run()?)
}

/// Where cargo's messages say that a test binary lies.
fn executable(messages: &str, name: &str) -> Result<PathBuf> {
    let target = format!("\"name\":\"{name}\"");
    let path = messages
        .lines()
        .filter(|line| line.contains(&target))
        .find_map(|line| {
            let (_, rest) = line.split_once("\"executable\":\"")?;
            Some(rest.split_once('"')?.0)
        });
    let path = path.with_context(|| format!("cargo built no test binary {name}"))?;
    ensure!(
        !path.contains('\\'),
        "a path with a character that JSON escapes: {path}"
    );
    Ok(path.into())
}

/// All files under a folder, and their bytes.
fn files(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        let data = entry.metadata()?;
        match data.is_dir() {
            true => found.extend(files(&entry.path())?),
            false => found.push((entry.path(), data.len())),
        }
    }
    Ok(found)
}

/// The sum, or an error that names the largest file when it is too much.
fn check_size(files: &[(PathBuf, u64)]) -> Result<u64> {
    let all = files.iter().map(|f| f.1).sum();
    let largest = files.iter().max_by_key(|f| f.1);
    if all > MOST_BYTES
        && let Some((path, bytes)) = largest
    {
        bail!(
            "the bundle has {all} bytes, more than {MOST_BYTES}; the largest file is {} with {bytes}",
            path.display()
        );
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_binary_is_found_among_messages() {
        let messages = concat!(
            "{\"target\":{\"name\":\"other\"},\"executable\":\"/a/other-1\"}\n",
            "{\"target\":{\"name\":\"gpu\"},\"executable\":null}\n",
            "{\"target\":{\"name\":\"gpu\"},\"executable\":\"/a/gpu-2\",\"fresh\":true}\n",
        );
        assert_eq!(executable(messages, "gpu").unwrap(), Path::new("/a/gpu-2"));
        let error = executable(messages, "cpu").unwrap_err().to_string();
        assert!(error.contains("cpu"), "{error}");
    }

    #[test]
    fn a_bundle_that_is_too_large_names_its_largest_file() {
        let small = [("a".into(), 10), ("b".into(), 20)];
        assert_eq!(check_size(&small).unwrap(), 30);
        let large = [("a".into(), 10), ("b".into(), MOST_BYTES)];
        let error = check_size(&large).unwrap_err().to_string();
        assert!(error.contains("is b with"), "{error}");
    }

    /// What no family of the sanitizer names is not looked at.
    #[test]
    fn the_script_names_every_op() {
        let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("../exl-kernels/src/ops.rs");
        let source = std::fs::read_to_string(ops).unwrap();
        let names: Vec<&str> = source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Op::")?.split_once("=> \""))
            .filter_map(|(_, rest)| Some(rest.split_once('"')?.0))
            .collect();
        assert!(names.len() > 10, "{names:?}");
        let (_, families) = SCRIPT.split_once("<<FAMILIES\n").unwrap();
        let (families, _) = families.split_once("\nFAMILIES").unwrap();
        let listed: Vec<&str> = families
            .lines()
            .flat_map(|line| line.split_once(' ').unwrap().1.split(','))
            .collect();
        for name in names {
            assert!(listed.contains(&name), "{name} is in no family");
        }
    }

    /// A driver that works is not enough: this GPU is too old for every kernel.
    #[test]
    fn the_script_ends_where_no_gpu_is_usable() {
        let sh = Shell::new().unwrap();
        let dir = sh.create_temp_dir().unwrap();
        let (script, exl) = (dir.path().join("run.sh"), dir.path().join("exl"));
        let doctor = r#"{"gpu":{"devices":[{"name":"T4","usable":false}],"problem":null}}"#;
        sh.write_file(&script, SCRIPT).unwrap();
        sh.write_file(&exl, format!("#!/bin/sh\necho '{doctor}'\n"))
            .unwrap();
        let results = dir.path().join("results");
        let run = cmd!(sh, "sh {script} {results}").quiet().ignore_status();
        cmd!(sh, "chmod +x {exl}").quiet().run().unwrap();
        let output = run.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("no GPU that exl can use"), "{said}");
        let summary = sh.read_file(results.join("summary.json")).unwrap();
        assert_eq!(summary.matches("\"step\"").count(), 1, "{summary}");
    }

    #[test]
    fn the_script_is_one_that_sh_reads() {
        let sh = Shell::new().unwrap();
        cmd!(sh, "sh -n").stdin(SCRIPT).quiet().run().unwrap();
    }
}
