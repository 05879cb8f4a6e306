//! Low-rank adapters and vectors in place of tokens: ops that only some plans have.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Part, PlanBuilder, PlanOp, Slot, WeightId};
use crate::plan::RowScales;

/// A low-rank adapter as plans see it: to a linear of its list it adds `scale (x A^T) B^T`, with the
/// scale of each row of the step.
#[derive(Clone, Debug)]
pub struct PlanAdapter {
    /// Its weights are `{name}.{linear}.a` `[rank, inputs]` and `{name}.{linear}.b` `[outputs, rank]`.
    pub name: String,
    /// Ranks of the linears that it changes.
    pub ranks: Arc<HashMap<String, usize>>,
}

impl PlanBuilder {
    /// Adds what adapters do to every linear recorded from here on: those of the key's extras, in the
    /// same order.
    #[must_use]
    pub fn with_adapters(mut self, adapters: Vec<PlanAdapter>) -> Self {
        self.adapters = adapters;
        self
    }

    pub(super) fn is_adapted(&self, weight: WeightId) -> bool {
        let linear = &self.weights[weight.0 as usize].name;
        self.adapters.iter().any(|a| a.ranks.contains_key(linear))
    }

    /// What all adapters add to products of `x` with these weights, which are in these slots.
    pub(super) fn adapt(&mut self, x: Slot, targets: &[(WeightId, Slot)]) {
        for (column, adapter) in self.adapters.clone().into_iter().enumerate() {
            let (mut down, mut up) = (Vec::new(), Vec::new());
            for &(weight, out) in targets {
                let linear = self.weights[weight.0 as usize].name.clone();
                let Some(&rank) = adapter.ranks.get(&linear) else {
                    continue;
                };
                let (outputs, inputs) = self.matrix_shape(weight);
                let part = |weight| Part { weight, bias: None };
                let name = format!("{}.{linear}", adapter.name);
                down.push(part(self.weight(&format!("{name}.a"), &[rank, inputs])));
                up.push((
                    part(self.weight(&format!("{name}.b"), &[outputs, rank])),
                    out,
                ));
            }
            if down.is_empty() {
                continue;
            }
            let share = self.new_slot("share", self.rows(x), self.dim(x));
            self.push(PlanOp::ScaleRows {
                x,
                scales: RowScales::Step(self.set, column),
                factor: 1.0,
                add: None,
                out: share,
            });
            let inner = self.products(share, &down);
            for (inner, (part, out)) in inner.into_iter().zip(up) {
                self.product_add(inner, &part, out);
            }
        }
    }

    /// Puts the rows of the input `vectors`, F32 `[rows, dim]`, in place of those of `hidden` that have
    /// no token, if the key says that there are any. Rows with a token are 0 there.
    pub fn take_vectors(&mut self, hidden: Slot) {
        if !self.key.extras.vectors {
            return;
        }
        let vectors = self.input("vectors", self.rows(hidden), self.dim(hidden));
        self.push(PlanOp::ScaleRows {
            x: hidden,
            scales: RowScales::Step(self.set, self.key.extras.adapters.len()),
            factor: 1.0,
            add: Some(vectors),
            out: hidden,
        });
    }
}
