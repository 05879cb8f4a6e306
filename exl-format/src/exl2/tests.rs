use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::testing::{Part, bytes_of_u16, bytes_of_u32, crc32, file_of, open, shared};
use crate::{Bytes, ModelFiles, SafetensorsFile, TensorSource};

/// Codes, columns first, as the format's test words take them.
fn words_of(bits: u8) -> Vec<u32> {
    let codes: Vec<u8> = (0..32)
        .map(|i| ((7 * i + 3) % (1u32 << bits)) as u8)
        .collect();
    let words = pack_codes(bits, 1, &codes).unwrap();
    assert_eq!(unpack_codes(bits, 1, &words).unwrap(), codes);
    words
}

#[test]
fn test_words_of_every_width() {
    assert_eq!(words_of(2), [0x1b1b1b1b, 0x1b1b1b1b]);
    assert_eq!(words_of(3), [0x53977053, 0x70539770, 0x97705397]);
    assert_eq!(
        words_of(4),
        [0x4d6f81a3, 0xc5e7092b, 0x4d6f81a3, 0xc5e7092b]
    );
    assert_eq!(
        words_of(5),
        [0x4dfc4543, 0x78245ba3, 0x0753617d, 0x4b276cf4, 0xe55c7066]
    );
    assert_eq!(
        words_of(6),
        [
            0x9f611283, 0x90bbd2d9, 0xb2579740, 0x8f201eb3, 0x9cab91d5, 0x71538703
        ]
    );
    assert_eq!(
        words_of(8),
        [
            0x18110a03, 0x342d261f, 0x5049423b, 0x6c655e57, 0x88817a73, 0xa49d968f, 0xc0b9b2ab,
            0xdcd5cec7
        ]
    );
}

#[test]
fn scale_words() {
    let codes = [15, 3, 0, 7, 8, 1, 14, 2];
    assert_eq!(pack_scales(&codes).unwrap(), [0x2e18_703f]);
    assert_eq!(unpack_scales(&[0x2e18_703f]), codes);
    assert!(pack_scales(&codes[..7]).is_err());
    assert!(pack_scales(&[16; 8]).is_err());
}

/// Both roundings, most of them in the subnormal range.
#[test]
fn scales_round_twice() {
    let scale = |max, s: u8| scale_f16(max, s - 1, 1.0).to_bits();
    assert_eq!(scale(0x3a80, 13), 0x384a);
    assert_eq!(scale(0x217a, 13), 0x1f3b);
    assert_eq!(scale(0x217b, 13), 0x1f3e);
    assert_eq!(scale(0x10eb, 16), 0x10e0);
    assert_eq!(scale(0x0c29, 16), 0x0c40);
    for s in 1..=16 {
        assert_eq!(scale(0x0080, s), 0);
    }
    // The first product is rounded with the extra factor in it.
    assert_eq!(scale_f16(0x0080, 0, 2.0).to_bits(), 1);
}

/// Worked values: a 4-bit group with maximum 0.8125 and scale code 12.
#[test]
fn worked_values() {
    let mut codes = vec![8; 32 * 32];
    codes[..4].copy_from_slice(&[0, 5, 8, 15]);
    let identity: Vec<u32> = (0..32).collect();
    let mut builder = Exl2Builder::new(32);
    builder.push_group(4, &codes, &[12; 32], 0x3a80).unwrap();
    let layer = builder.finish("p", &identity, None).unwrap();
    assert_eq!(layer.dequantize_f16()[..5], [0xc44a, 0xbe6f, 0, 0x4382, 0]);
}

/// The format's complete test vector: six groups, one of each width.
fn vector() -> Exl2Linear {
    let (n, rows) = (32, 32);
    let max = [0x3a80, 0x217a, 0x1c33, 0x2801, 0x0f00, 0x3bff];
    let mut builder = Exl2Builder::new(n);
    for (g, bits) in WIDTHS.into_iter().enumerate() {
        let code = |i: usize| {
            let (r, n) = (g * rows + i / n, i % n);
            ((31 * r * r + 17 * n + 7 * r * n + 5) % (1 << bits)) as u8
        };
        let codes: Vec<u8> = (0..rows * n).map(code).collect();
        let scales: Vec<u8> = (0..n).map(|n| ((5 * g + 3 * n + 1) % 16) as u8).collect();
        builder.push_group(bits, &codes, &scales, max[g]).unwrap();
    }
    let mut perm = vec![0; 192];
    for k in 0..192u32 {
        perm[(37 * k as usize + 11) % 192] = k;
    }
    builder.finish("p", &perm, None).unwrap()
}

