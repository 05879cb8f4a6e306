use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{Module, WeightKind, layout, sites};

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 250, "rms_norm_eps": 1e-6, "max_position_embeddings": 256
    })
}

fn with(changes: Value) -> Value {
    let mut config = llama();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn file(config: Value) -> ConfigFile {
    ConfigFile::from_value(Path::new("m/config.json"), config).unwrap()
}

fn spec(changes: Value) -> Result<Spec> {
    let config = with(changes);
    parse(&file(config), &RopeOptions::default(), false)
}

fn message(changes: Value) -> String {
    spec(changes).unwrap_err().to_string()
}

#[test]
fn unknown_architecture_names_the_nearest_and_the_way_out() {
    let text = message(json!({"architectures": ["Qwen7ForCausalLM"]}));
    assert!(
        text.starts_with("m/config.json: unknown architecture \"Qwen7ForCausalLM\""),
        "{text}"
    );
    assert!(
        text.contains("\"Qwen2ForCausalLM\"") && text.contains("--assume-llama"),
        "{text}"
    );
    let config = with(json!({"architectures": ["MyLlama"]}));
    let spec = parse(&file(config), &RopeOptions::default(), true).unwrap();
    assert_eq!(
        (spec.family, spec.architecture.as_str()),
        ("llama", "MyLlama")
    );
}

#[test]
fn architectures_must_be_one_name() {
    assert!(message(json!({"architectures": []})).contains("architectures: expected exactly one"));
    assert!(message(json!({"architectures": null})).contains("architectures: expected a value"));
    assert!(message(json!({"architectures": "Llama"})).contains("expected a list"));
}

#[test]
fn impossible_sizes_are_refused() {
    assert!(
        message(json!({"num_key_value_heads": 3}))
            .contains("expected a divisor of the 4 query heads, found 3")
    );
    assert!(
        message(json!({"num_attention_heads": 6, "num_key_value_heads": 6}))
            .contains("divisor of hidden_size 64")
    );
    assert!(message(json!({"vocab_size": null})).contains("vocab_size: expected a value"));
    assert!(message(json!({"hidden_act": "relu6"})).contains("found relu6"));
}

#[test]
fn absurd_sizes_are_refused_under_their_key() {
    let keys = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
        "sliding_window",
    ];
    for key in keys {
        for value in [json!(u64::MAX), json!(1e15), json!(1u64 << 40)] {
            let text =
                message(json!({"architectures": ["MistralForCausalLM"], key: value.clone()}));
            assert!(text.starts_with("m/config.json: "), "{text}");
            assert!(
                text.contains(key) && text.contains(": expected "),
                "{value}: {text}"
            );
        }
    }
    let wide = json!({"num_attention_heads": 1 << 20, "num_key_value_heads": 1, "head_dim": 64});
    assert!(message(wide).contains("found 1048576 heads of 64"));
    let narrow = json!({"hidden_size": 1 << 20, "num_attention_heads": 1,
        "num_key_value_heads": 1});
    assert!(message(narrow).contains("found 1 heads of 1048576"));
    // The largest sizes that pass can be counted.
    let largest = json!({"hidden_size": 1 << 24, "intermediate_size": 1 << 24,
        "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12,
        "num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "vocab_size": 1 << 24,
        "max_position_embeddings": i32::MAX});
    let spec = spec(largest).unwrap();
    assert!(spec.parameters() > 1 << 62);
    let f16 = exl_tensor::KvType::F16;
    let request = crate::MemoryRequest::new((2, usize::MAX), f16, 1);
    assert_eq!(crate::model::memory_for(&spec, 0, &request).cache, u64::MAX);
}

#[test]
fn an_impossible_epsilon_is_refused() {
    for eps in [-1.0, 1.0] {
        let text = message(json!({"rms_norm_eps": eps}));
        assert!(
            text.contains("rms_norm_eps: expected a number of at least 0"),
            "{text}"
        );
    }
    assert!(spec(json!({"rms_norm_eps": 0})).is_ok());
}

