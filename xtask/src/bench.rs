//! `cargo xtask bench`: everything that is measured, in one report.

use crate::{flags, kernels};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

const DEFAULT_OUT: &str = "target/bench";
/// Packages and their benches.
const BENCHES: [(&str, &str); 3] = [
    ("exl-kernels", "qgemm"),
    ("exl-quant", "quantizer"),
    ("exl-quant", "gpu_quantizer"),
];
const DEFAULT_MODELS: &str = "tinyllama-1.1b:4.0";
const PROMPTS: &str = "512,2048";
const BATCHES: &str = "1,8";
const CONTEXTS: &str = "0,2000";

/// Builds, measures, and writes the report with its plots.
pub(crate) fn run(sh: &Shell, flags: &flags::Bench) -> Result<()> {
    let models = models(flags.shapes.as_deref().unwrap_or(DEFAULT_MODELS))?;
    let out = flags.out.clone().unwrap_or_else(|| DEFAULT_OUT.into());
    let out = sh.current_dir().join(out);
    sh.create_dir(&out)?;
    kernels::run_for_this_machine(sh)?;
    println!("Building exl (the first time takes minutes)");
    cmd!(sh, "cargo build --release --locked --package exl-cli").run()?;
    let target = sh
        .var_os("CARGO_TARGET_DIR")
        .map_or_else(|| "target".into(), PathBuf::from);
    let target = sh.current_dir().join(target);
    let exl = target
        .join("release")
        .join(format!("exl{}", std::env::consts::EXE_SUFFIX));

    let mut report = "# Benchmarks\n".to_owned();
    for (shape, recipe) in &models {
        let name = format!("{shape}-{recipe}");
        let (text, plot) = (
            out.join(format!("{name}.md")),
            out.join(format!("{name}.svg")),
        );
        let device = flags.device.as_deref().unwrap_or("auto");
        cmd!(sh, "{exl} bench --synthetic {shape} --recipe {recipe}")
            .args([
                "--prefill",
                PROMPTS,
                "--batch",
                BATCHES,
                "--context",
                CONTEXTS,
            ])
            .args(["--device", device, "--profile", "--out"])
            .arg(&text)
            .arg("--plot")
            .arg(&plot)
            .run()?;
        let measured = sh.read_file(&text)?;
        sh.remove_path(&text)?;
        // One level below the report's own heading.
        report.push_str(&measured.replace("\n#", "\n##").replacen("# ", "\n## ", 1));
        write!(report, "\n![speed of {name}]({name}.svg)\n")?;
    }
    if !flags.only_models {
        for (package, bench) in BENCHES {
            cmd!(
                sh,
                "cargo bench --locked --package {package} --bench {bench}"
            )
            .run()?;
        }
        let parts = parts(&target.join("criterion"))?;
        write!(report, "\n## Parts\n\n{}", table(&parts))?;
    }
    let file = out.join("report.md");
    sh.write_file(&file, &report)?;
    println!("{}", file.display());
    Ok(())
}

/// Shapes with their recipes.
fn models(list: &str) -> Result<Vec<(&str, &str)>> {
    let pair = |item| match str::split_once(item, ':') {
        Some(pair) => Ok(pair),
        None => bail!("--shapes {item}: write a shape and its bits, as in {DEFAULT_MODELS}"),
    };
    list.split(',').map(pair).collect()
}

/// One bench of criterion.
#[derive(Debug, PartialEq)]
struct Part {
    name: String,
    /// Mean time of a run and half of its 95% interval, nanoseconds.
    mean: f64,
    spread: f64,
    /// Work of a run and its unit.
    work: Option<(f64, &'static str)>,
}

/// What criterion left below a folder, by name.
fn parts(root: &Path) -> Result<Vec<Part>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let list = std::fs::read_dir(&folder)
            .with_context(|| format!("{}: no results of criterion", folder.display()))?;
        for entry in list {
            let path = entry?.path();
            if !path.is_dir() {
                continue;
            }
            let files = [path.join("benchmark.json"), path.join("estimates.json")];
            if path.ends_with("new") && files.iter().all(|file| file.is_file()) {
                found.push(part(&json(&files[0])?, &json(&files[1])?)?);
            } else {
                folders.push(path);
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn json(path: &Path) -> Result<Value> {
    let read = || -> Result<Value> { Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?) };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn part(about: &Value, estimates: &Value) -> Result<Part> {
    let mean = &estimates["mean"];
    let number = |value: &Value| value.as_f64().context("an estimate without a number");
    let interval = &mean["confidence_interval"];
    let [low, high] = ["lower_bound", "upper_bound"].map(|bound| number(&interval[bound]));
    let work = |unit: &str| about["throughput"][unit].as_f64();
    Ok(Part {
        name: about["full_id"]
            .as_str()
            .context("a bench without a name")?
            .to_owned(),
        mean: number(&mean["point_estimate"])?,
        spread: (high? - low?) / 2.0,
        work: work("Bytes")
            .map(|n| (n, "B/s"))
            .or(work("Elements").map(|n| (n, "elements/s"))),
    })
}

fn table(parts: &[Part]) -> String {
    let mut text = "| bench | ms | +- | rate |\n|---|---:|---:|---:|\n".to_owned();
    for part in parts {
        let rate = part.work.map_or(String::new(), |(work, unit)| {
            let rate = work / part.mean;
            format!("{rate:.2} G{unit}")
        });
        let (ms, spread) = (part.mean / 1e6, part.spread / part.mean * 100.0);
        text.push_str(&format!(
            "| {} | {ms:.3} | {spread:.0}% | {rate} |\n",
            part.name
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn shapes_come_with_their_bits() {
        let list = models("tinyllama-1.1b:4.0,llama2-7b:2.5").unwrap();
        assert_eq!(list, [("tinyllama-1.1b", "4.0"), ("llama2-7b", "2.5")]);
        let error = models("tinyllama-1.1b").unwrap_err().to_string();
        assert!(
            error.starts_with("--shapes tinyllama-1.1b: write a shape"),
            "{error}"
        );
    }

    #[test]
    fn a_bench_is_a_row() {
        let about = json!({"full_id": "linear/4b", "throughput": {"Bytes": 3_000_000}});
        let interval = json!({"lower_bound": 0.9e6, "upper_bound": 1.1e6});
        let estimates = json!({"mean": {"point_estimate": 1e6, "confidence_interval": interval}});
        let part = part(&about, &estimates).unwrap();
        assert_eq!(
            table(&[part]).lines().last().unwrap(),
            "| linear/4b | 1.000 | 10% | 3.00 GB/s |"
        );
    }
}
