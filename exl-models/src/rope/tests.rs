use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn read(config: &Value) -> Result<RopeParams> {
    let head_dim = config["head_dim"].as_u64().unwrap() as usize;
    let max = config["max_position_embeddings"].as_u64().unwrap() as usize;
    let config = ConfigFile::from_value(Path::new("config.json"), config.clone()).unwrap();
    RopeParams::read(&config, None, head_dim, max)
}

fn table(config: &Value, options: RopeOptions) -> RopeTable {
    read(config).unwrap().table(&options)
}

fn base() -> Value {
    json!({"head_dim": 16, "max_position_embeddings": 256, "rope_theta": 10000.0})
}

fn assert_close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        // transformers works in 32 bits, its powers are off by a few units in the last place.
        assert!(
            (f64::from(*a) - b).abs() <= 3e-6 * b.abs(),
            "{found:?} is not {expected:?}"
        );
    }
}

/// Every kind of scaling against transformers (tests/golden/make.py).
#[test]
fn tables_equal_transformers() {
    let text = include_str!("../../tests/golden/rope.json");
    let cases: Vec<Value> = serde_json::from_str(text).unwrap();
    assert!(cases.len() > 15);
    for case in &cases {
        let context = case["context"].as_u64().map(|n| n as usize);
        let found = table(
            &case["config"],
            RopeOptions {
                context,
                ..Default::default()
            },
        );
        let list = case["inv_freq"].as_array().unwrap();
        let expected: Vec<f64> = list.iter().map(|v| v.as_f64().unwrap()).collect();
        assert_close(&found.inv_freq, &expected);
        let factor = case["attention_factor"].as_f64().unwrap() as f32;
        assert!(
            (found.attention_factor - factor).abs() < 1e-6,
            "{}",
            case["config"]
        );
    }
}

#[test]
fn both_spellings_give_the_same_table() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let mut old = base();
    old["rope_scaling"] = scaling.clone();
    let mut legacy = old.clone();
    legacy["rope_scaling"]["type"] = json!("llama3");
    let mut new = base();
    new.as_object_mut().unwrap().remove("rope_theta");
    new["rope_parameters"] = scaling;
    new["rope_parameters"]["rope_theta"] = json!(10000.0);
    let want = table(&old, RopeOptions::default());
    assert_ne!(want, table(&base(), RopeOptions::default()));
    assert_eq!(want, table(&legacy, RopeOptions::default()));
    assert_eq!(want, table(&new, RopeOptions::default()));
}

#[test]
fn user_scale_divides_positions_and_replaces_a_linear_factor() {
    let scaled = RopeOptions {
        scale: Some(4.0),
        ..Default::default()
    };
    let plain = table(&base(), RopeOptions::default());
    let found = table(&base(), scaled);
    let quarter: Vec<f64> = plain.inv_freq.iter().map(|f| f64::from(*f) / 4.0).collect();
    assert_close(&found.inv_freq, &quarter);
    let mut linear = base();
    linear["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    assert_eq!(table(&linear, scaled), found);
}

#[test]
fn alpha_stretches_the_base() {
    let found = table(
        &base(),
        RopeOptions {
            alpha: Some(3.0),
            ..Default::default()
        },
    );
    let theta = 10000.0 * 3f64.powf(16.0 / 14.0);
    let expected: Vec<f64> = (0..8).map(|i| theta.powf(-f64::from(i) / 8.0)).collect();
    assert_close(&found.inv_freq, &expected);
}

#[test]
fn impossible_settings_are_refused() {
    let message = |key: &str, value: Value| {
        let mut config = base();
        config[key] = value;
        read(&config).unwrap_err().to_string()
    };
    let unknown = message("rope_scaling", json!({"rope_type": "spiral"}));
    assert!(unknown.contains("found \"spiral\""), "{unknown}");
    let missing = message("rope_scaling", json!({"rope_type": "linear"}));
    assert!(missing.contains("rope_scaling->factor"), "{missing}");
    let short = message(
        "rope_scaling",
        json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    );
    assert!(
        short.contains("expected 8 numbers, one per rotated pair, found 1"),
        "{short}"
    );
    assert!(message("rope_theta", json!(0.5)).contains("a number above 1"));
    assert!(message("partial_rotary_factor", json!(0.2)).contains("found 3 of heads of 16"));
}

#[test]
fn axes_need_all_frequencies() {
    let sections = |head_dim: usize, part: f64, sections: Value| {
        let config = json!({
            "head_dim": head_dim, "max_position_embeddings": 256, "partial_rotary_factor": part,
            "rope_scaling": {"type": "mrope", "mrope_section": sections},
        });
        table(&config, RopeOptions::default()).sections
    };
    assert_eq!(sections(128, 1.0, json!([16, 24, 24])), Some([16, 24, 24]));
    assert_eq!(sections(128, 0.5, json!([8, 12, 12])), Some([8, 12, 12]));
    assert_eq!(sections(128, 0.5, json!([16, 24, 24])), None);
    assert_eq!(sections(128, 1.0, json!([u64::MAX, 24, 24])), None);
    assert_eq!(table(&base(), RopeOptions::default()).sections, None);
}
