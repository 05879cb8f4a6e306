use std::path::Path;

use serde_json::json;

use super::*;
use crate::testing::{Part, TempDir, bytes_of_u16, bytes_of_u32, crc32, file_of, open};

const K: u32 = 128;
const N: u32 = 32;

/// Packs 4-bit values eight to a word.
fn nibbles(values: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let values: Vec<u32> = values.into_iter().collect();
    let word = |c: &[u32]| c.iter().rev().fold(0, |w, v| w << 4 | v & 15);
    values.chunks(8).map(word).collect()
}

/// The format's test vector.
fn vector() -> Vec<Part> {
    let q = |k: u32, n: u32| (13 * k * k + 29 * n + 3 * k * n + 7) % 16;
    let words = (0..K / 8)
        .flat_map(|r| (0..N).map(move |n| (0..8).fold(0, |w, i| w | q(8 * r + i, n) << (4 * i))));
    let zero = |i: u32| (7 * (i / N) + 5 * (i % N) + 2) % 16;
    let scale = |i: u32| 0x2000 + ((257 * (i / N) + 31 * (i % N)) % 0x800) as u16;
    let g_idx = (0..K).map(|k| (37 * k + 11) % 128 / 32);
    let part = |suffix: &str, dtype, shape: &[usize], data| {
        (format!("p.{suffix}"), dtype, shape.to_vec(), data)
    };
    vec![
        part("qweight", "I32", &[16, 32], bytes_of_u32(words)),
        part(
            "qzeros",
            "I32",
            &[4, 4],
            bytes_of_u32(nibbles((0..4 * N).map(zero))),
        ),
        part(
            "scales",
            "F16",
            &[4, 32],
            bytes_of_u16((0..4 * N).map(scale)),
        ),
        part("g_idx", "I32", &[128], bytes_of_u32(g_idx)),
    ]
}

fn read(parts: &[Part], format: GptqFormat) -> Result<GptqLinear> {
    GptqLinear::read_as(&open(file_of(parts)).unwrap(), "p", format)
}

#[test]
fn complete_vector() {
    let parts = vector();
    let sums: Vec<u32> = parts.iter().map(|p| crc32(&p.3)).collect();
    assert_eq!(sums, [0xd220_d3b7, 0x92a8_7d97, 0x62ec_9d73, 0xba0e_149b]);
    let layer = read(&parts, GptqFormat::default()).unwrap();
    assert_eq!(
        (layer.inputs, layer.outputs, layer.group_size),
        (128, 32, 32)
    );
    assert_eq!(layer.zero_offset, 1);
    let w = layer.dequantize_f16();
    assert_eq!(w[..4], [0x2800, 0xa81f, 0xae5d, 0x2e8c]);
    assert_eq!(crc32(&bytes_of_u16(w)), 0x935f_dc39);
}

#[test]
fn true_zeros() {
    let v1 = read(&vector(), GptqFormat::default()).unwrap();
    let format = GptqFormat {
        true_zeros: true,
        group_size: Some(32),
    };
    let mut parts = vector();
    // The same matrix in the other convention; a stored 15 has no counterpart there.
    let zeros: Vec<u32> = nibbles((0..4 * N).map(|i| (7 * (i / N) + 5 * (i % N) + 3) % 16));
    parts[1].3 = bytes_of_u32(zeros);
    let v2 = read(&parts, format).unwrap();
    assert_eq!(v2.zero_offset, 0);
    let (a, b) = (v1.dequantize_f16(), v2.dequantize_f16());
    let g = v1.g_idx.unwrap();
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let stored = (7 * g[i / 32] + 5 * (i as u32 % 32) + 2) % 16;
        assert_eq!(a == b, stored != 15, "value {i}");
    }
}

#[test]
fn group_index_that_says_nothing() {
    for idx in [(0..K).map(|k| k / 32).collect::<Vec<_>>(), vec![0; 128]] {
        let mut parts = vector();
        parts[3].3 = bytes_of_u32(idx);
        let layer = read(&parts, GptqFormat::default()).unwrap();
        assert_eq!(layer.g_idx, None);
        parts.truncate(3);
        assert_eq!(read(&parts, GptqFormat::default()).unwrap(), layer);
    }
}

#[test]
fn biases_and_scales_of_other_types() {
    let mut parts = vector();
    let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
    let wide = parts[2]
        .3
        .chunks(2)
        .flat_map(|b| half(b).to_le_bytes())
        .collect();
    parts[2] = ("p.scales".to_owned(), "F32", vec![4, 32], wide);
    parts.push((
        "p.bias".to_owned(),
        "F16",
        vec![32],
        bytes_of_u16([0x8000; 32]),
    ));
    let layer = read(&parts, GptqFormat::default()).unwrap();
    assert_eq!(layer, read(&vector(), GptqFormat::default()).unwrap());
    parts[4].3[0] = 1;
    let layer = read(&parts, GptqFormat::default()).unwrap();
    assert_eq!(layer.bias.unwrap()[..2], [0x8001, 0x8000]);
    parts[4] = (
        "p.bias".to_owned(),
        "BF16",
        vec![32],
        bytes_of_u16([0x3f80; 32]),
    );
    let layer = read(&parts, GptqFormat::default()).unwrap();
    assert_eq!(layer.bias.unwrap(), [0x3c00; 32]);
}

