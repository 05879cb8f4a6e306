//! The conformance cases on every instruction set of this machine.

use exl_kernels::conformance::cases;
use exl_kernels::cpu::{Cpu, CpuOptions, Isa};

fn check(isa: Isa, threads: usize) {
    let cpu = Cpu::new(CpuOptions {
        threads,
        isa: Some(isa),
        ..CpuOptions::default()
    });
    let mut failed = Vec::new();
    let mut worst = std::collections::BTreeMap::<String, f32>::new();
    for case in cases(false) {
        let outcome = case
            .check(&mut |op| cpu.run(op))
            .expect("kernels take valid ops");
        let op = outcome
            .name
            .split('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let entry = worst.entry(op).or_default();
        *entry = entry.max(outcome.error);
        if !outcome.passed() {
            failed.push(format!(
                "{}: {:e} > {:e}",
                outcome.name, outcome.error, outcome.tolerance
            ));
        }
    }
    eprintln!("{isa:?}, {threads} threads: {worst:#?}");
    assert!(
        failed.is_empty(),
        "{isa:?}, {threads} threads:\n{}",
        failed.join("\n")
    );
}

#[test]
fn every_instruction_set_passes() {
    for isa in Isa::available() {
        check(isa, 1);
    }
}

#[test]
fn threads_do_not_matter() {
    check(Isa::detect(), 3);
}
