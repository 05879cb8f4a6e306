//! Ops of layers whose MLP is a mixture of experts.
//!
//! A router scores the experts for every row; the best `top_k` of them compute the row, and their
//! outputs are added with the router's weights. A row slot is one of a row's experts: slot
//! `r * top_k + j` is row `r` with the `j`-th of its experts.

use super::{Activation, Matrix};
use crate::mem::{Mem, MemMut};

/// What the weights of a row's experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouteNorm {
    /// Nothing: they are the probabilities among all experts.
    None,
    /// Their sum, so that they add up to 1.
    Sum,
    /// Their p-norm, `(sum |w|^p)^(1/p)`, for a positive p (DBRX).
    Norm(f32),
}

impl RouteNorm {
    /// The exponent; `None` when nothing is divided.
    pub(crate) fn exponent(self) -> Option<f32> {
        match self {
            RouteNorm::None => None,
            RouteNorm::Sum => Some(1.0),
            RouteNorm::Norm(p) => Some(p),
        }
    }
}

/// Chooses the experts of each row: those with the largest of the softmax probabilities of all experts,
/// in falling order, among equal logits the lower index first. A NaN counts as the smallest logit, and
/// makes all weights of its row NaN.
#[derive(Debug)]
pub struct MoeRoute<'a> {
    /// F32 `[rows, experts]`.
    pub logits: Mem<'a>,
    /// I32 `[rows, top_k]`: the experts, all different.
    pub ids: MemMut<'a>,
    /// F32 `[rows, top_k]`: their probabilities, divided as `norm` says.
    pub weights: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Number of experts.
    pub experts: usize,
    /// Experts of a row, at least 1 and at most all.
    pub top_k: usize,
    /// What the weights are divided by.
    pub norm: RouteNorm,
}

/// `out[r * top_k + j] = act(x[r] W_gate^T) * (x[r] W_up^T)` with the matrices of expert `ids[r, j]`.
/// Weights of experts that no row has are not touched.
#[derive(Debug)]
pub struct MoeGateUp<'a> {
    /// F32 `[rows, inputs]`.
    pub x: Mem<'a>,
    /// I32 `[rows, top_k]`; each in `0..experts.len()`.
    pub ids: Mem<'a>,
    /// Gate and up of every expert, in any format each.
    pub experts: Vec<(Matrix<'a>, Matrix<'a>)>,
    /// F32 `[rows * top_k, outputs]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Experts of a row.
    pub top_k: usize,
    /// Input features.
    pub inputs: usize,
    /// Intermediate size of an expert.
    pub outputs: usize,
    /// Activation of the gate.
    pub act: Activation,
}

/// `out[r] = residual[r] + sum_j weights[r, j] * (x[r * top_k + j] W^T)` with the matrix of expert
/// `ids[r, j]`. The order of the sum depends on the row's experts alone. Weights of experts that no row
/// has are not touched.
#[derive(Debug)]
pub struct MoeDown<'a> {
    /// F32 `[rows * top_k, inputs]`.
    pub x: Mem<'a>,
    /// I32 `[rows, top_k]`; each in `0..experts.len()`.
    pub ids: Mem<'a>,
    /// F32 `[rows, top_k]`.
    pub weights: Mem<'a>,
    /// The matrix of every expert, in any format each.
    pub experts: Vec<Matrix<'a>>,
    /// F32 `[rows, outputs]`, added to the sum; may equal `out`.
    pub residual: Option<Mem<'a>>,
    /// F32 `[rows, outputs]`.
    pub out: MemMut<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Experts of a row.
    pub top_k: usize,
    /// Intermediate size of an expert.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}
