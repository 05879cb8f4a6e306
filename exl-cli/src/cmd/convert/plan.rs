//! `exl convert --plan` and `--fit`: sizes before anything is quantized.

use crate::args::{ConvertArgs, Fit};
use crate::memory;
use crate::session::{self, Room};
use crate::ui::{self, Align, Table, Ui};
use anyhow::{Context, Result, bail};
use exl_models::{ModelSource, memory_for};
use exl_quant::{PlanPoint, bits_within};
use serde::Serialize;
use std::path::Path;

/// Scratch memory of kernels on any GPU, about: prompts expand so much of a matrix at a time.
const EXPANDED_BYTES: u64 = 192 << 20;

#[derive(Serialize)]
struct Output<'a> {
    source: &'a Path,
    points: &'a [PlanPoint],
}

/// Prints the frontier.
pub(super) fn print(args: &ConvertArgs, points: &[PlanPoint]) -> Result<()> {
    if args.json {
        return ui::print_json(&Output {
            source: &args.source,
            points,
        });
    }
    let names = ["bits", "layers", "head", "weights", "predicted KL"];
    let columns: Vec<(&str, Align)> = names.map(|name| (name, Align::Right)).to_vec();
    let mut table = Table::new(&columns);
    for p in points {
        table.row([
            format!("{:?}", p.bits),
            format!("{:.3}", p.bits_per_weight),
            format!("{:.3}", p.head_bits_per_weight),
            ui::bytes(p.bytes),
            format!("{:.5}", p.predicted_kl),
        ]);
    }
    ui::print(&table.render())?;
    Ok(())
}

/// The most bits per weight with which the model runs in the memory of `fit`.
pub(super) fn fit(fit: &Fit, source: &ModelSource, head_bits: Option<u32>, ui: &Ui) -> Result<f64> {
    let spec = source.spec();
    let context = fit.context.unwrap_or(spec.max_context);
    session::check_context(source, "--fit ctx", context, ui)?;
    let request = Room::one(context, fit.cache).memory_request(session::GPU_PREFILL_ROWS);
    let beside = memory_for(spec, 0, &request);
    let rest = beside.total() + memory::DRIVER_BYTES + EXPANDED_BYTES;
    let (memory, cache) = (ui::bytes(fit.memory), ui::bytes(beside.cache));
    if rest >= fit.memory {
        bail!(
            "--fit: {context} tokens of context need {} (cache {cache}), more than {memory}",
            ui::bytes(rest)
        );
    }
    let bits = bits_within(source, head_bits, fit.memory - rest).with_context(|| {
        format!(
            "--fit: {context} tokens of context take {} of {memory}",
            ui::bytes(rest)
        )
    })?;
    ui.note(&format!(
        "{bits} bits fit {memory}: cache {cache}, activations {}, driver and kernels about {}, the rest for weights",
        ui::bytes(beside.total() - beside.cache),
        ui::bytes(memory::DRIVER_BYTES + EXPANDED_BYTES)
    ));
    Ok(bits)
}
