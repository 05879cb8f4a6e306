//! `exl convert`: quantizes a model to EXL2.

mod plan;

use crate::args::ConvertArgs;
use crate::calibration;
use crate::failure::Interrupted;
use crate::session;
use crate::signal;
use crate::ui::{self, Align, Progress, Table, Ui};
use anyhow::{Context, Result};
use exl_format::quality::Evaluation;
use exl_models::LoadOptions;
use exl_models::rope::RopeOptions;
use exl_quant::{ConvertOptions, ConvertReport, Error, Event, Stage, convert};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Bytes of a gigabyte of `--max-ram` and `--max-vram`.
const GB: f64 = 1e9;
/// Bytes of a `--shard-size` unit.
const MIB: u64 = 1 << 20;

#[derive(Serialize)]
struct Output<'a> {
    source: &'a PathBuf,
    measurement: Option<&'a PathBuf>,
    results: &'a [ConvertReport],
    seconds: f64,
}

pub(crate) fn run(args: &ConvertArgs, ui: &Ui) -> Result<()> {
    let stop = signal::stop_flag()?;
    let start = Instant::now();
    let options = ConvertOptions {
        gpu: session::gpu(args.device.device, ui)?,
        ..options(args)
    };
    match &options.gpu {
        Some(gpu) => ui.note(&format!("converting on {}", gpu.props().name)),
        None if args.max_vram.is_some() => {
            ui.note("--max-vram is not needed: the conversion runs on the CPU");
        }
        None => {}
    }
    let source = session::open(&args.source, &options.load, ui)?;
    let options = match &args.fit {
        Some(fit) => ConvertOptions {
            bits: vec![plan::fit(fit, &source, options.head_bits, ui)?],
            ..options
        },
        None => options,
    };
    let length = args.length.map(|n| n as usize);
    let length = length.unwrap_or_else(|| calibration::default_length(&source));
    let rows = args.rows.map(|n| n as usize);
    let rows = rows.unwrap_or_else(|| calibration::default_rows(&source, length));
    let shape = (rows, length);
    let calibration = calibration::read(args.cal.as_deref(), shape, &source, ui)?;
    drop(source);
    let mut display = Display {
        ui: *ui,
        progress: None,
    };
    let mut show = |event| display.show(event);
    if args.plan {
        let done = exl_quant::plan(&options, &calibration, &mut show, &stop.shared());
        drop(display);
        let points = done.or_else(|error| failed(args, &options, error))?;
        return plan::print(args, &points);
    }
    let done = convert(&options, &calibration, &mut show, &stop.shared());
    drop(display);
    let results = done.or_else(|error| failed(args, &options, error))?;
    if args.json {
        return ui::print_json(&Output {
            source: &args.source,
            measurement: args.save_measurement.as_ref(),
            results: &results,
            seconds: start.elapsed().as_secs_f64(),
        });
    }
    if let Some(path) = &args.save_measurement {
        ui.note(&format!("the measurement is in {}", path.display()));
    }
    if !results.is_empty() {
        ui::print(&table(&results).render())?;
        ui.note(&format!("done in {}", ui::duration(start.elapsed())));
    }
    Ok(())
}

/// What went wrong and how to go on.
fn failed<T>(args: &ConvertArgs, options: &ConvertOptions, error: Error) -> Result<T> {
    let journal = options.work.display();
    if matches!(error, Error::Interrupted) {
        let how = format!("run the same command again to go on (the journal is in {journal})");
        return Err(Interrupted(how).into());
    }
    let about_flags = match &error {
        Error::Option { option, .. } => option.starts_with("--"),
        other => matches!(other, Error::Calibration { .. }),
    };
    if about_flags {
        return Err(error.into());
    }
    let mut what = format!("cannot convert {}", args.source.display());
    if matches!(error, Error::Io { .. } | Error::Format(_)) && options.work.is_dir() {
        what.push_str(&format!(
            "; the same command goes on from what {journal} holds"
        ));
    }
    Err(error).context(what)
}

