//! Mixture of experts.

use std::cmp::Ordering;

use super::{activate, floats, index, optional, product, store};
use crate::Result;
use crate::ops::{MoeDown, MoeGateUp, MoeRoute};

pub(super) fn route(op: &mut MoeRoute<'_>) -> Result<()> {
    let logits = floats(&op.logits)?;
    for (r, row) in logits.chunks_exact(op.experts).enumerate() {
        let mut order: Vec<usize> = (0..op.experts).collect();
        // A stable sort: equal ones stay in order.
        order.sort_by(|&a, &b| falling(row[a], row[b]));
        order.truncate(op.top_k);
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|v| (v - most).exp()).sum();
        let chosen = order.iter().map(|&e| (row[e] - most).exp() / sum);
        let chosen: Vec<f64> = chosen.collect();
        let by = op.norm.exponent().map_or(1.0, |p| {
            let p = f64::from(p);
            let powers: f64 = chosen.iter().map(|w| w.powf(p)).sum();
            powers.powf(1.0 / p)
        });
        for (j, (e, w)) in order.into_iter().zip(chosen).enumerate() {
            op.ids.slice_mut::<i32>()?[r * op.top_k + j] = e as i32;
            store(&mut op.weights, r * op.top_k + j, w / by)?;
        }
    }
    Ok(())
}

/// Larger ones first, NaN last.
fn falling(a: f64, b: f64) -> Ordering {
    b.partial_cmp(&a)
        .unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// The slots of each expert.
fn slots(ids: &[i32], experts: usize, what: &str) -> Result<Vec<Vec<usize>>> {
    let mut slots = vec![Vec::new(); experts];
    for at in 0..ids.len() {
        slots[index(ids, at, experts, what)?].push(at);
    }
    Ok(slots)
}

pub(super) fn gate_up(op: &mut MoeGateUp<'_>) -> Result<()> {
    let (x, shape) = (floats(&op.x)?, (op.inputs, op.outputs));
    let slots = slots(op.ids.slice()?, op.experts.len(), "moe_gate_up.ids")?;
    for ((gate, up), slots) in op.experts.iter().zip(slots) {
        if slots.is_empty() {
            continue;
        }
        let row = |&slot: &usize| &x[slot / op.top_k * op.inputs..][..op.inputs];
        let rows: Vec<f64> = slots.iter().flat_map(row).copied().collect();
        let gate = product(&rows, gate, &None, shape)?;
        let up = product(&rows, up, &None, shape)?;
        for (i, (g, u)) in gate.iter().zip(&up).enumerate() {
            let at = slots[i / op.outputs] * op.outputs + i % op.outputs;
            store(&mut op.out, at, activate(op.act, *g) * u)?;
        }
    }
    Ok(())
}

pub(super) fn down(op: &mut MoeDown<'_>) -> Result<()> {
    let (x, weights) = (floats(&op.x)?, floats(&op.weights)?);
    let mut sums = optional(&op.residual)?.unwrap_or_else(|| vec![0.0; op.rows * op.outputs]);
    let slots = slots(op.ids.slice()?, op.experts.len(), "moe_down.ids")?;
    for (matrix, slots) in op.experts.iter().zip(slots) {
        if slots.is_empty() {
            continue;
        }
        let row = |&slot: &usize| &x[slot * op.inputs..][..op.inputs];
        let rows: Vec<f64> = slots.iter().flat_map(row).copied().collect();
        let y = product(&rows, matrix, &None, (op.inputs, op.outputs))?;
        for (i, y) in y.iter().enumerate() {
            let slot = slots[i / op.outputs];
            sums[slot / op.top_k * op.outputs + i % op.outputs] += weights[slot] * y;
        }
    }
    for (i, sum) in sums.iter().enumerate() {
        store(&mut op.out, i, *sum)?;
    }
    Ok(())
}
