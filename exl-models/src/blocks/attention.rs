//! The attention half of a layer.

use exl_tensor::{AttnArgs, PlanBuilder, RopeArgs, Slot};

use super::{head_norm, norm, part};
use crate::Spec;
use crate::spec::{AttnSpec, LayerSpec};

/// `hidden += o(attention(rope(qkv(norm(hidden)))))`, in place; taps the inputs of q, k, v and o.
pub fn attention(
    b: &mut PlanBuilder,
    spec: &Spec,
    layer: &LayerSpec,
    cache: usize,
    hidden: Slot,
) -> Slot {
    let attn = &layer.attn;
    let x = norm(b, &layer.attn_norm, hidden);
    b.tap(&attn.qkv_site(), x);
    let parts = [&attn.q, &attn.k, &attn.v].map(|l| part(b, l));
    let slots = b.linear(x, &parts);
    let [q, k, v] = [slots[0], slots[1], slots[2]];
    if let Some(n) = &attn.q_norm {
        head_norm(b, n, q);
    }
    if let Some(n) = &attn.k_norm {
        head_norm(b, n, k);
    }
    let rope = rope_args(b, spec, attn);
    b.rope_append([q, k, v], cache, &rope);
    let args = AttnArgs {
        heads: attn.heads,
        kv_heads: attn.kv_heads,
        head_dim: attn.head_dim,
        scale: attn.scale,
        softcap: attn.softcap,
        window: attn.window,
    };
    let mixed = b.attention(q, cache, &args);
    b.tap(&attn.o.key, mixed);
    let o = part(b, &attn.o);
    b.linear_add(mixed, &o, hidden)
}

fn rope_args(b: &mut PlanBuilder, spec: &Spec, attn: &AttnSpec) -> RopeArgs {
    let table = attn.rope.map(|i| (i, &spec.ropes[i]));
    RopeArgs {
        inv_freq: table.map(|(i, t)| b.weight(&Spec::rope_weight(i), &[t.inv_freq.len()])),
        heads: attn.heads,
        kv_heads: attn.kv_heads,
        head_dim: attn.head_dim,
        style: attn.style,
        attention_factor: table.map_or(1.0, |(_, t)| t.attention_factor),
        sections: table.and_then(|(_, t)| t.sections),
    }
}