fn sum(layer: &Exl2Linear, suffix: &str) -> u32 {
    let name = format!("p.{suffix}");
    let tensors = layer.to_tensors("p");
    crc32(&tensors.iter().find(|t| t.spec.name == name).unwrap().data)
}

#[test]
fn complete_vector() {
    let layer = vector();
    assert_eq!(sum(&layer, "q_weight"), 0x1c76_843e);
    assert_eq!(sum(&layer, "q_scale"), 0x9e72_f8ed);
    assert_eq!(sum(&layer, "q_scale_max"), 0x1d94_7f89);
    assert_eq!(sum(&layer, "q_groups"), 0x169b_4bd5);
    assert_eq!(sum(&layer, "q_invperm"), 0x53f2_e9bb);
    assert_eq!(crc32(&bytes_of_u32(layer.perm())), 0x7d80_9888);
    let h = |&m: &u16| half::f16::from_f32(half::f16::from_bits(m).to_f32() / 256.0).to_bits();
    assert_eq!(
        crc32(&bytes_of_u16(layer.q_scale_max.iter().map(h))),
        0xc765_4777
    );
    let w = layer.dequantize_f16();
    assert_eq!(crc32(&bytes_of_u16(w.clone())), 0x73a6_ae61);
    assert_eq!(
        layer.q_weight[..4],
        [0x1c812405, 0x42a03c16, 0x68bf5427, 0x8ede6c38]
    );
    assert_eq!(
        layer.q_scale[..4],
        [0x630da741, 0xeb852fc9, 0x630da741, 0xeb852fc9]
    );
    assert_eq!(w[..4], [0x3878, 0xc8ae, 0xc4e0, 0x4eb8]);
    assert_eq!(w[191 * 32..][..4], [0xb78f, 0xbe1f, 0x1bff, 0x0000]);
}

#[test]
fn shapes_of_the_vector() {
    let layer = vector();
    let shapes: Vec<_> = layer.to_tensors("p").into_iter().map(|t| t.spec).collect();
    assert_eq!(shapes, Exl2Linear::specs("p", 32, &layer.groups, false));
    let expected: [(&str, Dtype, &[usize]); 5] = [
        ("p.q_weight", Dtype::I32, &[28, 32]),
        ("p.q_scale", Dtype::I32, &[6, 4]),
        ("p.q_scale_max", Dtype::F16, &[6]),
        ("p.q_groups", Dtype::I16, &[12]),
        ("p.q_invperm", Dtype::I32, &[192]),
    ];
    for (spec, (name, dtype, shape)) in shapes.iter().zip(expected) {
        assert_eq!(
            (&*spec.name, spec.dtype, &*spec.shape),
            (name, dtype, shape)
        );
    }
}

/// 4096 x 4096 with a tenth of 4 bits and the rest of 3, groups of 128.
#[test]
fn size_accounting() {
    let mut groups = vec![Group { bits: 4, rows: 128 }; 4];
    groups.extend(vec![Group { bits: 3, rows: 128 }; 28]);
    assert_eq!(layer_bits(4096, &groups, false), 53_085_696);
    assert_eq!(layer_bits(4096, &groups, true), 53_085_696 + 16 * 4096);
    let specs = Exl2Linear::specs("p", 4096, &groups, false);
    let bytes: Vec<u64> = specs.iter().map(TensorSpec::bytes).collect();
    assert_eq!(bytes, [6_553_600, 65_536, 64, 128, 16_384]);
    let layer = vector();
    // On disk the table takes 32 bits per group, as accounted.
    let on_disk: usize = layer.to_tensors("p").iter().map(|t| t.data.len()).sum();
    assert_eq!(layer.bits(), 8 * on_disk as u64);
    assert_eq!(
        layer.bits_per_weight(),
        layer.bits() as f64 / (192.0 * 32.0)
    );
}