#[test]
fn biases_follow_the_family() {
    let biased = |architecture: &str, changes: Value| {
        let mut changes = changes;
        changes["architectures"] = json!([architecture]);
        let spec = spec(changes).unwrap();
        let names: Vec<String> = layout(&spec)
            .into_iter()
            .filter(|k| k.bias.is_some() && k.module <= Module::Mlp(0))
            .map(|k| k.name.rsplit('.').next().unwrap().to_owned())
            .collect();
        names.join(" ")
    };
    assert_eq!(biased("LlamaForCausalLM", json!({})), "");
    assert_eq!(
        biased(
            "LlamaForCausalLM",
            json!({"attention_bias": true, "mlp_bias": true})
        ),
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    );
    assert_eq!(
        biased("Qwen2ForCausalLM", json!({})),
        "q_proj k_proj v_proj"
    );
    assert_eq!(biased("Qwen3ForCausalLM", json!({})), "");
}

#[test]
fn windows_follow_the_family() {
    let windows = |changes: Value| -> Vec<usize> {
        spec(changes)
            .unwrap()
            .layers
            .iter()
            .map(|l| l.attn.window)
            .collect()
    };
    let mistral = json!(["MistralForCausalLM"]);
    assert_eq!(
        windows(json!({"architectures": mistral, "sliding_window": 8})),
        [8, 8]
    );
    assert_eq!(
        windows(json!({"architectures": mistral, "sliding_window": null})),
        [0, 0]
    );
    let qwen = json!(["Qwen2ForCausalLM"]);
    assert_eq!(
        windows(json!({"architectures": qwen, "sliding_window": 8})),
        [0, 0]
    );
    let mut on = json!({"architectures": qwen, "sliding_window": 8, "use_sliding_window": true,
        "max_window_layers": 1});
    assert_eq!(windows(on.clone()), [0, 8]);
    on["layer_types"] = json!(["sliding_attention", "full_attention"]);
    assert_eq!(windows(on.clone()), [8, 0]);
    on["layer_types"] = json!(["sliding_attention"]);
    assert!(message(on).contains("expected 2 entries, found 1"));
}

#[test]
fn head_dim_is_independent_of_the_hidden_size() {
    let spec = spec(json!({"head_dim": 32})).unwrap();
    let attn = &spec.layers[0].attn;
    assert_eq!(
        (attn.q.outputs, attn.k.outputs, attn.o.inputs),
        (128, 64, 128)
    );
    assert_eq!(attn.scale, 1.0 / 32f32.sqrt());
    assert_eq!(spec.ropes[0].inv_freq.len(), 16);
}

#[test]
fn missing_keys_mean_what_transformers_takes_for_them() {
    let of = |architecture: &str| {
        spec(json!({
            "architectures": [architecture], "num_hidden_layers": 4, "rms_norm_eps": null,
            "max_position_embeddings": null, "num_key_value_heads": null
        }))
        .unwrap()
    };
    let olmo = of("Olmo3ForCausalLM");
    let windows: Vec<usize> = olmo.layers.iter().map(|l| l.attn.window).collect();
    assert_eq!(windows, [4096, 4096, 4096, 0]);
    let ernie = of("Ernie4_5ForCausalLM");
    let attn = &ernie.layers[0].attn;
    assert_eq!((attn.heads, attn.kv_heads, attn.head_dim), (4, 2, 128));
    assert_eq!((ernie.head.tied, ernie.max_context), (true, 131_072));
    assert_eq!(ernie.ropes[0].inv_freq[32], 5e5f32.powf(-0.5));
    let arcee = of("ArceeForCausalLM");
    assert_eq!((arcee.head.tied, arcee.max_context), (false, 4096));
    let crate::MlpSpec::Dense(mlp) = &arcee.layers[0].mlp else {
        panic!("no experts");
    };
    assert_eq!(
        (mlp.gate.is_none(), mlp.act),
        (true, exl_tensor::Activation::Relu2)
    );
    for spec in [olmo, ernie, arcee] {
        assert_eq!(spec.final_norm.eps, 1e-5, "{}", spec.family);
    }
}

#[test]
fn layers_that_slide_are_not_scaled() {
    let spec = spec(json!({
        "architectures": ["Olmo3ForCausalLM"], "num_hidden_layers": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}
    }))
    .unwrap();
    let first: Vec<f32> = spec
        .layers
        .iter()
        .filter_map(|l| l.attn.rope)
        .map(|table| spec.ropes[table].inv_freq[0])
        .collect();
    assert_eq!(first, [1.0, 1.0, 1.0, 0.5]);
}

