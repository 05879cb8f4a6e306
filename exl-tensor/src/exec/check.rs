//! Runs a plan on two executors in step and compares every slot each op writes.

use exl_kernels::DType;

use super::{Bound, Executor};
use crate::{KvBuffers, Result, Slot, StepBlock};

/// How far two executors differ after one op.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotDiff {
    /// Position in the plan.
    pub index: usize,
    /// Name of the op.
    pub op: &'static str,
    /// The slot.
    pub slot: Slot,
    /// `max |a - b| / max |b|` over the slot, finite `b` for the latter; for integers the share of
    /// those that differ.
    pub relative: f32,
    /// The op's tolerance.
    pub tolerance: f32,
}

/// The differences of a whole plan.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckReport {
    /// Every written slot in order.
    pub diffs: Vec<SlotDiff>,
}

impl CheckReport {
    /// The first slot outside its tolerance.
    pub fn first_failure(&self) -> Option<&SlotDiff> {
        // Negated so that NaN fails.
        self.diffs
            .iter()
            .find(|d| d.relative.is_nan() || d.relative > d.tolerance)
    }
}

/// One of the two that are compared.
#[derive(Debug)]
pub struct Side<'a> {
    /// What runs the plan.
    pub executor: &'a mut dyn Executor,
    /// The plan with weights where the executor wants them.
    pub bound: &'a Bound,
    /// Its own cache.
    pub kv: &'a mut KvBuffers,
}

/// Runs a plan op by op on both executors; each op starts from the trusted executor's slots and its
/// own cache, so that a difference shows where it arises.
///
/// `inputs` are the values of the plan's input slots; `tolerance` gives the bound per op name.
///
/// # Errors
/// Whatever an executor returns.
///
/// # Panics
/// When the plans differ.
pub fn check(
    tested: Side<'_>,
    trusted: Side<'_>,
    step: &StepBlock,
    inputs: &[(Slot, Vec<f32>)],
    tolerance: impl Fn(&str) -> f32,
) -> Result<CheckReport> {
    let (a, b) = (tested.bound, trusted.bound);
    let plan = a.plan();
    assert_eq!(plan.ops(), b.plan().ops(), "two plans are compared");
    let (tested, tested_kv) = (tested.executor, tested.kv);
    let (trusted, trusted_kv) = (trusted.executor, trusted.kv);
    tested.prepare(a)?;
    trusted.prepare(b)?;
    for (slot, values) in inputs {
        tested.write(a, *slot, values)?;
        trusted.write(b, *slot, values)?;
    }
    let mut diffs = Vec::new();
    for (index, op) in plan.ops().iter().enumerate() {
        tested.run_op(a, index, step, tested_kv)?;
        trusted.run_op(b, index, step, trusted_kv)?;
        for slot in op.writes() {
            let relative = if plan.slot(slot).dtype == DType::I32 {
                let integers = tested.integers(a, slot)?;
                let right = trusted.integers(b, slot)?;
                let share = differing(integers, right);
                tested.write_integers(a, slot, right)?;
                share
            } else {
                let values = tested.values(a, slot)?;
                let right = trusted.values(b, slot)?;
                let relative = relative(values, right);
                tested.write(a, slot, right)?;
                relative
            };
            diffs.push(SlotDiff {
                index,
                op: op.name(),
                slot,
                relative,
                tolerance: tolerance(op.name()),
            });
        }
    }
    Ok(CheckReport { diffs })
}

fn differing(a: &[i32], b: &[i32]) -> f32 {
    let count = a.iter().zip(b).filter(|(x, y)| x != y).count();
    count as f32 / b.len().max(1) as f32
}

fn relative(a: &[f32], b: &[f32]) -> f32 {
    let scale = b
        .iter()
        .filter(|v| v.is_finite())
        .fold(0f32, |m, v| m.max(v.abs()))
        .max(f32::MIN_POSITIVE);
    let mut worst = 0f32;
    for (x, y) in a.iter().zip(b) {
        // Excluded tokens have minus infinity on both sides.
        let d = if x == y { 0.0 } else { (x - y).abs() / scale };
        if d.is_nan() || d > worst {
            worst = d;
        }
        if worst.is_nan() {
            break;
        }
    }
    worst
}
