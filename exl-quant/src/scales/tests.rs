use super::*;
use crate::testing::normal;

fn loss_of(w: &[f32], cols: usize, bits: u8, weights: &[f32], scales: &GroupScales) -> f64 {
    let (lo, hi) = code_range(bits);
    let mut sum = 0.0;
    for (r, row) in w.chunks_exact(cols).enumerate() {
        for (n, &x) in row.iter().enumerate() {
            let s = scale_value(scales.scale_max, scales.codes[n]);
            let q = if s > 0.0 {
                (x / s).round_ties_even().clamp(lo, hi)
            } else {
                0.0
            };
            let e = f64::from(x - q * s);
            sum += f64::from(weights[r]) * e * e;
        }
    }
    sum
}

/// The choice of the original converter: largest column gets code 16, one multiplier for all
/// columns picked by a power of the error, codes by nearest square root.
fn single_multiplier(w: &[f32], cols: usize, bits: u8) -> GroupScales {
    let span = ((1u32 << bits) - 1) as f32 / 2.0;
    let beta: Vec<f32> = (0..cols)
        .map(|n| {
            w.chunks_exact(cols)
                .map(|r| r[n].abs())
                .fold(1e-12, f32::max)
                / span
        })
        .collect();
    let top = beta.iter().copied().fold(0.0, f32::max);
    let codes: Vec<u8> = beta
        .iter()
        .map(|b| ((16.0 * (b / top).sqrt()).round_ties_even().clamp(1.0, 16.0) - 1.0) as u8)
        .collect();
    let (lo, hi) = code_range(bits);
    let cost = |p: f32| -> f64 {
        let mut sum = 0.0f64;
        for row in w.chunks_exact(cols) {
            for (n, &x) in row.iter().enumerate() {
                let s = (f32::from(codes[n]) + 1.0) / 16.0;
                let t = p * s * s * top;
                let q = (x / t).round_ties_even().clamp(lo, hi);
                sum += f64::from((q * t - x).abs()).powf(3.5);
            }
        }
        sum
    };
    let p = (0..97)
        .map(|i| 0.70 + 0.5 * i as f32 / 96.0)
        .min_by(|&a, &b| cost(a).total_cmp(&cost(b)))
        .unwrap();
    GroupScales {
        scale_max: f16::from_f32(p * top).to_bits(),
        codes,
        underflow: false,
    }
}

#[test]
fn two_roundings_in_order() {
    for (scale_max, s, want) in [
        (0x3A80u16, 13u8, 0x384Au16),
        (0x217A, 13, 0x1F3B),
        (0x217B, 13, 0x1F3E),
        (0x10EB, 16, 0x10E0),
        (0x0C29, 16, 0x0C40),
        (0x0080, 16, 0x0000),
    ] {
        assert_eq!(
            f16::from_f32(scale_value(scale_max, s - 1)).to_bits(),
            want,
            "{scale_max:x}"
        );
    }
}

#[test]
fn beats_a_single_multiplier_at_every_width() {
    let (rows, cols) = (64, 96);
    let mut w = normal(11, rows * cols, 0.02);
    for (i, x) in w.iter_mut().enumerate() {
        *x *= 0.4 + 1.6 * ((i % cols) as f32 / cols as f32);
    }
    let weights: Vec<f32> = (0..rows).map(|r| 1.0 / (1.0 + r as f32 * 0.1)).collect();
    for bits in [2u8, 3, 4, 5, 6, 8] {
        let blocks: Vec<Vec<f32>> = (0..2)
            .map(|b| {
                w.chunks_exact(cols)
                    .flat_map(|r| r[b * 48..][..48].to_vec())
                    .collect()
            })
            .collect();
        let views: Vec<_> = blocks.iter().map(|w| GroupBlock { w, cols: 48 }).collect();
        let ours = loss_of(&w, cols, bits, &weights, &search(&views, bits, &weights));
        let theirs = loss_of(&w, cols, bits, &weights, &single_multiplier(&w, cols, bits));
        assert!(
            ours < 0.985 * theirs,
            "{bits} bits: {ours:e} against {theirs:e}"
        );
    }
}

#[test]
fn near_the_exhaustive_optimum_on_a_small_group() {
    let (rows, cols) = (32, 8);
    let w = normal(3, rows * cols, 0.05);
    let weights = vec![1.0f32; rows];
    for bits in [2u8, 3, 4] {
        let found = search(&[GroupBlock { w: &w, cols }], bits, &weights);
        let ours = loss_of(&w, cols, bits, &weights, &found);
        let mut best = f64::INFINITY;
        for scale_max in (0x2000u16..0x3400).step_by(3) {
            let mut sum = 0.0;
            for n in 0..cols {
                let column: Vec<f32> = w.chunks_exact(cols).map(|r| r[n]).collect();
                sum += (0..16u8)
                    .map(|c| {
                        let one = GroupScales {
                            scale_max,
                            codes: vec![c],
                            underflow: false,
                        };
                        loss_of(&column, 1, bits, &weights, &one)
                    })
                    .fold(f64::INFINITY, f64::min);
            }
            best = best.min(sum);
        }
        assert!(
            ours <= best * 1.04,
            "{bits} bits: {ours:e}, exhaustive {best:e}"
        );
    }
}

#[test]
fn tiny_weights_do_not_vanish() {
    let (rows, cols) = (32, 32);
    for sigma in [1e-3f32, 1e-5, 1e-7] {
        let w = normal(5, rows * cols, sigma);
        let found = search(&[GroupBlock { w: &w, cols }], 8, &vec![1.0; rows]);
        let h = f16::from_f32(f16::from_bits(found.scale_max).to_f32() / 256.0);
        assert!(h.to_f32() >= H_MIN, "sigma {sigma}");
        assert_eq!(found.underflow, sigma < 1e-4, "sigma {sigma}");
    }
}

#[test]
fn zeros_take_code_zero_and_large_weights_stay_finite() {
    let (rows, cols) = (32, 32);
    let zero = vec![0.0f32; rows * cols];
    let found = search(&[GroupBlock { w: &zero, cols }], 4, &vec![1.0; rows]);
    assert!(found.codes.iter().all(|&c| c == 0));
    let big = normal(6, rows * cols, 2e4);
    let found = search(&[GroupBlock { w: &big, cols }], 2, &vec![1.0; rows]);
    assert!(
        found
            .codes
            .iter()
            .all(|&c| scale_value(found.scale_max, c).is_finite())
    );
}
