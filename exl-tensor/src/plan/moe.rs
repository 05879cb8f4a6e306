//! Arguments of the ops of a mixture of experts.

use exl_kernels::ops::{Activation, RouteNorm};

use super::WeightId;

/// Arguments of [`super::PlanOp::MoeRoute`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::MoeRoute
pub struct MoeRouteOp {
    pub rows: usize,
    pub experts: usize,
    pub top_k: usize,
    pub norm: RouteNorm,
}

/// Arguments of [`super::PlanOp::MoeGateUp`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::MoeGateUp
pub struct MoeGateUpOp {
    pub experts: Vec<(WeightId, WeightId)>,
    pub rows: usize,
    pub top_k: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub act: Activation,
}

/// Arguments of [`super::PlanOp::MoeDown`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields mirror exl_kernels::ops::MoeDown
pub struct MoeDownOp {
    pub experts: Vec<WeightId>,
    pub rows: usize,
    pub top_k: usize,
    pub inputs: usize,
    pub outputs: usize,
}