#[test]
fn layout_lists_every_tensor_once_in_model_order() {
    let spec = spec(
        json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16,
        "tie_word_embeddings": true}),
    )
    .unwrap();
    let keys = layout(&spec);
    let names: Vec<&str> = keys.iter().map(|k| k.name.as_str()).collect();
    assert_eq!(names.len(), 1 + 2 * 11 + 2);
    assert_eq!(
        names[..3],
        [
            "model.embed_tokens",
            "model.layers.0.input_layernorm",
            "model.layers.0.self_attn.q_proj"
        ]
    );
    assert_eq!(names[names.len() - 2..], ["model.norm", "lm_head"]);
    assert!(keys.is_sorted_by_key(|k| k.module));
    let head = keys.last().unwrap();
    assert_eq!(
        head.kind,
        WeightKind::Head {
            tied_to: Some("model.embed_tokens".to_owned())
        }
    );
    assert_eq!(
        spec.parameters(),
        250 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 160) + 64
    );
}

#[test]
fn sites_group_the_linears_that_share_an_input() {
    let found: Vec<(String, usize, usize)> = sites(&spec(json!({})).unwrap())
        .into_iter()
        .map(|s| (s.name, s.inputs, s.linears.len()))
        .collect();
    let at = |name: &str, inputs, linears| (format!("model.layers.0.{name}"), inputs, linears);
    assert_eq!(
        found[..4],
        [
            at("self_attn.qkv", 64, 3),
            at("self_attn.o_proj", 64, 1),
            at("mlp.gate_up", 64, 2),
            at("mlp.down_proj", 96, 1)
        ]
    );
    assert_eq!(found.len(), 9);
    assert_eq!(found[8], ("lm_head".to_owned(), 64, 1));
}

#[test]
fn impossible_options_name_the_flag() {
    let refused = |options: RopeOptions| {
        parse(&file(llama()), &options, false)
            .unwrap_err()
            .to_string()
    };
    let text = refused(RopeOptions {
        scale: Some(-1.0),
        ..Default::default()
    });
    assert_eq!(text, "--rope-scale: expected a number above 0, found -1");
    let text = refused(RopeOptions {
        alpha: Some(f64::NAN),
        ..Default::default()
    });
    assert_eq!(text, "--rope-alpha: expected a number above 0, found NaN");
    let text = refused(RopeOptions {
        context: Some(0),
        ..Default::default()
    });
    assert_eq!(text, "--context: expected a number above 0, found 0");
}

/// Keys of some family or other.
const KEYS: [&str; 47] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "use_bias",
    "mlp_only_layers",
    "decoder_sparse_step",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "n_positions",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "scale_depth",
    "scale_emb",
    "dim_model_base",
    "logits_scaling",
    "attn_config",
    "ffn_config",
    "no_rope_layers",
    "no_rope_layer_interval",
    "seq_length",
];

/// Values that configurations should not hold, and some that they may.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        (0u32..64).prop_map(|bit| json!(1u64 << bit)),
        (0u64..9).prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|x| json!(x)),
        Just(json!(null)),
        Just(json!(true)),
        Just(json!("gelu")),
        Just(json!([1, "full_attention"])),
        Just(json!({"rope_type": "yarn", "factor": 1e300})),
        Just(json!({"rope_type": "dynamic", "factor": 0.5, "rope_theta": 1e-9})),
        Just(json!({"clip_qkv": -1, "kv_n_heads": 3, "moe_num_experts": 1u64 << 40})),
    ]
}

proptest! {
    /// Whatever a configuration says, reading it gives a spec whose weights can be counted or an
    /// error that names the file.
    #[test]
    fn no_configuration_panics(
        family in 0..registry().len(),
        changes in prop::collection::vec((0usize..KEYS.len(), any_value()), 1..9),
    ) {
        let mut config = json!({"architectures": [registry()[family].names[0]]});
        for (key, value) in changes {
            config[KEYS[key]] = value;
        }
        match spec(config) {
            Ok(spec) => prop_assert!(spec.parameters() > 0 && layout(&spec).len() > 8),
            Err(error) => prop_assert!(error.to_string().starts_with("m/config.json: "), "{error}"),
        }
    }
}
