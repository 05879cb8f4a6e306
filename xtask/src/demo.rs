//! `cargo xtask demo`: quantize, judge, speak.

mod json;

use crate::kernels;
use anyhow::{Context, Result};
use json::number;
use std::io::Write;
use std::time::Instant;
use xshell::{Shell, cmd};

const MODEL: &str = "testdata/demo-4m";
const TEXT: &str = "testdata/demo-eval.txt";
const BITS: &str = "4.0";
const OUT: &str = "target/demo/demo-4m-4.0bpw";
/// What fits the demo's two minutes on two cores; the model was trained on rows of this length.
const CALIBRATION_ROWS: &str = "100";
const EVALUATION_ROWS: &str = "24";
const ROW_TOKENS: &str = "512";
const PROMPT: &str = "\"Where have you been?\" said the captain.";
const NEW_TOKENS: &str = "160";
const TEMPERATURE: &str = "0.8";
const MIN_P: &str = "0.05";
const SEED: &str = "3";

/// Builds `exl` and runs it the way a user would, printing each command before it runs.
pub(crate) fn run(sh: &Shell) -> Result<()> {
    kernels::run_for_this_machine(sh)?;
    println!("Building exl (the first time takes minutes)");
    cmd!(sh, "cargo build --release --locked --package exl-cli").run()?;
    let target = sh
        .var_os("CARGO_TARGET_DIR")
        .map_or_else(|| "target".into(), std::path::PathBuf::from);
    let exl = target
        .join("release")
        .join(format!("exl{}", std::env::consts::EXE_SUFFIX));

    let start = Instant::now();
    sh.remove_path("target/demo")?;
    sh.create_dir("target/demo")?;
    println!("\n1. Quantize a small trained Llama to {BITS} bits per weight\n");
    cmd!(sh, "{exl} convert {MODEL} --out {OUT} --bits {BITS}")
        .args(["--rows", CALIBRATION_ROWS, "--length", ROW_TOKENS])
        .run()?;

    println!("\n2. Judge it against its original on a novel it has not seen\n");
    let before = judge(sh, &exl, MODEL, None)?;
    let after = judge(sh, &exl, OUT, Some(MODEL))?;
    print!("{}", table(&before, &after));

    println!("\n3. Let the quantized model speak\n");
    let generate = cmd!(sh, "{exl} generate -q -m {OUT} -p {PROMPT} -n {NEW_TOKENS}")
        .args(["--temperature", TEMPERATURE, "--min-p", MIN_P])
        .args(["--seed", SEED]);
    // The text continues the prompt, so nothing may come between the two.
    println!("$ {generate}\n");
    print!("{PROMPT}");
    std::io::stdout().flush()?;
    generate.quiet().run()?;
    println!(
        "\nThat took {:.0} s after the build. The quantized model is in {OUT}; give it a text of \
         your own with\n  {} generate -m {OUT} -p \"It was a dark night\"",
        start.elapsed().as_secs_f64(),
        exl.display()
    );
    Ok(())
}

/// What `exl eval` says of one model.
#[derive(Debug, PartialEq)]
struct Verdict {
    bytes: f64,
    bpw: f64,
    ppl: f64,
    /// KL divergence from the reference in nats; none for the reference itself.
    kl: Option<f64>,
    /// Share of positions, 0 to 1, whose likeliest token is the reference's.
    top1: Option<f64>,
}

impl Verdict {
    fn read(json: &str) -> Result<Self> {
        let need = |key: &str| {
            number(json, key).with_context(|| format!("`exl eval --json` has no {key:?}: {json}"))
        };
        Ok(Self {
            bytes: need("bytes")?,
            bpw: need("bpw")?,
            ppl: need("ppl")?,
            kl: number(json, "kl"),
            top1: number(json, "top1"),
        })
    }
}

fn judge(
    sh: &Shell,
    exl: &std::path::Path,
    model: &str,
    reference: Option<&str>,
) -> Result<Verdict> {
    let mut command = cmd!(sh, "{exl} eval -q -m {model} --text {TEXT}").args([
        "--rows",
        EVALUATION_ROWS,
        "--length",
        ROW_TOKENS,
        "--json",
    ]);
    if let Some(reference) = reference {
        command = command.args(["--reference", reference]);
    }
    let json = command.read()?;
    Verdict::read(&json).with_context(|| format!("while judging {model}"))
}

fn table(before: &Verdict, after: &Verdict) -> String {
    let rows = [
        (
            "weights, bytes",
            grouped(before.bytes),
            grouped(after.bytes),
        ),
        (
            "bits per layer weight",
            format!("{:.2}", before.bpw),
            format!("{:.2}", after.bpw),
        ),
        (
            "perplexity",
            format!("{:.3}", before.ppl),
            format!("{:.3}", after.ppl),
        ),
        (
            "KL divergence, nats",
            "-".to_owned(),
            optional(after.kl, |v| format!("{v:.4}")),
        ),
        (
            "same top token",
            "-".to_owned(),
            optional(after.top1, |v| format!("{:.1} %", 100.0 * v)),
        ),
    ];
    let mut out = format!("{:<22}{:>14}{:>14}\n", "", "original", "EXL2");
    for (name, left, right) in rows {
        out.push_str(&format!("{name:<22}{left:>14}{right:>14}\n"));
    }
    out
}

fn optional(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

/// An integer with commas between thousands.
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"rows":24,"length":512,"ppl":27.5,"kl":0.0721,"kl_p99":0.5,
        "top1":0.8227,"bytes":3005312,"bpw":4.0,"head_bpw":6.0,"seconds":1.5}"#;

    #[test]
    fn a_verdict_is_read_from_json() {
        let verdict = Verdict::read(JSON).unwrap();
        assert_eq!(verdict.bytes, 3_005_312.0);
        assert_eq!(verdict.kl, Some(0.0721));
        assert_eq!(verdict.top1, Some(0.8227));
    }

    #[test]
    fn a_reference_has_no_distance_to_itself() {
        let verdict = Verdict::read(r#"{"ppl":2.0,"kl":null,"bytes":1,"bpw":16}"#).unwrap();
        assert_eq!((verdict.kl, verdict.top1), (None, None));
    }

    #[test]
    fn a_missing_number_is_named() {
        let error = Verdict::read(r#"{"bytes":1,"bpw":16}"#).unwrap_err();
        assert!(error.to_string().contains("\"ppl\""), "{error}");
    }

    #[test]
    fn the_table_has_both_columns() {
        let after = Verdict::read(JSON).unwrap();
        let before = Verdict::read(r#"{"ppl":25.667,"bytes":8004184,"bpw":16}"#).unwrap();
        let table = table(&before, &after);
        assert!(table.contains("     8,004,184     3,005,312"), "{table}");
        assert!(table.contains("82.3 %"), "{table}");
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(0.0), "0");
        assert_eq!(grouped(999.0), "999");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
    }
}
