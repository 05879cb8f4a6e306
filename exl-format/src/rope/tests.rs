use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn config(root: Value) -> ConfigFile {
    ConfigFile::from_value(Path::new("config.json"), root).unwrap()
}

fn read(root: Value) -> RopeConfig {
    config(root).rope(None).unwrap()
}

fn refused(root: Value) -> String {
    config(root).rope(None).unwrap_err().to_string()
}

fn plain(theta: f64) -> RopeConfig {
    RopeConfig {
        theta,
        partial_rotary_factor: 1.0,
        kind: RopeKind::Default,
        mrope_section: None,
    }
}

#[test]
fn plain_in_every_spelling() {
    assert_eq!(read(json!({})), plain(10_000.0));
    assert_eq!(
        read(json!({"rope_theta": 500000, "rope_scaling": null})),
        plain(500_000.0)
    );
    assert_eq!(
        read(json!({"attn_config": {"rope_theta": 5e5}})),
        plain(500_000.0)
    );
    assert_eq!(
        read(json!({"text_config": {"rope_theta": 1e6}})),
        plain(1e6)
    );
    let five = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
    assert_eq!(read(five), plain(1e6));
    let nested = json!({"text_config": {"rope_parameters": {"rope_theta": 1e6}}});
    assert_eq!(read(nested), plain(1e6));
    let part = RopeConfig {
        partial_rotary_factor: 0.5,
        ..plain(10_000.0)
    };
    assert_eq!(read(json!({"partial_rotary_factor": 0.5})), part);
    assert_eq!(
        read(json!({"rope_parameters": {"partial_rotary_factor": 0.5}})),
        part
    );
}

#[test]
fn llama3_of_both_versions() {
    let fields = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let expected = RopeKind::Llama3(Llama3Rope {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    });
    for name in ["type", "rope_type"] {
        let mut four = fields.clone();
        four[name] = json!("llama3");
        let found = read(json!({"rope_theta": 5e5, "rope_scaling": four}));
        assert_eq!((found.theta, &found.kind), (5e5, &expected));
        let mut five = fields.clone();
        five["rope_type"] = json!("llama3");
        five["rope_theta"] = json!(5e5);
        assert_eq!(read(json!({"rope_parameters": five})), found);
    }
}

#[test]
fn linear_and_dynamic() {
    let scaling = |kind: &str| json!({"rope_scaling": {"type": kind, "factor": 4}});
    assert_eq!(
        read(scaling("linear")).kind,
        RopeKind::Linear { factor: 4.0 }
    );
    assert_eq!(
        read(scaling("dynamic")).kind,
        RopeKind::Dynamic { factor: 4.0 }
    );
    assert_eq!(read(scaling("default")).kind, RopeKind::Default);
}

#[test]
fn yarn_with_and_without_defaults() {
    let least = json!({
        "max_position_embeddings": 32768,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    });
    let expected = YarnRope {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        attention_factor: None,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    assert_eq!(read(least).kind, RopeKind::Yarn(expected));
    let all = json!({"rope_parameters": {
        "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "attention_factor": 1.5, "beta_fast": 64, "beta_slow": 2, "mscale": 0.707,
        "mscale_all_dim": 1.0, "truncate": false,
    }});
    let expected = YarnRope {
        factor: 40.0,
        original_max_position_embeddings: 4096,
        attention_factor: Some(1.5),
        beta_fast: 64.0,
        beta_slow: 2.0,
        mscale: Some(0.707),
        mscale_all_dim: Some(1.0),
        truncate: false,
    };
    assert_eq!(read(all).kind, RopeKind::Yarn(expected));
}

#[test]
fn longrope_with_the_context_at_the_top() {
    for name in ["su", "longrope"] {
        let found = read(json!({
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": name, "short_factor": [1, 1.5], "long_factor": [2, 3.5]},
        }));
        let expected = LongRope {
            short_factor: vec![1.0, 1.5],
            long_factor: vec![2.0, 3.5],
            original_max_position_embeddings: 4096,
            factor: None,
            attention_factor: None,
        };
        assert_eq!(found.kind, RopeKind::LongRope(expected));
    }
}

/// transformers writes such configurations back with both spellings.
#[test]
fn multimodal_sections() {
    for kind in [
        json!({"type": "mrope", "mrope_section": [16, 24, 24]}),
        json!({"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}),
        json!({"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}),
    ] {
        let found = read(json!({"rope_scaling": kind}));
        assert_eq!(
            (found.kind, found.mrope_section),
            (RopeKind::Default, Some([16, 24, 24]))
        );
    }
    let text = refused(json!({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}));
    assert!(
        text.contains("rope_scaling->mrope_section: expected three whole numbers"),
        "{text}"
    );
}

#[test]
fn parameters_by_layer_type() {
    let five = config(json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}));
    let four = config(json!({
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }));
    for c in [five, four] {
        let full = RopeConfig {
            kind: RopeKind::Linear { factor: 8.0 },
            ..plain(1e6)
        };
        assert_eq!(c.rope(None).unwrap(), full);
        assert_eq!(c.rope(Some("full_attention")).unwrap(), full);
        assert_eq!(c.rope(Some("sliding_attention")).unwrap(), plain(1e4));
    }
    let lacking = config(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}));
    let text = lacking
        .rope(Some("sliding_attention"))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("parameters for layers of type sliding_attention"),
        "{text}"
    );
}

#[test]
fn impossible_values() {
    let yarn = |key: &str, value: Value| {
        let mut fields = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
        });
        fields[key] = value;
        refused(json!({"rope_scaling": fields}))
    };
    for (text, expected) in [
        (
            refused(json!({"rope_theta": "big"})),
            "rope_theta or attn_config->rope_theta: expected",
        ),
        (
            refused(json!({"rope_theta": 0})),
            "rope_theta: expected a number above 1, found 0",
        ),
        (
            refused(json!({"partial_rotary_factor": 1.5})),
            "partial_rotary_factor: expected",
        ),
        (
            refused(json!({"rope_scaling": 4})),
            "rope_scaling: expected an object, found 4",
        ),
        (
            refused(json!({"rope_scaling": {"type": "ntk"}})),
            "rope_scaling->rope_type: expected",
        ),
        (
            refused(json!({"rope_scaling": {"type": 7}})),
            "type: expected a string, found 7",
        ),
        (
            refused(json!({"rope_scaling": {"type": "linear"}})),
            "rope_scaling->factor: expected",
        ),
        (
            yarn("factor", json!(-1)),
            "rope_scaling->factor: expected a number above 0, found -1",
        ),
        (
            yarn("factor", json!("x")),
            "rope_scaling->factor: expected a number, found \"x\"",
        ),
        (
            yarn("original_max_position_embeddings", json!(0)),
            "expected a number above 0",
        ),
        (
            yarn("original_max_position_embeddings", json!(null)),
            "expected a whole number",
        ),
        (
            yarn("truncate", json!(1)),
            "truncate: expected true or false",
        ),
        (
            refused(json!({"rope_scaling": {
                "type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
            }})),
            "high_freq_factor: expected a number above low_freq_factor (4)",
        ),
        (
            refused(json!({"rope_scaling": {
                "type": "longrope", "short_factor": [1], "long_factor": [1, 2],
            }})),
            "long_factor: expected 1 numbers, as many as short_factor, found 2",
        ),
        (
            refused(json!({"rope_scaling": {"type": "longrope", "short_factor": [0]}})),
            "short_factor: expected a list of numbers above 0, found a list of 1",
        ),
    ] {
        assert!(
            text.starts_with("config.json: ") && text.contains(expected),
            "{text}"
        );
    }
}