fn parts_of(layer: &Exl2Linear, key: &str) -> Vec<Part> {
    let part = |t: LayerTensor| (t.spec.name, t.spec.dtype.as_str(), t.spec.shape, t.data);
    layer.to_tensors(key).into_iter().map(part).collect()
}

fn read(parts: &[Part]) -> crate::Result<Exl2Linear> {
    Exl2Linear::read(&open(file_of(parts)).unwrap(), "p")
}

#[test]
fn reads_what_it_writes() {
    let mut layer = vector();
    assert_eq!(read(&parts_of(&layer, "p")).unwrap(), layer);
    layer.bias = Some((0..32).collect());
    let parts = parts_of(&layer, "p");
    assert_eq!(read(&parts).unwrap(), layer);
    let missing = Exl2Linear::read(&open(file_of(&parts[1..])).unwrap(), "p").unwrap_err();
    assert_eq!(missing.to_string(), "m.safetensors: no tensor p.q_weight");
}

/// The vector with one tensor changed, and the one line that says so.
fn refusal(suffix: &str, change: impl FnOnce(&mut Part)) -> String {
    let mut layer = vector();
    layer.bias = Some(vec![0; 32]);
    let mut parts = parts_of(&layer, "p");
    let name = format!("p.{suffix}");
    change(parts.iter_mut().find(|p| p.0 == name).unwrap());
    let text = read(&parts).unwrap_err().to_string();
    text.strip_prefix("m.safetensors: tensor p.")
        .unwrap_or(&text)
        .to_owned()
}

#[test]
fn wrong_types() {
    for (suffix, wrong, expected) in [
        (
            "q_weight",
            "U32",
            "q_weight: expected I32 with 2 dimensions, found U32",
        ),
        (
            "q_scale",
            "F32",
            "q_scale: expected I32 with 2 dimensions, found F32",
        ),
        (
            "q_scale_max",
            "BF16",
            "q_scale_max: expected F16 with 1 dimension, found BF16",
        ),
        (
            "q_groups",
            "U16",
            "q_groups: expected I16 with 1 dimension, found U16",
        ),
        (
            "q_invperm",
            "U32",
            "q_invperm: expected I32 with 1 dimension, found U32",
        ),
        (
            "bias",
            "BF16",
            "bias: expected F16 with 1 dimension, found BF16",
        ),
    ] {
        let text = refusal(suffix, |p| p.1 = wrong);
        assert!(text.starts_with(expected), "{text}");
    }
}

#[test]
fn wrong_shapes() {
    let cut = |p: &mut Part, shape: &[usize]| {
        let bytes = p.3.len() / p.2.iter().product::<usize>() * shape.iter().product::<usize>();
        p.2 = shape.to_vec();
        p.3.resize(bytes, 0);
    };
    for (suffix, shape, expected) in [
        (
            "q_weight",
            &[28, 24][..],
            "q_weight: expected a multiple of 32 columns, found 24",
        ),
        (
            "q_weight",
            &[28, 0],
            "q_weight: expected a multiple of 32 columns, found 0",
        ),
        (
            "q_weight",
            &[28, 64],
            "q_scale: expected shape [6, 8], found [6, 4]",
        ),
        (
            "q_weight",
            &[896],
            "q_weight: expected I32 with 2 dimensions, found I32 with shape [896]",
        ),
        (
            "q_weight",
            &[27, 32],
            "q_groups: expected group 5 of 2 bits to have a multiple of 2",
        ),
        (
            "q_weight",
            &[26, 32],
            "q_groups: expected group 5 to end after row 26 and by row 26",
        ),
        (
            "q_weight",
            &[30, 32],
            "q_groups: expected groups of 192 rows in all",
        ),
        (
            "q_scale",
            &[5, 4],
            "q_scale: expected shape [6, 4], found [5, 4]",
        ),
        (
            "q_scale_max",
            &[5],
            "q_scale_max: expected one for each of 6 groups, found 5",
        ),
        (
            "q_groups",
            &[0],
            "q_groups: expected pairs of bits and first row, found 0 numbers",
        ),
        (
            "q_groups",
            &[11],
            "q_groups: expected pairs of bits and first row, found 11 numbers",
        ),
        (
            "q_groups",
            &[10],
            "q_scale_max: expected one for each of 5 groups, found 6",
        ),
        (
            "q_invperm",
            &[160],
            "q_groups: expected groups of 160 rows in all",
        ),
        (
            "q_invperm",
            &[190],
            "q_invperm: expected a multiple of 32 rows, at most 65536, found",
        ),
        (
            "q_invperm",
            &[65568],
            "q_invperm: expected a multiple of 32 rows, at most 65536, found",
        ),
        (
            "q_invperm",
            &[0],
            "q_invperm: expected a multiple of 32 rows, at most 65536, found 0",
        ),
        ("bias", &[31], "bias: expected 32 numbers, found 31"),
    ] {
        let text = refusal(suffix, |p| cut(p, shape));
        assert!(text.starts_with(expected), "{suffix} {shape:?}: {text}");
    }
}

