//! The codec against the f64 reference, test vectors, bounds of the error.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::cpu::Isa;
use crate::reference::kv as reference;

fn planes(codec: &Codec) -> [Vec<u8>; 3] {
    codec.bytes().map(|n| vec![0xff; n])
}

/// Encodes a head; its planes.
fn encode(codec: &Codec, head: &[f32]) -> [Vec<u8>; 3] {
    let (mut y, mut codes) = (head.to_vec(), vec![0; head.len()]);
    codec.rotate(&mut y);
    let mut to = planes(codec);
    let [low, high, words] = &mut to;
    codec.encode(&y, &mut codes, [low, high, words]);
    to
}

fn decode(codec: &Codec, from: &[Vec<u8>; 3]) -> Vec<f32> {
    let mut y = vec![f32::NAN; codec.head_dim()];
    codec.decode([&from[0], &from[1], &from[2]], &mut y);
    codec.unrotate(&mut y);
    y
}

fn codec(format: KvFormat, head_dim: usize, isa: Isa) -> Codec {
    Codec::new(format, head_dim, isa).unwrap()
}

fn squared(a: &[f32], b: &[f32]) -> f64 {
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b' ').collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

fn words(scales: [f32; 2]) -> Vec<u8> {
    scales
        .iter()
        .flat_map(|s| f16::from_f32(*s).to_le_bytes())
        .collect()
}

fn ramp() -> Vec<f32> {
    (0..64).map(|i| (i as f32 - 31.5) / 16.0).collect()
}

fn impulse() -> Vec<f32> {
    (0..64).map(|i| if i == 5 { 1.0 } else { 0.0 }).collect()
}

/// ExLlamaV2's vectors of 8 bits, to the byte and back.
#[test]
fn vectors_of_8_bits() {
    for isa in Isa::available() {
        let q8 = codec(KvFormat::Q8, 64, isa);
        let stored = encode(&q8, &ramp());
        let mut bytes =
            hex("78887070 60608080 40408080 80808080 00008080 80808080 80808080 80808080 00008080");
        bytes.resize(64, 0x80);
        assert_eq!(stored, [bytes, vec![], words([0.125, 0.25])]);
        assert_eq!(decode(&q8, &stored), ramp());
        let zero = encode(&q8, &[0.0; 64]);
        assert_eq!(zero, [vec![0; 64], vec![], vec![0; 4]]);
        assert_eq!(decode(&q8, &zero), [0.0; 64]);
    }
}

/// ExLlamaV2's vectors of 4 bits. Its bytes decode to what it decodes them to. Its codes are the
/// nearest to `y / A * 8 + 8`; the search of scales finds better ones.
#[test]
fn vectors_of_4_bits() {
    let ramp_bytes = "88776688 44888888 00888888 88888888 00888888 88888888 88888888 88888888";
    let impulse_bytes = "f8f80808".repeat(8);
    for isa in Isa::available() {
        let q4 = codec(KvFormat::Q4, 64, isa);
        for (head, bytes, scales) in [
            (ramp(), hex(ramp_bytes), [2.0, 4.0]),
            (impulse(), hex(&impulse_bytes), [0.125, 0.125]),
        ] {
            let mut y = head.clone();
            q4.rotate(&mut y);
            let plain: Vec<u8> = y
                .chunks(32)
                .zip(scales)
                .flat_map(|(y, scale)| {
                    let code = |v: &f32| (v / scale + 8.0).round_ties_even().clamp(0.0, 15.0) as u8;
                    let codes: Vec<u8> = y.iter().map(code).collect();
                    codes
                        .chunks(2)
                        .map(|c| c[0] | c[1] << 4)
                        .collect::<Vec<u8>>()
                })
                .collect();
            assert_eq!(plain, bytes);
            let theirs = decode(&q4, &[bytes, vec![], words(scales)]);
            let ours = decode(&q4, &encode(&q4, &head));
            assert!(squared(&ours, &head) <= squared(&theirs, &head));
            match scales[0] {
                2.0 => {
                    assert_eq!(theirs[..4], [-1.9375, -1.9375, -1.8125, -1.8125]);
                    let errors = theirs.iter().zip(&head).map(|(a, b)| (a - b).abs());
                    assert_eq!(errors.fold(0.0, f32::max), 0.03125);
                }
                _ => assert_eq!((theirs[1], theirs[5]), (-0.0625, 0.9375)),
            }
        }
        let zero = encode(&q4, &[0.0; 64]);
        assert_eq!(zero, [vec![0; 32], vec![], vec![0; 4]]);
        assert_eq!(decode(&q4, &zero), [0.0; 64]);
    }
}

