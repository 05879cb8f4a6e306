//! The feed-forward half of a layer.

use exl_tensor::{Activation, GateUpArgs, PlanBuilder, Routing, Slot};

use super::{add, matrix, norm, part};
use crate::spec::{DenseMlp, LayerSpec, MlpSpec, MoeSpec, SharedExpert};

/// What an MLP has computed before its last products.
#[derive(Clone, Debug)]
pub struct MlpInner {
    /// Input of the down product: `[rows, inner]`, with experts `[rows * top_k, inner]`.
    pub inner: Slot,
    /// Which experts each row goes through.
    pub routing: Option<Routing>,
    /// Input of the shared expert's down product.
    pub shared: Option<Slot>,
    /// How much of the shared expert is added, `[rows, 1]`; all of it if there is none.
    pub share: Option<Slot>,
}

impl MlpInner {
    /// Of an MLP that is none of experts.
    pub fn dense(inner: Slot) -> Self {
        Self {
            inner,
            routing: None,
            shared: None,
            share: None,
        }
    }

    /// Of experts, and of the one for all tokens; `x` is the input of the MLP.
    pub fn routed(
        b: &mut PlanBuilder,
        moe: &MoeSpec,
        x: Slot,
        (inner, shared): (Slot, Option<Slot>),
    ) -> Self {
        Self {
            inner,
            routing: Some(route(b, moe, x)),
            shared,
            share: moe.shared.as_ref().and_then(|s| share(b, s, x)),
        }
    }
}

/// `hidden += mlp(norm(hidden))`, in place; taps the inputs of the linears, of experts only that of
/// their router.
pub fn mlp(b: &mut PlanBuilder, layer: &LayerSpec, hidden: Slot) -> Slot {
    let x = mlp_input(b, layer, hidden);
    let inner = mlp_inner(b, &layer.mlp, x);
    mlp_output(b, layer, &inner, hidden)
}

/// What gate, up and routers read.
pub fn mlp_input(b: &mut PlanBuilder, layer: &LayerSpec, hidden: Slot) -> Slot {
    let spec = match layer.parallel {
        true => layer.attn_norm.as_ref(),
        false => layer.mlp_norm.as_ref(),
    };
    norm(b, spec, hidden)
}

/// From the input of the MLP to those of its down products.
pub fn mlp_inner(b: &mut PlanBuilder, mlp: &MlpSpec, x: Slot) -> MlpInner {
    match mlp {
        MlpSpec::Dense(mlp) => MlpInner::dense(dense_inner(b, mlp, x)),
        MlpSpec::Moe(moe) => {
            let routing = route(b, moe, x);
            let branches = moe.experts.iter().map(|e| {
                let gate = e.gate.as_ref().unwrap_or(&e.up);
                (matrix(b, gate), matrix(b, &e.up))
            });
            let experts: Vec<_> = branches.collect();
            let act = moe.experts.first().map_or(Activation::Silu, |e| e.act);
            let inner = b.moe_gate_up(x, &routing, &experts, act);
            let shared = moe.shared.as_ref();
            MlpInner {
                inner,
                routing: Some(routing),
                shared: shared.map(|s| dense_inner(b, &s.mlp, x)),
                share: shared.and_then(|s| share(b, s, x)),
            }
        }
    }
}

/// Adds the down products to `hidden`, in place.
pub fn mlp_output(b: &mut PlanBuilder, layer: &LayerSpec, inner: &MlpInner, hidden: Slot) -> Slot {
    let how = (layer.mlp_post.as_ref(), layer.residual_scale);
    match (&layer.mlp, &inner.routing) {
        (MlpSpec::Moe(moe), Some(routing)) => {
            let experts: Vec<_> = moe.experts.iter().map(|e| matrix(b, &e.down)).collect();
            let hidden = b.moe_down(inner.inner, routing, &experts, hidden);
            match (&moe.shared, inner.shared) {
                (Some(shared), Some(x)) => add_shared(b, shared, (x, inner.share), hidden),
                _ => hidden,
            }
        }
        (MlpSpec::Dense(mlp), _) => add(b, &mlp.down, how, inner.inner, hidden),
        (MlpSpec::Moe(_), None) => hidden,
    }
}

fn dense_inner(b: &mut PlanBuilder, mlp: &DenseMlp, x: Slot) -> Slot {
    b.tap(&mlp.gate_up_site(), x);
    let up = part(b, &mlp.up);
    let inner = match &mlp.gate {
        Some(gate) => {
            let args = GateUpArgs {
                gate: part(b, gate),
                up,
                act: mlp.act,
            };
            b.gate_up(x, &args)
        }
        None => {
            let inner = b.linear(x, &[up])[0];
            b.activate(inner, mlp.act)
        }
    };
    b.tap(&mlp.down.key, inner);
    inner
}

/// Chooses the experts of each row.
pub fn route(b: &mut PlanBuilder, moe: &MoeSpec, x: Slot) -> Routing {
    b.tap(&moe.router.key, x);
    let router = part(b, &moe.router);
    let logits = b.linear(x, &[router])[0];
    b.moe_route(logits, moe.top_k, moe.norm)
}

fn share(b: &mut PlanBuilder, shared: &SharedExpert, x: Slot) -> Option<Slot> {
    let gate = part(b, shared.gate.as_ref()?);
    let share = b.linear(x, &[gate])[0];
    Some(b.activate(share, Activation::Sigmoid))
}

fn add_shared(
    b: &mut PlanBuilder,
    shared: &SharedExpert,
    (x, share): (Slot, Option<Slot>),
    hidden: Slot,
) -> Slot {
    let down = part(b, &shared.mlp.down);
    match share {
        Some(share) => {
            let product = b.linear(x, &[down])[0];
            b.scale_rows_add(product, share, hidden)
        }
        None => b.linear_add(x, &down, hidden),
    }
}
