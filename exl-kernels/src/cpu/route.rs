//! The choice of each row's experts.

use super::Cpu;
use super::rows::{Rows, for_rows};
use crate::Result;
use crate::ops::{MoeRoute, RouteNorm};

pub(super) fn run(op: &mut MoeRoute<'_>, cpu: &Cpu) -> Result<()> {
    let (experts, top_k, norm) = (op.experts, op.top_k, op.norm);
    let logits = op.logits.slice::<f32>()?;
    let ids = Rows(op.ids.slice_mut::<i32>()?.as_mut_ptr());
    let weights = Rows(op.weights.slice_mut::<f32>()?.as_mut_ptr());
    // Every choice looks at all logits, and so does their sum.
    for_rows(cpu, op.rows, experts * (top_k + 1), |r| {
        // SAFETY: `check` bounded the rows; each task has its own.
        let (ids, weights) =
            unsafe { (ids.range(r * top_k, top_k), weights.range(r * top_k, top_k)) };
        choose(&logits[r * experts..][..experts], ids, weights);
        normalise(weights, norm);
    });
    Ok(())
}

/// Whether `a` is chosen before `b`; of two equal ones neither is. NaN is the smallest.
fn is_before(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// The largest logits in falling order, and their probabilities.
fn choose(logits: &[f32], ids: &mut [i32], weights: &mut [f32]) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Several sums, which round less than one does.
    let mut sums = [0f32; 16];
    for logits in logits.chunks(sums.len()) {
        for (sum, v) in sums.iter_mut().zip(logits) {
            *sum += (v - most).exp();
        }
    }
    let sum: f32 = sums.iter().sum();
    let mut last: Option<usize> = None;
    for (id, weight) in ids.iter_mut().zip(weights) {
        let mut best: Option<usize> = None;
        for (e, &v) in logits.iter().enumerate() {
            // What comes behind the last choice, equal ones in the order of their numbers.
            let left =
                last.is_none_or(|l| is_before(logits[l], v) || (e > l && !is_before(v, logits[l])));
            if left && best.is_none_or(|b| is_before(v, logits[b])) {
                best = Some(e);
            }
        }
        // There are at least as many experts as choices.
        let chosen = best.unwrap_or(0);
        *id = chosen as i32;
        *weight = (logits[chosen] - most).exp() / sum;
        last = Some(chosen);
    }
}

fn normalise(weights: &mut [f32], norm: RouteNorm) {
    let Some(p) = norm.exponent() else { return };
    let by = match p {
        1.0 => weights.iter().sum(),
        p => {
            let powers: f32 = weights.iter().map(|w| w.powf(p)).sum();
            powers.powf(1.0 / p)
        }
    };
    weights.iter_mut().for_each(|w| *w /= by);
}
