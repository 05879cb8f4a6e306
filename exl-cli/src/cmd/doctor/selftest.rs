//! Runs every kernel once against the reference.

use super::isa_name;
use crate::ui::{Align, Table, Ui};
use exl_tensor::conformance::{Case, cases};
use exl_tensor::{Activations, Cpu, CpuOptions, Isa};
use serde::Serialize;

/// What the kernels did.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    kernels: Vec<Kernel>,
}

/// All cases of one kernel in one instruction set.
#[derive(Debug, Serialize)]
struct Kernel {
    name: String,
    isa: String,
    cases: usize,
    failed: usize,
    /// Largest error, as a share of what is allowed.
    worst: f64,
}

impl Results {
    pub(super) fn failed(&self) -> usize {
        self.kernels.iter().filter(|k| k.failed > 0).count()
    }

    pub(super) fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("kernel", Align::Left),
            ("isa", Align::Left),
            ("cases", Align::Right),
            ("failed", Align::Right),
            ("worst error / allowed", Align::Right),
        ]);
        for k in &self.kernels {
            table.row([
                k.name.clone(),
                k.isa.clone(),
                k.cases.to_string(),
                k.failed.to_string(),
                format!("{:.3}", k.worst),
            ]);
        }
        table
    }
}

/// Runs the quick cases in every instruction set of this machine.
pub(super) fn run(ui: &Ui) -> Results {
    let cases = cases(true);
    let sets = Isa::available();
    let mut progress = ui.steps("testing kernels", (cases.len() * sets.len()) as u64);
    let mut kernels: Vec<Kernel> = Vec::new();
    for isa in sets {
        let options = CpuOptions {
            threads: 0,
            isa: Some(isa),
            activations: Activations::Exact16,
        };
        let cpu = Cpu::new(options);
        for case in &cases {
            let (passed, share) = check(case, &cpu);
            let kernel = of_case(&mut kernels, case, isa);
            kernel.cases += 1;
            if !passed {
                kernel.failed += 1;
                progress.note(&format!(
                    "{} fails on {}: {share:.1} times the allowed error",
                    case.name, kernel.isa
                ));
            }
            kernel.worst = kernel.worst.max(share);
            progress.add(1);
        }
    }
    Results { kernels }
}

/// Whether the case passed, and its error as a share of the allowed one.
fn check(case: &Case, cpu: &Cpu) -> (bool, f64) {
    match case.check(&mut |op| cpu.run(op)) {
        Ok(outcome) if outcome.error.is_nan() => (false, f64::INFINITY),
        Ok(outcome) => {
            // Some ops must be exact: nothing is allowed there.
            let allowed = f64::from(outcome.tolerance.max(f32::MIN_POSITIVE));
            (outcome.passed(), f64::from(outcome.error) / allowed)
        }
        Err(error) => {
            tracing::error!("{}: {error}", case.name);
            (false, f64::INFINITY)
        }
    }
}

/// The entry of a case's kernel.
fn of_case<'a>(kernels: &'a mut Vec<Kernel>, case: &Case, isa: Isa) -> &'a mut Kernel {
    let name = case.name.split("::").next().unwrap_or(&case.name);
    let isa = isa_name(isa);
    let at = kernels.iter().position(|k| k.name == name && k.isa == isa);
    let at = at.unwrap_or_else(|| {
        kernels.push(Kernel {
            name: name.to_owned(),
            isa,
            cases: 0,
            failed: 0,
            worst: 0.0,
        });
        kernels.len() - 1
    });
    &mut kernels[at]
}
