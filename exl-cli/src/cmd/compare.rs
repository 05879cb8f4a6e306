//! `exl compare`: where two models disagree.

mod passages;
mod plot;

use crate::args::CompareArgs;
use crate::failure;
use crate::rows::{self, From};
use crate::session;
use crate::signal;
use crate::ui::{self, Align, Table, Ui};
use anyhow::{Context, Result};
use exl_gen::Tokenizer;
use exl_models::{LoadOptions, ModelSource};
use exl_quant::{CompareOptions, Comparison, builtin, compare};
use passages::Passage;
use serde::Serialize;

/// Rows of the built-in text when the user does not say.
const BUILTIN_ROWS: usize = 8;
/// Tokens per row of the built-in text when the user does not say.
const BUILTIN_LENGTH: usize = 2048;

#[derive(Serialize)]
struct Report {
    a: String,
    b: String,
    rows: usize,
    length: usize,
    kl: f64,
    kl_p99: f64,
    kl_max: f64,
    /// Share of positions where the two find different tokens likeliest.
    top1_disagreement: f64,
    ppl_a: f64,
    ppl_b: f64,
    /// Relative difference of the hidden states after the embedding and after each layer.
    layers: Vec<f64>,
    worst: Vec<Passage>,
    /// `[rows][positions]`.
    token_kl: Vec<Vec<f32>>,
}

pub(crate) fn run(args: &CompareArgs, ui: &Ui) -> Result<()> {
    let stop = signal::stop_flag()?;
    let load = LoadOptions {
        assume_llama: args.load.assume_llama,
        threads: session::threads(&args.device),
        ..LoadOptions::default()
    };
    let source = session::open(&args.a, &load, ui)?;
    // The files of B are opened where they are compared; what they have to remark is said first.
    drop(session::open(&args.b, &load, ui)?);
    let rows = rows(args, &source, ui)?;
    let options = CompareOptions {
        a: args.a.clone(),
        b: args.b.clone(),
        load,
        threads: session::threads(&args.device),
        gpu: session::gpu(args.device.device, ui)?,
    };
    let mut progress = ui.steps("comparing", 0);
    let found = compare(
        &options,
        &rows,
        &mut |done, total| progress.set_of(done, total),
        &stop.shared(),
    );
    drop(progress);
    let found = failure::finished(found, "the comparison")?;
    let report = report(args, &source, (&rows, &found))?;
    if let Some(path) = &args.plot {
        let picture = plot::svg(&report)?;
        exl_format::write_file_atomic(path, picture)
            .with_context(|| format!("--plot {}", path.display()))?;
        ui.note(&format!("the plot is in {}", path.display()));
    }
    if args.json {
        return ui::print_json(&report);
    }
    ui::print(&text(&report))?;
    Ok(())
}

/// The tokens both models read.
fn rows(args: &CompareArgs, source: &ModelSource, ui: &Ui) -> Result<Vec<Vec<u32>>> {
    if args.tokens.is_some() || args.text.is_some() {
        let from = From {
            tokens: args.tokens.as_deref(),
            text: args.text.as_deref(),
            rows: args.rows,
            length: args.length,
        };
        return rows::rows(&from, source, ui);
    }
    let max = source.spec().max_context;
    let length = args.length.map_or(BUILTIN_LENGTH.min(max), |n| n as usize);
    let count = args.rows.map_or(BUILTIN_ROWS, |n| n as usize);
    let tokenizer = Tokenizer::open(source.files().dir())?;
    let encode = |text: &str| {
        let tokens = rows::encode(&tokenizer, text, source);
        tokens.map_err(|e| e.to_string())
    };
    Ok(builtin(&encode, None, count, length)?.rows)
}

fn report(
    args: &CompareArgs,
    source: &ModelSource,
    (rows, found): (&[Vec<u32>], &Comparison),
) -> Result<Report> {
    let kl: Vec<Vec<f32>> = found
        .rows
        .iter()
        .map(|row| row.iter().map(|p| p.kl).collect())
        .collect();
    let worst = match args.worst {
        0 => Vec::new(),
        count => {
            let tokenizer = Tokenizer::open(source.files().dir())
                .context("passages are shown as text (use --worst 0 without a tokenizer)")?;
            passages::worst(&tokenizer, rows, &found.rows, count as usize)
        }
    };
    let score = &found.score;
    Ok(Report {
        a: args.a.display().to_string(),
        b: args.b.display().to_string(),
        rows: rows.len(),
        length: rows.first().map_or(0, Vec::len),
        kl: score.mean_kl(),
        kl_p99: score.p99_kl(),
        kl_max: f64::from(kl.iter().flatten().copied().fold(0.0, f32::max)),
        top1_disagreement: 1.0 - score.top1(),
        ppl_a: score.reference_perplexity(),
        ppl_b: score.perplexity(),
        layers: found.layers.clone(),
        worst,
        token_kl: kl,
    })
}

fn text(r: &Report) -> String {
    let mut table = Table::new(&[("B against A", Align::Left), ("", Align::Right)]);
    for (name, value) in [
        ("compared", format!("{} rows of {}", r.rows, r.length)),
        ("KL divergence of B from A", format!("{:.6}", r.kl)),
        ("99th percentile", format!("{:.5}", r.kl_p99)),
        ("largest", format!("{:.4}", r.kl_max)),
        (
            "other top token",
            format!("{:.2}%", 100.0 * r.top1_disagreement),
        ),
        ("perplexity of A", format!("{:.4}", r.ppl_a)),
        ("perplexity of B", format!("{:.4}", r.ppl_b)),
    ] {
        table.row([name.to_owned(), value]);
    }
    let mut out = table.render();
    out.push('\n');
    out.push_str(&layers(r).render());
    if r.kl_max == 0.0 {
        out.push_str("\nThe two predict the same everywhere.\n");
    }
    for passage in &r.worst {
        out.push('\n');
        out.push_str(&passage.text());
    }
    out
}

fn layers(r: &Report) -> Table {
    let mut table = Table::new(&[
        ("hidden states after", Align::Left),
        ("difference", Align::Right),
        ("", Align::Left),
    ]);
    let most = r.layers.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    for (at, &distance) in r.layers.iter().enumerate() {
        let name = match at {
            0 => "embedding".to_owned(),
            n => format!("layer {}", n - 1),
        };
        let bar = ui::bar(distance / most, 24);
        table.row([name, format!("{:.3}%", 100.0 * distance), bar]);
    }
    if r.layers.is_empty() {
        table.row([
            "the models differ in width or depth".to_owned(),
            "-".to_owned(),
        ]);
    }
    table
}
