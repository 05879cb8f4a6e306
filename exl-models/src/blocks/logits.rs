//! From hidden states to logits.

use exl_tensor::{PlanBuilder, Slot};

use super::{norm, part};
use crate::Spec;

/// Final norm and head over the rows of `hidden`: `[rows, vocab]`.
pub fn logits(b: &mut PlanBuilder, spec: &Spec, hidden: Slot) -> Slot {
    let x = norm(b, Some(&spec.final_norm), hidden);
    head(b, spec, x)
}

/// The head over rows that are normed already, with the logit multiplier and soft-cap.
pub fn head(b: &mut PlanBuilder, spec: &Spec, x: Slot) -> Slot {
    b.tap(&spec.head.linear.key, x);
    let p = part(b, &spec.head.linear);
    let out = b.linear(x, &[p])[0];
    b.scale_logits(out, spec.head.scale, spec.head.softcap);
    out
}
