//! The attention half of a layer.

use exl_tensor::{AttnArgs, PlanBuilder, RopeArgs, Slot};

use super::{add, head_norm, norm, part};
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
    let x = attention_input(b, layer, hidden);
    let mixed = attention_mixed(b, spec, layer, cache, x);
    attention_output(b, layer, mixed, hidden)
}

/// What q, k and v read.
pub fn attention_input(b: &mut PlanBuilder, layer: &LayerSpec, hidden: Slot) -> Slot {
    let x = norm(b, layer.attn_norm.as_ref(), hidden);
    b.tap(&layer.attn.qkv_site(), x);
    x
}

/// From the input of q, k and v to that of o; writes the cache.
pub fn attention_mixed(
    b: &mut PlanBuilder,
    spec: &Spec,
    layer: &LayerSpec,
    cache: usize,
    x: Slot,
) -> Slot {
    let attn = &layer.attn;
    let parts = [&attn.q, &attn.k, &attn.v].map(|l| part(b, l));
    let slots = b.linear(x, &parts);
    let [mut q, mut k, v] = [slots[0], slots[1], slots[2]];
    if let Some(limit) = attn.clip {
        [q, k, v]
            .into_iter()
            .for_each(|slot| PlanBuilder::clamp(b, slot, limit));
    }
    if let Some(n) = &attn.q_norm {
        q = head_norm(b, n, attn.heads, q);
    }
    if let Some(n) = &attn.k_norm {
        k = head_norm(b, n, attn.kv_heads, k);
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
    mixed
}

/// Adds the output projection of what was mixed to `hidden`, in place.
pub fn attention_output(b: &mut PlanBuilder, layer: &LayerSpec, mixed: Slot, hidden: Slot) -> Slot {
    let how = (layer.attn_post.as_ref(), layer.residual_scale);
    add(b, &layer.attn.o, how, mixed, hidden)
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