#[test]
fn a_scale_that_is_no_number_is_named() {
    for bad in [0x7c00u16, 0xfe00] {
        let mut parts = vector();
        parts[2].3[6..8].copy_from_slice(&bad.to_le_bytes());
        let error = read(&parts, GptqFormat::default()).unwrap_err().to_string();
        assert!(
            error.contains("p.scales: expected finite scales"),
            "{error}"
        );
        assert!(error.ends_with("at 3"), "{error}");
    }
}

#[test]
fn broken_layers() {
    let refused = |at: usize, dtype: &'static str, shape: &[usize], bytes: usize| {
        let mut parts = vector();
        parts[at].1 = dtype;
        parts[at].2 = shape.to_vec();
        parts[at].3.resize(bytes, 1);
        read(&parts, GptqFormat::default()).unwrap_err().to_string()
    };
    for (text, expected) in [
        (
            refused(0, "U32", &[16, 32], 2048),
            "p.qweight: expected I32",
        ),
        (
            refused(0, "I32", &[16, 28], 1792),
            "p.qweight: expected [inputs / 8, a multiple of 8",
        ),
        (
            refused(0, "I32", &[0, 32], 0),
            "p.qweight: expected [inputs / 8",
        ),
        (
            refused(0, "I32", &[32, 32], 4096),
            "p.g_idx: expected 256 numbers for 4-bit codes",
        ),
        (
            refused(1, "I32", &[4, 3], 48),
            "p.qzeros: expected shape [groups, 4]",
        ),
        (
            refused(1, "I32", &[0, 4], 0),
            "p.qzeros: expected shape [groups, 4]",
        ),
        (
            refused(2, "F16", &[3, 32], 192),
            "p.scales: expected shape [4, 32], found [3, 32]",
        ),
        (
            refused(2, "I16", &[4, 32], 256),
            "p.scales: expected F32, F16 or BF16, found I16",
        ),
        (
            refused(3, "I32", &[127], 508),
            "p.g_idx: expected 128 numbers for 4-bit codes",
        ),
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let mut parts = vector();
    parts[3].3[..4].fill(0xff);
    let text = read(&parts, GptqFormat::default()).unwrap_err().to_string();
    assert!(
        text.ends_with("expected groups below 4, found -1 at feature 0"),
        "{text}"
    );
    let format = GptqFormat {
        true_zeros: false,
        group_size: Some(64),
    };
    let text = read(&vector(), format).unwrap_err().to_string();
    assert!(
        text.ends_with("4 groups for 128 features (group_size 64 declared)"),
        "{text}"
    );
}

#[test]
fn declared_formats() {
    let read = |value| {
        let config = ConfigFile::from_value(Path::new("config.json"), value).unwrap();
        GptqFormat::read(&config).map_err(|e| e.to_string())
    };
    let plain = json!({"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": true});
    let format = GptqFormat {
        true_zeros: false,
        group_size: Some(128),
    };
    assert_eq!(read(plain), Ok(format));
    let v2 = json!({"bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"});
    assert_eq!(
        read(v2),
        Ok(GptqFormat {
            true_zeros: true,
            group_size: None
        })
    );
    let text = read(json!({"bits": 8})).unwrap_err();
    assert!(
        text.starts_with("config.json: bits: expected 4 (other widths"),
        "{text}"
    );
    assert!(text.ends_with("found 8"), "{text}");
    assert!(
        read(json!({"quant_method": "awq"}))
            .unwrap_err()
            .ends_with("found awq")
    );
    assert!(
        read(json!({"checkpoint_format": "marlin"}))
            .unwrap_err()
            .ends_with("found marlin")
    );
}

#[test]
fn reads_by_the_configuration_of_a_model() {
    let dir = TempDir::new();
    dir.put("model.safetensors", file_of(&vector()));
    let config = |block| json!({"quantization_config": block}).to_string();
    dir.put(
        "config.json",
        config(json!({"bits": 4, "checkpoint_format": "gptq_v2"})),
    );
    let open = || ModelFiles::open(dir.path()).unwrap();
    assert_eq!(GptqLinear::read(&open(), "p").unwrap().zero_offset, 0);
    dir.put("config.json", config(json!({"bits": 3})));
    GptqLinear::read(&open(), "p").unwrap_err();
    dir.put("config.json", "{}");
    assert_eq!(GptqLinear::read(&open(), "p").unwrap().zero_offset, 1);
    dir.put("quantize_config.json", r#"{"bits": 8}"#);
    let text = GptqLinear::read(&open(), "p").unwrap_err().to_string();
    assert!(text.contains("quantize_config.json: bits"), "{text}");
}