#[test]
fn wrong_groups() {
    let table = |numbers: [u16; 12]| refusal("q_groups", |p| p.3 = bytes_of_u16(numbers));
    for (numbers, expected) in [
        (
            [8, 1, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26],
            "the first group at row 0, found 1",
        ),
        (
            [7, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26],
            "2, 3, 4, 5, 6 or 8 bits in group 0, found 7",
        ),
        (
            [8, 0, 0, 8, 5, 14, 4, 19, 3, 23, 2, 26],
            "8 bits in group 1, found 0",
        ),
        (
            [264, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26],
            "8 bits in group 0, found 264",
        ),
        (
            [8, 0, 6, 9, 5, 14, 4, 19, 3, 23, 2, 26],
            "group 0 of 8 bits to have a multiple of 8",
        ),
        (
            [8, 0, 6, 8, 5, 8, 4, 19, 3, 23, 2, 26],
            "group 1 to end after row 8",
        ),
        (
            [8, 0, 6, 14, 5, 8, 4, 19, 3, 23, 2, 26],
            "group 0 of 8 bits",
        ),
        (
            [8, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 65535],
            "group 4 to end after row 23 and by row 28",
        ),
        (
            [6, 0, 8, 6, 5, 14, 4, 19, 3, 23, 2, 26],
            "bits that never increase, found 8 after 6",
        ),
        (
            [4, 0, 6, 8, 5, 14, 4, 19, 3, 23, 2, 26],
            "bits that never increase, found 6 after 4",
        ),
    ] {
        let text = table(numbers);
        assert!(text.contains(expected), "{numbers:?}: {text}");
    }
}

#[test]
fn permutations_that_are_none() {
    let text = refusal("q_invperm", |p| {
        p.3[4..8].copy_from_slice(&11u32.to_le_bytes())
    });
    assert_eq!(
        text,
        "q_invperm: expected a permutation, found 11 twice, again at 1"
    );
    let text = refusal("q_invperm", |p| {
        p.3[4..8].copy_from_slice(&192u32.to_le_bytes())
    });
    assert_eq!(
        text,
        "q_invperm: expected a permutation of 0 to 191, found 192 at 1"
    );
    refusal("q_invperm", |p| p.3[..4].fill(0xff));
}

#[test]
fn scales_that_are_not_finite() {
    for (bits, name) in [(0x7c00u16, "inf"), (0xfc00, "-inf"), (0x7e00, "NaN")] {
        let text = refusal("q_scale_max", |p| {
            p.3[4..6].copy_from_slice(&bits.to_le_bytes())
        });
        assert_eq!(
            text,
            format!("q_scale_max: expected finite scales, found {name} in group 2")
        );
    }
    // A negative maximum is odd but decodes: it flips the group.
    let mut layer = vector();
    layer.q_scale_max[0] |= 0x8000;
    read(&parts_of(&layer, "p")).unwrap();
}

