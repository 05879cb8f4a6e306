//! The feed-forward half of a layer.

use exl_tensor::{GateUpArgs, PlanBuilder, Slot};

use super::{norm, part};
use crate::spec::LayerSpec;

/// `hidden += down(act(gate x) * up x)` with `x = norm(hidden)`, in place; taps the inputs of
/// gate, up and down.
pub fn mlp(b: &mut PlanBuilder, layer: &LayerSpec, hidden: Slot) -> Slot {
    let mlp = &layer.mlp;
    let x = norm(b, &layer.mlp_norm, hidden);
    b.tap(&mlp.gate_up_site(), x);
    let args = GateUpArgs {
        gate: part(b, &mlp.gate),
        up: part(b, &mlp.up),
        act: mlp.act,
    };
    let inner = b.gate_up(x, &args);
    b.tap(&mlp.down.key, inner);
    let down = part(b, &mlp.down);
    b.linear_add(inner, &down, hidden)
}
