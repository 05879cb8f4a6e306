//! The measurements as text and as Markdown.

use super::Report;
use crate::machine;
use crate::ui::{self, Align, Table};

/// For a terminal.
pub(super) fn text(report: &Report) -> String {
    let mut text = facts(report)
        .iter()
        .map(|(k, v)| format!("{k:<16}{v}\n"))
        .collect::<String>();
    for table in [prefill(report), decode(report), jobs(report)]
        .into_iter()
        .flatten()
    {
        text.push('\n');
        text.push_str(&table.render());
    }
    for profile in &report.profiles {
        text.push_str(&format!("\n{}\n{}", profile.step, profile.table().render()));
    }
    text
}

/// For a file.
pub(super) fn markdown(report: &Report) -> String {
    let mut text = format!("# Speed of {}\n\n", report.model);
    for (key, value) in facts(report).iter().skip(1) {
        text.push_str(&format!("- {key}: {value}\n"));
    }
    let titles = ["## Prefill", "## Decode", "## Jobs"];
    let tables = [prefill(report), decode(report), jobs(report)];
    for (title, table) in titles.iter().zip(tables) {
        if let Some(table) = table {
            text.push_str(&format!("\n{title}\n\n{}", table.markdown()));
        }
    }
    for profile in &report.profiles {
        let (step, table) = (&profile.step, profile.table().markdown());
        text.push_str(&format!("\n## Parts of a step: {step}\n\n{table}"));
    }
    text
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let resident = format!(
        "{} resident, {} at most",
        ui::bytes(report.memory_bytes),
        ui::bytes(report.memory_peak_bytes)
    );
    let cache = ui::bytes(report.cache_bytes);
    let memory = match &report.gpu_memory {
        Some(gpu) => format!(
            "{} on the GPU, {cache} of it cache; {resident}",
            ui::bytes(gpu.taken_bytes)
        ),
        None => format!("{resident}, {cache} of it cache"),
    };
    let mut settings = format!(
        "{} threads, activations {}, cache {}",
        report.threads, report.activations, report.cache
    );
    if report.deterministic {
        settings.push_str(", deterministic");
    }
    let mut facts = vec![
        ("model", report.model.clone()),
        (
            "device",
            format!("{} ({})", report.device, machine::processor()),
        ),
        ("settings", settings),
        (
            "weights",
            format!("{} read per step", ui::bytes(report.weight_bytes)),
        ),
        ("checkpoint", ui::bytes(report.checkpoint_bytes)),
        (
            "read bandwidth",
            format!("{:.1} GB/s measured", report.read_bandwidth_gb_s),
        ),
        ("loading", format!("{:.1} s", report.load_seconds)),
        ("memory", memory),
    ];
    if let Some(gpu) = &report.gpu_memory {
        facts.push(("device memory", gpu.text()));
    }
    facts
}

fn prefill(report: &Report) -> Option<Table> {
    let mut table = Table::new(&[("prefill tokens", Align::Right), ("tok/s", Align::Right)]);
    for row in &report.prefill {
        table.row([row.tokens.to_string(), format!("{:.1}", row.tok_s)]);
    }
    (!report.prefill.is_empty()).then_some(table)
}

fn decode(report: &Report) -> Option<Table> {
    let names = [
        "batch",
        "context",
        "tok/s",
        "ms/step",
        "GB/s",
        "of bandwidth",
        "launches",
    ];
    let mut table = Table::new(&names.map(|name| (name, Align::Right)));
    for row in &report.decode {
        table.row([
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.1}", row.tok_s),
            format!("{:.2}", row.ms_per_step),
            format!("{:.1}", row.gb_s),
            format!("{:.0}%", row.roofline * 100.0),
            row.launches.to_string(),
        ]);
    }
    (!report.decode.is_empty()).then_some(table)
}

fn jobs(report: &Report) -> Option<Table> {
    let names = ["jobs", "context", "tok/s", "of bare steps"];
    let mut table = Table::new(&names.map(|name| (name, Align::Right)));
    for row in &report.jobs {
        table.row([
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.1}", row.tok_s),
            format!("{:.1}%", row.share * 100.0),
        ]);
    }
    (!report.jobs.is_empty()).then_some(table)
}
