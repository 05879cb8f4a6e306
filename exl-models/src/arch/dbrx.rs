//! DBRX: layer norms without a bias, bounded queries, keys and values, experts in three fused
//! tensors.

use exl_format::{ConfigFile, FileNames, Split};
use exl_tensor::RouteNorm;
use serde_json::json;

use super::decoder::{Decoder, Experts};
use super::{Arch, phi3};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::spec::{MlpSpec, NormKind};
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "dbrx",
    names: &["DbrxForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    // The norms have torch's default.
    let config = config.with_defaults(&json!({"layer_norm_eps": 1e-5}));
    let p = Params(&config);
    let mut d = Decoder::new("dbrx", &config, options)?;
    d.norm = NormKind::Layer { bias: false };
    d.clip = p.above_zero("attn_config->clip_qkv")?.map(|c| c as f32);
    let norm = match p.key(&["ffn_config"]).value() {
        // transformers' default is 1; null turns it off.
        Some(ffn) if ffn.get("moe_normalize_expert_weights").is_some() => {
            p.above_zero("ffn_config->moe_normalize_expert_weights")?
        }
        _ => Some(1.0),
    };
    let norm = norm.map_or(RouteNorm::None, |p| RouteNorm::Norm(p as f32));
    let mut experts = Experts::read(p, d.sizes.inner, norm)?;
    experts.block = "block_sparse_moe";
    experts.names = ["w1", "v1", "w2"];
    d.experts = Some(experts);
    d.spec()
}

fn files(spec: &Spec) -> FileNames {
    let mut names = FileNames::renaming(&[
        ("$transformer.", "model."),
        (".blocks.", ".layers."),
        (".ffn.experts.mlp.", ".block_sparse_moe.experts."),
        (".ffn.router.layer.", ".block_sparse_moe.gate."),
        (".norm_attn_norm.norm_1.", ".input_layernorm."),
        (".norm_attn_norm.norm_2.", ".post_attention_layernorm."),
        (".norm_attn_norm.attn.", ".self_attn."),
        (".out_proj.", ".o_proj."),
        (".norm_f.", ".norm."),
        (".wte.", ".embed_tokens."),
    ]);
    names.splits = vec![phi3::qkv(spec, "self_attn.Wqkv")];
    let moe = spec.layers.first().map(|l| &l.mlp);
    let Some(MlpSpec::Moe(moe)) = moe else {
        return names;
    };
    let inner = moe.experts.first().map_or(0, |e| e.up.outputs);
    for name in ["w1", "v1", "w2"] {
        let parts = (0..moe.experts.len()).map(|e| format!("experts.{e}.{name}"));
        let parts: Vec<String> = parts.collect();
        let parts: Vec<(&str, usize)> = parts.iter().map(|p| (p.as_str(), inner)).collect();
        names.splits.push(Split {
            transposed: name == "w2",
            ..Split::consecutive(&format!("experts.{name}"), &parts)
        });
    }
    names
}
