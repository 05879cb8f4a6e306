//! Phi-3, 3.5 and 4: Llama with fused q/k/v and gate/up.

use exl_format::{ConfigFile, FileNames, Split};

use super::Arch;
use super::decoder::Decoder;
use super::sizes::window;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "phi3",
    names: &["Phi3ForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = Decoder::new("phi3", config, options)?;
    d.windows = vec![window(Params(config))?; d.sizes.layers];
    (d.qkv_bias, d.o_bias, d.mlp_bias) = (false, false, false);
    d.spec()
}

fn files(spec: &Spec) -> FileNames {
    FileNames {
        splits: vec![qkv(spec, "self_attn.qkv_proj"), gate_up(spec)],
        ..FileNames::default()
    }
}

/// Queries, keys and values one after the other.
pub(super) fn qkv(spec: &Spec, fused: &str) -> Split {
    let (q, kv) = spec.qkv_outputs();
    let parts = [
        ("self_attn.q_proj", q),
        ("self_attn.k_proj", kv),
        ("self_attn.v_proj", kv),
    ];
    Split::consecutive(fused, &parts)
}

/// Gate and up one after the other.
pub(super) fn gate_up(spec: &Spec) -> Split {
    let inner = spec.dense_inner();
    let parts = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)];
    Split::consecutive("mlp.gate_up_proj", &parts)
}