#[test]
fn parts_that_do_not_belong_together() {
    type Change<'a> = &'a dyn Fn(&mut Exl2Linear);
    let refused = |change: Change<'_>| {
        let mut layer = vector();
        change(&mut layer);
        Exl2Linear::from_parts("p", layer).unwrap_err().to_string()
    };
    let cases: [(Change<'_>, &str); 9] = [
        (
            &|l| l.outputs = 31,
            "q_weight: expected a multiple of 32 columns",
        ),
        (&|l| l.inputs = 224, "q_groups: expected groups of 224 rows"),
        (
            &|l| l.groups[0].rows = 16,
            "q_groups: expected a multiple of 32 rows in group 0",
        ),
        (
            &|l| l.groups[0].bits = 7,
            "q_groups: expected 2, 3, 4, 5, 6 or 8 bits in group 0",
        ),
        (
            &|l| l.groups.swap(0, 1),
            "q_groups: expected bits that never increase",
        ),
        (
            &|l| l.q_weight.truncate(7),
            "q_weight: expected 896 elements, found 7",
        ),
        (
            &|l| l.q_scale.truncate(7),
            "q_scale: expected 24 elements, found 7",
        ),
        (
            &|l| l.bias = Some(vec![]),
            "bias: expected 32 elements, found 0",
        ),
        (
            &|l| l.q_invperm[0] = 9999,
            "q_invperm: expected a permutation of",
        ),
    ];
    for (change, expected) in cases {
        let text = refused(change);
        assert!(
            text.starts_with(&format!("(memory): tensor p.{expected}")),
            "{text}"
        );
    }
}

#[test]
fn builder_refuses() {
    let text = |r: crate::Result<&mut Exl2Builder>| r.err().unwrap().to_string();
    let mut b = Exl2Builder::new(32);
    assert!(text(b.push_group(7, &[0; 1024], &[0; 32], 0)).contains("bits of a group"));
    assert!(text(b.push_group(4, &[0; 1000], &[0; 32], 0)).contains("codes of a group"));
    assert!(text(b.push_group(4, &[16; 1024], &[0; 32], 0)).contains("at most 15, found 16"));
    assert!(text(b.push_group(4, &[0; 1024], &[0; 31], 0)).contains("scale codes of a group"));
    assert!(text(b.push_group(4, &[0; 1024], &[16; 32], 0)).contains("scale code 0"));
    b.push_group(4, &[0; 1024], &[0; 32], 0).unwrap();
    for perm in [vec![0; 32], (1..33).collect(), (0..31).collect()] {
        b.clone().finish("p", &perm, None).unwrap_err();
    }
}

/// A layer that ExLlamaV2's own converter wrote, and its own decoding of it.
#[test]
fn published_layer() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../testdata/golden-exl2-kproj.safetensors"
    );
    let file = SafetensorsFile::open(Path::new(path)).unwrap();
    let key = "model.layers.0.self_attn.k_proj";
    let layer = Exl2Linear::read(&file, key).unwrap();
    let widths: Vec<u8> = layer.groups.iter().map(|g| g.bits).collect();
    assert_eq!(
        (layer.inputs, layer.outputs, &*widths),
        (256, 128, &[3, 2, 2, 2][..])
    );
    same_bits(&layer, &file, key);
    rebuild(&layer, key);
}

/// Bit for bit, signs of zeros included.
fn same_bits(layer: &Exl2Linear, reference: &SafetensorsFile, key: &str) {
    let reference = reference.tensor(&format!("dequant.{key}")).unwrap();
    assert_eq!(reference.shape, [layer.inputs, layer.outputs]);
    let expected = reference.to_u16();
    let found = layer.dequantize_f16();
    let at = expected.iter().zip(&found).position(|(a, b)| a != b);
    assert_eq!(at, None, "{key}: first value that differs");
}

/// Through codes and back gives the same words.
fn rebuild(layer: &Exl2Linear, key: &str) {
    let n = layer.outputs;
    let mut builder = Exl2Builder::new(n);
    let mut word = 0;
    for (g, group) in layer.groups.iter().enumerate() {
        let words = &layer.q_weight[word * n..][..group.q_rows() * n];
        let codes = unpack_codes(group.bits, n, words).unwrap();
        let scales = unpack_scales(&layer.q_scale[g * n / 8..][..n / 8]);
        builder
            .push_group(group.bits, &codes, &scales, layer.q_scale_max[g])
            .unwrap();
        word += group.q_rows();
    }
    let again = builder
        .finish(key, &layer.perm(), layer.bias.clone())
        .unwrap();
    assert_eq!(&again, layer);
}

