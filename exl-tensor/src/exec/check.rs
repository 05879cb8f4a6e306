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

/// Runs the plan op by op on both executors; each op starts from the second (trusted) executor's
/// slots and its own cache, so that a difference shows where it arises.
///
/// `inputs` are the values of the plan's input slots; `tolerance` gives the bound per op name.
///
/// # Errors
/// Whatever an executor returns.
pub fn check(
    (tested, tested_kv): (&mut dyn Executor, &mut KvBuffers),
    (trusted, trusted_kv): (&mut dyn Executor, &mut KvBuffers),
    bound: &Bound,
    step: &StepBlock,
    inputs: &[(Slot, Vec<f32>)],
    tolerance: impl Fn(&str) -> f32,
) -> Result<CheckReport> {
    tested.prepare(bound)?;
    trusted.prepare(bound)?;
    for (slot, values) in inputs {
        tested.write(bound, *slot, values)?;
        trusted.write(bound, *slot, values)?;
    }
    let mut diffs = Vec::new();
    for (index, op) in bound.plan().ops().iter().enumerate() {
        tested.run_op(bound, index, step, tested_kv)?;
        trusted.run_op(bound, index, step, trusted_kv)?;
        for slot in op.writes() {
            let relative = if bound.plan().slot(slot).dtype == DType::I32 {
                // No op reads integers of the arena, so the difference does not go on.
                let a = tested.integers(bound, slot)?;
                differing(a, trusted.integers(bound, slot)?)
            } else {
                let a = tested.values(bound, slot)?;
                let b = trusted.values(bound, slot)?;
                let relative = relative(a, b);
                tested.write(bound, slot, b)?;
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
