//! InternLM2 and 2.5: Llama with names of its own, and q, k and v fused group by group.

use std::ops::Range;

use exl_format::{ConfigFile, FileNames, Split, SplitPart};

use super::Arch;
use super::decoder::Decoder;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "internlm2",
    names: &["InternLM2ForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = Decoder::new("internlm2", config, options)?;
    let bias = Params(config).flag("bias")?;
    (d.qkv_bias, d.o_bias, d.mlp_bias) = (bias, bias, false);
    d.names.attn_norm = Some("attention_norm");
    d.names.mlp_norm = Some("ffn_norm");
    d.names.mlp = "feed_forward";
    (d.names.gate, d.names.up, d.names.down) = (Some("w1"), "w3", "w2");
    d.spec()
}

fn files(spec: &Spec) -> FileNames {
    let mut names = FileNames::renaming(&[
        ("$output.", "lm_head."),
        ("$model.tok_embeddings.", "model.embed_tokens."),
        (".attention.", ".self_attn."),
        (".wo.", ".o_proj."),
    ]);
    let Some(attn) = spec.layers.first().map(|l| &l.attn) else {
        return names;
    };
    // Of every key head: its query heads, itself, its value head.
    let (per, d) = (attn.heads / attn.kv_heads, attn.head_dim);
    let ranges = |from: usize, to: usize| -> Vec<Range<usize>> {
        let group = |g: usize| (g * (per + 2) + from) * d..(g * (per + 2) + to) * d;
        (0..attn.kv_heads).map(group).collect()
    };
    let part = |name: &str, ranges| SplitPart {
        name: format!("self_attn.{name}"),
        ranges,
    };
    names.splits = vec![Split {
        parts: vec![
            part("q_proj", ranges(0, per)),
            part("k_proj", ranges(per, per + 1)),
            part("v_proj", ranges(per + 1, per + 2)),
        ],
        ..Split::whole("self_attn.wqkv", "")
    }];
    names
}
