//! `exl eval --verify`: whether a checkpoint is what its `quality.json` says.

use crate::args::EvalArgs;
use crate::calibration;
use crate::failure::{self, Usage};
use crate::session;
use crate::signal;
use crate::ui::{self, Align, Table, Ui};
use anyhow::{Result, bail};
use exl_quant::{Check, Event, VerifyOptions, stated_quality, verify_quality};
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    holds: bool,
    checks: &'a [Check],
}

pub(super) fn run(args: &EvalArgs, dir: &Path, ui: &Ui) -> Result<()> {
    let stop = signal::stop_flag()?;
    let original = args.reference.as_ref();
    let original = original.ok_or_else(|| Usage("--verify needs --reference".to_owned()))?;
    let load = session::load_options(args.load, &args.compute, None);
    let stated = stated_quality(dir)?;
    let source = session::open(original, &load, ui)?;
    let shape = (stated.calibration.rows, stated.calibration.length);
    let calibration = calibration::read(args.cal.as_deref(), shape, &source, ui)?;
    drop(source);
    let options = VerifyOptions {
        dir: dir.to_owned(),
        original: original.clone(),
        load,
        threads: session::threads(&args.compute.device),
        gpu: session::gpu(args.compute.device.device, ui)?,
    };
    let mut progress = ui.steps("verifying", 0);
    let found = verify_quality(
        &options,
        &calibration,
        &mut |event| {
            if let Event::Progress { done, total } = event {
                progress.set_of(done, total);
            }
        },
        &stop.shared(),
    );
    drop(progress);
    let checks = failure::finished(found, "the check")?;
    let broken = checks.iter().filter(|c| !c.holds).count();
    if args.json {
        ui::print_json(&Report {
            model: dir,
            holds: broken == 0,
            checks: &checks,
        })?;
    } else {
        ui::print(&table(&checks).render())?;
    }
    if broken > 0 {
        bail!(
            "{}: {broken} of {} statements of its quality.json do not hold",
            dir.display(),
            checks.len()
        );
    }
    Ok(())
}

/// What does not hold, the evaluation, and how many statements there are.
fn table(checks: &[Check]) -> Table {
    let mut table = Table::new(&[
        ("statement", Align::Left),
        ("quality.json", Align::Right),
        ("found", Align::Right),
        ("", Align::Left),
    ]);
    let shown = |c: &&Check| !c.holds || !c.what.contains(": ");
    for check in checks.iter().filter(shown) {
        let verdict = if check.holds { "holds" } else { "DIFFERS" };
        table.row([&check.what, &check.stated, &check.found, verdict]);
    }
    let tensors: Vec<&Check> = checks.iter().filter(|c| c.what.contains(": ")).collect();
    let good = tensors.iter().filter(|c| c.holds).count();
    let name = format!("{good} of {} about tensors", tensors.len());
    let verdict = if good == tensors.len() {
        "hold"
    } else {
        "hold, others differ"
    };
    table.row([&name, "", "", verdict]);
    table
}