/// Mean squared error on unit Gaussians: ExLlamaV2's scheme has 8.8e-3 and 3.5e-5.
#[test]
fn noise_on_gaussians() {
    let mut state = 7u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 40) as f64 + 0.5) / f64::from(1 << 24)
    };
    let mut gaussian = || {
        let radius = (-2.0 * uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * uniform()).cos()) as f32
    };
    let heads: Vec<Vec<f32>> = (0..2000)
        .map(|_| (0..128).map(|_| gaussian()).collect())
        .collect();
    for (format, measured) in [
        (KvFormat::Q8, 2.75e-5),
        (KvFormat::Q6, 4.5e-4),
        (KvFormat::Q4, 4.3e-3),
    ] {
        let codec = codec(format, 128, Isa::detect());
        let error = heads
            .iter()
            .map(|h| squared(&decode(&codec, &encode(&codec, h)), h));
        let mean = error.sum::<f64>() / 256_000.0;
        assert!((mean / measured - 1.0).abs() < 0.05, "{format:?}: {mean:e}");
    }
}

#[test]
fn what_is_no_number_shows_and_what_is_large_saturates() {
    for format in [KvFormat::Q8, KvFormat::Q6, KvFormat::Q4] {
        let codec = codec(format, 64, Isa::detect());
        for bad in [f32::NAN, f32::INFINITY] {
            let mut head = vec![1.0; 64];
            head[9] = bad;
            assert!(
                decode(&codec, &encode(&codec, &head))
                    .iter()
                    .all(|v| v.is_nan())
            );
        }
        let head = vec![-1e30; 64];
        assert!(
            decode(&codec, &encode(&codec, &head))
                .iter()
                .all(|v| v.is_finite())
        );
        let head: Vec<f32> = (0..64).map(|i| (i as f32 - 30.0) * 1e-7).collect();
        let back = decode(&codec, &encode(&codec, &head));
        assert!(
            squared(&back, &head) <= 1.001 * squared(&[0.0; 64], &head),
            "{format:?}"
        );
    }
}

fn formats() -> impl Strategy<Value = KvFormat> {
    prop_oneof![Just(KvFormat::Q8), Just(KvFormat::Q6), Just(KvFormat::Q4)]
}

