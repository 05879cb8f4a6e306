//! Mixture of experts.

use exl_kernels::DType;
use exl_kernels::ops::{Activation, RouteNorm};

use super::super::{MoeDownOp, MoeGateUpOp, MoeRouteOp};
use super::{PlanBuilder, PlanOp, Slot, WeightId};

/// The experts of every row, from [`PlanBuilder::moe_route`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Their numbers, I32 `[rows, top_k]`.
    pub ids: Slot,
    /// What their outputs are multiplied by, F32 `[rows, top_k]`.
    pub weights: Slot,
    /// Experts of a row.
    pub top_k: usize,
}

impl PlanBuilder {
    /// Chooses the `top_k` experts of each row of logits, F32 `[rows, experts]`.
    pub fn moe_route(&mut self, logits: Slot, top_k: usize, norm: RouteNorm) -> Routing {
        let (rows, experts) = (self.rows(logits), self.dim(logits));
        let ids = self.new_slot("experts", rows, top_k);
        self.slots[ids.0 as usize].dtype = DType::I32;
        let weights = self.new_slot("shares", rows, top_k);
        let args = MoeRouteOp {
            rows,
            experts,
            top_k,
            norm,
        };
        self.push(PlanOp::MoeRoute {
            logits,
            ids,
            weights,
            args,
        });
        Routing {
            ids,
            weights,
            top_k,
        }
    }

    /// Gated half of each row's experts, `(gate, up)` by number: F32 `[rows * top_k, outputs]`, the
    /// experts of a row one after the other. Adapters change no expert.
    pub fn moe_gate_up(
        &mut self,
        x: Slot,
        routing: &Routing,
        experts: &[(WeightId, WeightId)],
        act: Activation,
    ) -> Slot {
        let first = experts.first();
        let (outputs, inputs) = first.map_or((0, 0), |&(gate, _)| self.matrix_shape(gate));
        let rows = self.rows(x);
        let out = self.new_slot("moe_gate_up", rows * routing.top_k, outputs);
        let args = MoeGateUpOp {
            experts: experts.to_vec(),
            rows,
            top_k: routing.top_k,
            inputs,
            outputs,
            act,
        };
        // A GPU may choose the experts of a row here: the logits are left while outputs are written.
        if let Some(&PlanOp::MoeRoute { logits, .. }) = self.ops.last() {
            self.keep_for_next(&[logits]);
        }
        self.push(PlanOp::MoeGateUp {
            x,
            ids: routing.ids,
            out,
            args,
        });
        out
    }

    /// Adds the outputs of each row's experts, weighted, to `residual` in place; returns `residual`. `x`
    /// comes from [`PlanBuilder::moe_gate_up`]. Adapters change no expert.
    pub fn moe_down(
        &mut self,
        x: Slot,
        routing: &Routing,
        experts: &[WeightId],
        residual: Slot,
    ) -> Slot {
        let args = MoeDownOp {
            experts: experts.to_vec(),
            rows: self.rows(residual),
            top_k: routing.top_k,
            inputs: self.dim(x),
            outputs: self.dim(residual),
        };
        self.push(PlanOp::MoeDown {
            x,
            routing: *routing,
            residual: Some(residual),
            out: residual,
            args,
        });
        residual
    }
}
