//! GPT-2, and GPT-BigCode (StarCoder, SantaCoder) with one key head for all queries: learned
//! positions, layer norms, an MLP of one branch.

use exl_format::{ConfigFile, FileNames, Split};
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, phi3};
use crate::params::{MAX_SIZE, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "gpt2",
    names: &["GPT2LMHeadModel"],
    parse,
    files,
};

pub(super) const BIGCODE: Arch = Arch {
    family: "gpt_bigcode",
    names: &["GPTBigCodeForCausalLM"],
    parse: parse_bigcode,
    files: bigcode_files,
};

fn decoder(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let p = Params(config);
    let hidden = p.size(&["n_embd", "hidden_size"], MAX_SIZE)?;
    let config = config.with_defaults(&json!({
        "tie_word_embeddings": true, "n_inner": 4 * hidden, "layer_norm_epsilon": 1e-5,
        "n_positions": 1024, "activation_function": "gelu_new",
    }));
    Ok(Decoder::new(family, &config, options)?.into_gpt())
}

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    refuse(config, "scale_attn_by_inverse_layer_idx", true)?;
    refuse(config, "scale_attn_weights", false)?;
    decoder("gpt2", config, options)?.spec()
}

fn parse_bigcode(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    refuse(config, "multi_query", false)?;
    refuse(config, "scale_attn_weights", false)?;
    let config = config.with_defaults(&json!({
        "num_key_value_heads": 1, "activation_function": "gelu_pytorch_tanh",
    }));
    decoder("gpt_bigcode", &config, options)?.spec()
}

/// Refuses a variant that no published model uses.
fn refuse(config: &ConfigFile, key: &str, value: bool) -> Result<()> {
    let keys = [key];
    let lookup = config.key(&keys);
    match lookup.flag()? {
        Some(found) if found == value => {
            Err(lookup.error((!value).to_string(), found.to_string()).into())
        }
        _ => Ok(()),
    }
}

/// Files may have `transformer.` before every name, and hold matrices as `[inputs, outputs]`.
fn files(spec: &Spec) -> FileNames {
    let mut names = FileNames::renaming(&[
        ("$transformer.", ""),
        ("$ln_f.", "model.norm."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".attn.c_attn.", ".self_attn.c_attn."),
        ("$h.", "model.layers."),
        ("$wte.", "model.embed_tokens."),
        ("$wpe.", "model.wpe."),
    ]);
    let turned = |split: Split| Split {
        axis: 1,
        transposed: true,
        ..split
    };
    let whole = ["self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"];
    names.splits = whole.iter().map(|n| turned(Split::whole(n, n))).collect();
    names
        .splits
        .push(turned(phi3::qkv(spec, "self_attn.c_attn")));
    names
}

fn bigcode_files(spec: &Spec) -> FileNames {
    let mut names = FileNames::renaming(&[
        ("$transformer.ln_f.", "model.norm."),
        ("$transformer.", "model."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".attn.c_attn.", ".self_attn.c_attn."),
        (".h.", ".layers."),
        (".wte.", ".embed_tokens."),
    ]);
    names.splits = vec![phi3::qkv(spec, "self_attn.c_attn")];
    names
}