fn options(args: &ConvertArgs) -> ConvertOptions {
    // A pure measurement or a plan needs a place for its journal only.
    let beside = args
        .out
        .clone()
        .or_else(|| args.save_measurement.clone())
        .unwrap_or_else(|| PathBuf::from("exl-plan"));
    let base = ConvertOptions::new(&args.source, beside, args.bits.clone());
    ConvertOptions {
        head_bits: args.head_bits.map(u32::from),
        measure_rows: args.measure_rows as usize,
        measure_length: args
            .measure_length
            .map_or(base.measure_length, |n| n as usize),
        measurement: args.measurement.clone(),
        save_measurement: args.save_measurement.clone(),
        measure_only: args.measure_only || args.plan,
        work: args.work.clone().unwrap_or(base.work),
        restart: args.restart,
        shard_bytes: match args.shard_size {
            0 => u64::MAX,
            n => n.saturating_mul(MIB),
        },
        verify: !args.no_verify,
        max_ram: args.max_ram.map(|gb| (gb * GB) as u64),
        max_vram: args.max_vram.map(|gb| (gb * GB) as u64),
        threads: session::threads(&args.device),
        load: LoadOptions {
            rope: RopeOptions {
                context: None,
                scale: args.rope_scale,
                alpha: args.rope_alpha,
            },
            assume_llama: args.load.assume_llama,
            threads: session::threads(&args.device),
        },
        ..base
    }
}

/// Shows one stage at a time.
struct Display {
    ui: Ui,
    progress: Option<Progress>,
}

impl Display {
    fn show(&mut self, event: Event) {
        match event {
            Event::Stage(stage) => {
                // The old bar goes before the new one comes.
                self.progress = None;
                let label = label(stage);
                self.ui.note(&label);
                self.progress = Some(self.ui.steps(&label, 0));
            }
            Event::Progress { done, total } => {
                if let Some(progress) = &mut self.progress {
                    progress.set_of(done, total);
                }
            }
            Event::Linear {
                name,
                bits_per_weight,
                relative_error,
            } => {
                tracing::info!("{}", linear(&name, bits_per_weight, relative_error));
            }
            Event::Notice(text) => match &self.progress {
                Some(progress) => progress.note(&text),
                None => self.ui.note(&text),
            },
            _ => {}
        }
    }
}

fn label(stage: Stage) -> String {
    match stage {
        Stage::Measure => "measuring".to_owned(),
        Stage::Perturb => "measuring effects".to_owned(),
        Stage::Quantize(bits) => format!("quantizing to {bits:?} bits"),
        Stage::Write(bits) => format!("writing {bits:?} bits"),
    }
}

fn linear(name: &str, bits: Option<f64>, error: Option<f64>) -> String {
    let bits = bits.map_or_else(String::new, |b| format!(", {b:.3} bits"));
    let error = error.map_or_else(String::new, |e| format!(", relative error {e:.5}"));
    format!("{name}{bits}{error}")
}

fn table(results: &[ConvertReport]) -> Table {
    let names = [
        "bits",
        "got",
        "head",
        "bytes",
        "of original",
        "KL",
        "same top",
        "ppl",
        "ppl before",
    ];
    let mut columns: Vec<(&str, Align)> = names.map(|name| (name, Align::Right)).to_vec();
    columns.push(("written to", Align::Left));
    let mut table = Table::new(&columns);
    for r in results {
        let totals = &r.quality.totals;
        let share = 100.0 * r.file_bytes as f64 / r.original_file_bytes.max(1) as f64;
        let judged = |value: fn(&Evaluation) -> String| {
            r.quality
                .evaluation
                .as_ref()
                .map_or_else(|| "-".to_owned(), value)
        };
        table.row([
            format!("{:?}", r.bits),
            format!("{:.3}", totals.bits_per_weight),
            format!("{:.3}", totals.head_bits_per_weight),
            ui::bytes(r.file_bytes),
            format!("{share:.1}%"),
            judged(|e| format!("{:.5}", e.mean_kl)),
            judged(|e| format!("{:.1}%", 100.0 * e.top1)),
            judged(|e| format!("{:.3}", e.perplexity)),
            judged(|e| format!("{:.3}", e.original_perplexity)),
            r.out.display().to_string(),
        ]);
    }
    table
}
