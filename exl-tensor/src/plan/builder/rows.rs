//! Ops that work row by row and that only some models have.

use exl_kernels::ops::Activation;

use crate::StepField;
use crate::plan::{LayerNormOp, PlanBuilder, PlanOp, RowScales, Slot, WeightId};

impl PlanBuilder {
    /// `hidden += table[position]`, in place: learned positions, of vectors too where they have been taken
    /// ([`PlanBuilder::take_vectors`]). Steps may reach no position beyond the table
    /// ([`crate::Plan::position_limit`]).
    pub fn embed_positions(&mut self, table: WeightId, hidden: Slot) {
        let (vocab, dim) = self.matrix_shape(table);
        self.push(PlanOp::Embed {
            table,
            ids: StepField::Positions,
            add: Some(hidden),
            out: hidden,
            vocab,
            dim,
            scale: 1.0,
        });
    }

    /// `residual += rms_norm(x)` over rows, in place; returns `residual`.
    pub fn rms_norm_add(
        &mut self,
        x: Slot,
        weight: WeightId,
        eps: f32,
        offset: f32,
        residual: Slot,
    ) -> Slot {
        self.push(PlanOp::RmsNorm {
            x,
            weight,
            residual: Some(residual),
            out: residual,
            rows: self.rows(x),
            dim: self.dim(x),
            eps,
            offset,
        });
        residual
    }

    /// `residual += factor * x`, in place; returns `residual`.
    pub fn scale_add(&mut self, x: Slot, factor: f32, residual: Slot) -> Slot {
        self.add_scaled(x, (RowScales::None, factor), residual)
    }

    /// `residual += scales * x` row by row, with scales `[rows, 1]`, in place; returns `residual`.
    pub fn scale_rows_add(&mut self, x: Slot, scales: Slot, residual: Slot) -> Slot {
        self.add_scaled(x, (RowScales::Slot(scales), 1.0), residual)
    }

    fn add_scaled(&mut self, x: Slot, (scales, factor): (RowScales, f32), residual: Slot) -> Slot {
        self.push(PlanOp::ScaleRows {
            x,
            scales,
            factor,
            add: Some(residual),
            out: residual,
        });
        residual
    }

    /// Brings every element to at most `limit` in magnitude, in place.
    pub fn clamp(&mut self, x: Slot, limit: f32) {
        self.push(PlanOp::Clamp { x, limit });
    }

    /// The activation of every element, in place; returns `x`.
    pub fn activate(&mut self, x: Slot, act: Activation) -> Slot {
        self.push(PlanOp::Gated {
            gate: x,
            up: None,
            out: x,
            act,
        });
        x
    }

    /// Layer norm over a slot's rows; without a weight it is 1 everywhere.
    pub fn layer_norm(
        &mut self,
        x: Slot,
        weight: Option<WeightId>,
        bias: Option<WeightId>,
        eps: f32,
    ) -> Slot {
        let (rows, dim) = (self.rows(x), self.dim(x));
        let out = self.new_slot("norm", rows, dim);
        let args = LayerNormOp {
            weight,
            bias,
            rows,
            dim,
            groups: 1,
            eps,
        };
        self.push(PlanOp::LayerNorm { x, out, args });
        out
    }

    /// Layer norm over each head of a slot `[rows, heads * head_dim]`, in place, with a weight
    /// `[heads, head_dim]`.
    pub fn head_layer_norm(&mut self, x: Slot, weight: WeightId, head_dim: usize, eps: f32) {
        let heads = self.dim(x) / head_dim;
        let args = LayerNormOp {
            weight: Some(weight),
            bias: None,
            rows: self.rows(x) * heads,
            dim: head_dim,
            groups: heads,
            eps,
        };
        self.push(PlanOp::LayerNorm { x, out: x, args });
    }
}