fn head_dims() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(64usize),
        Just(80),
        Just(96),
        Just(128),
        Just(256),
        (1usize..150).prop_map(|n| 2 * n)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Every instruction set decodes the same, as the reference does, and encodes as well.
    #[test]
    fn codecs_agree_with_the_reference(
        format in formats(), dim in head_dims(), power in -6i32..6, seed in any::<u64>(),
    ) {
        let mut state = seed | 1;
        let head: Vec<f32> = (0..dim).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let v = (state >> 33) as f32 / 2f32.powi(30) - 1.0;
            v * v * v * 4f32.powi(power)
        }).collect();
        let layout = PageLayout::values(format, 1, dim);
        let mut outputs = Vec::new();
        for isa in Isa::available() {
            let codec = codec(format, dim, isa);
            let stored = encode(&codec, &head);
            // What it encodes, as it rotates: a scale beside a tie is rounded as there.
            let mut rotated = head.clone();
            codec.rotate(&mut rotated);
            let y: Vec<f64> = rotated.iter().map(|v| f64::from(*v)).collect();
            // The same bytes where a page has them.
            let mut page = vec![0u8; format.page_bytes(1, dim)];
            for ((at, len), bytes) in layout.planes(77, 0).into_iter().zip(&stored) {
                page[at..at + len].copy_from_slice(bytes);
            }
            let exact = reference::rotated(&page, &layout, 77, 0);
            let mut decoded = vec![0f32; dim];
            codec.decode([&stored[0], &stored[1], &stored[2]], &mut decoded);
            let rotated: Vec<f32> = exact.iter().map(|v| *v as f32).collect();
            prop_assert_eq!(&decoded, &rotated);
            for group in 0..groups(dim) {
                let (from, to) = group_range(group, dim);
                let most = y[from..to].iter().fold(0f64, |m, v| m.max(v.abs()));
                let error = |y: &[f64], back: &[f64]| -> f64 {
                    y.iter().zip(back).map(|(a, b)| (a - b).powi(2)).sum()
                };
                // Before they are rounded to 16 bits: what codes beside a tie decode to is not equally far.
                let mine = reference::group_at(&page, &layout, (77, 0), group);
                let theirs = reference::encode(format, &y[from..to]);
                let [mine, best] = [mine, theirs].map(|(word, codes)| {
                    error(&y[from..to], &reference::values(format, word, &codes))
                });
                prop_assert!((mine - best).abs() <= 1e-4 * best + 1e-9 * most * most, "{} {}", mine, best);
                let steps = f64::from(1u32 << (format.code_bits().unwrap() - 1));
                // No value is off by more than a step, on the side that has fewer codes; of 4 bits
                // the largest may be cut. Steps are multiples of 2^-24; those of 4 bits end at 2^-16.
                let worst = y[from..to].iter().zip(&exact[from..to]).map(|(a, b)| (a - b).abs());
                let (limit, tiny) = match format {
                    KvFormat::Q4 => (4.0, 2f64.powi(-16)),
                    _ => (1.01, steps * 2f64.powi(-25)),
                };
                let limit = limit * most / steps + 1e-3 * most + tiny;
                prop_assert!(worst.fold(0.0, f64::max) <= limit);
            }
            outputs.push(decode(&codec, &stored));
        }
        // The transform and its inverse are one another's.
        let mut y: Vec<f64> = head.iter().map(|v| f64::from(*v)).collect();
        reference::rotate(&mut y);
        let rotor = codec(format, dim, Isa::detect());
        let mut there = head.clone();
        rotor.rotate(&mut there);
        for (a, b) in there.iter().zip(&y) {
            prop_assert!((f64::from(*a) - b).abs() <= 1e-5 * y.iter().fold(0f64, |m, v| m.max(v.abs())));
        }
        rotor.unrotate(&mut there);
        let most = head.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in there.iter().zip(&head) {
            prop_assert!((a - b).abs() <= 2e-6 * most.max(1e-30) * 8.0);
        }
    }

    /// The heads of a page lie side by side, centers of keys behind them, and nothing overlaps.
    #[test]
    fn pages_have_a_place_for_every_head(format in formats(), heads in 1usize..4, dim in head_dims()) {
        for (layout, bytes) in [
            (PageLayout::values(format, heads, dim), format.page_bytes(heads, dim)),
            (PageLayout::keys(format, heads, dim), format.key_page_bytes(heads, dim)),
        ] {
            let mut used = vec![0u8; 2 * bytes];
            for slot in 0..2 * PAGE_TOKENS {
                for head in 0..heads {
                    let first = slot.is_multiple_of(PAGE_TOKENS);
                    let center = layout.center(slot, head).filter(|_| first);
                    for (at, len) in layout.planes(slot, head).into_iter().chain(center) {
                        used[at..at + len].iter_mut().for_each(|u| *u += 1);
                    }
                }
            }
            prop_assert!(used.iter().all(|&u| u == 1));
        }
        let spec = heads * dim * format.code_bits().unwrap() as usize / 8 + heads * dim / 16;
        if dim >= 32 && dim % 4 == 0 {
            prop_assert!(format.token_bytes(heads, dim) <= spec);
        }
    }
}