/// Whole checkpoints written by ExLlamaV2: layer 0 and the head against its own decoding, every
/// other layer through the encoder.
#[test]
fn published_checkpoints() {
    let Some(golden) = shared("golden") else {
        return;
    };
    let mut checked = 0;
    for bits in ["2.3", "3.0", "4.0", "5.0", "6.0", "8.0"] {
        let dir = golden.join(format!("demo-4m-exl2-{bits}bpw"));
        let files = ModelFiles::open(&dir).unwrap();
        let reference = SafetensorsFile::open(&dir.join("golden.safetensors.ref")).unwrap();
        let keys: Vec<String> = files
            .names()
            .filter_map(|n| n.strip_suffix(".q_weight").map(str::to_owned))
            .collect();
        assert_eq!(keys.len(), 4 * 7 + 1);
        for key in &keys {
            let layer = Exl2Linear::read(&files, key).unwrap();
            rebuild(&layer, key);
            if reference.contains(&format!("dequant.{key}")) {
                same_bits(&layer, &reference, key);
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 6 * 8);
}

fn layers() -> impl Strategy<Value = Exl2Linear> {
    let group = (0..6usize, 1..3u32);
    let groups = prop::collection::vec(group, 1..6);
    (groups, 1..3usize, any::<u64>(), any::<bool>()).prop_map(|(mut groups, n, seed, bias)| {
        groups.sort();
        let n = 32 * n;
        // A small generator of our own keeps failing cases short.
        let mut state = seed | 1;
        let mut next = move || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as u32
        };
        let mut builder = Exl2Builder::new(n);
        let mut inputs = 0;
        for (width, blocks) in groups {
            let (bits, rows) = (WIDTHS[width], 32 * blocks as usize);
            let codes: Vec<u8> = (0..rows * n)
                .map(|_| (next() % (1 << bits)) as u8)
                .collect();
            let scales: Vec<u8> = (0..n).map(|_| (next() % 16) as u8).collect();
            builder
                .push_group(bits, &codes, &scales, (next() % 0x7c00) as u16)
                .unwrap();
            inputs += rows;
        }
        let mut perm: Vec<u32> = (0..inputs as u32).collect();
        for i in (1..inputs).rev() {
            perm.swap(i, next() as usize % (i + 1));
        }
        let bias = bias.then(|| (0..n).map(|_| next() as u16).collect());
        builder.finish("p", &perm, bias).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn codes_round_trip(width in 0..6usize, n in 1..5usize, seed in any::<u32>()) {
        let bits = WIDTHS[width];
        let code = |i: u32| (i.wrapping_mul(seed | 1) >> 13) as u8 & ((1u16 << bits) - 1) as u8;
        let codes: Vec<u8> = (0..(64 * n) as u32).map(code).collect();
        let words = pack_codes(bits, n, &codes).unwrap();
        prop_assert_eq!(words.len(), 2 * n * usize::from(bits));
        prop_assert_eq!(unpack_codes(bits, n, &words).unwrap(), codes);
    }

    #[test]
    fn layers_round_trip(layer in layers()) {
        prop_assert_eq!(&read(&parts_of(&layer, "p")).unwrap(), &layer);
        prop_assert_eq!(layer.dequantize_f16().len(), layer.inputs * layer.outputs);
        rebuild(&layer, "p");
    }

    /// Damaged tensors are refused or read, never a panic; what is read decodes.
    #[test]
    fn mutated_layers(
        layer in layers(),
        edits in prop::collection::vec((any::<u8>(), any::<u32>(), any::<u8>()), 1..6),
    ) {
        let mut parts = parts_of(&layer, "p");
        for (part, at, value) in edits {
            let which = usize::from(part) % parts.len();
            let bytes = &mut parts[which].3;
            let at = at as usize % bytes.len();
            bytes[at] = value;
        }
        if let Ok(layer) = read(&parts) {
            prop_assert_eq!(layer.dequantize_f16().len(), layer.inputs * layer.outputs);
        }
    }

    /// As above, but any byte of the file.
    #[test]
    fn mutated_files(layer in layers(), edits in prop::collection::vec((any::<u32>(), any::<u8>()), 1..6)) {
        let mut bytes = file_of(&parts_of(&layer, "p"));
        for (at, value) in edits {
            let at = at as usize % bytes.len();
            bytes[at] = value;
        }
        if let Ok(file) = SafetensorsFile::from_bytes(Path::new("m"), Bytes::from(bytes))
            && let Ok(layer) = Exl2Linear::read(&file, "p")
        {
            layer.dequantize_f16();
        }
    }
}
