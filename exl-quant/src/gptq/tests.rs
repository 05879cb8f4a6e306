use super::*;
use crate::testing::{noise, normal};
use crate::{Hessian, HessianAccumulator, Part, activity_order};

/// Inputs with a few strong, correlated features.
fn inputs(dim: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let mix = normal(seed + 100, dim * 8, 1.0);
    let latent = noise(seed, tokens * 8);
    let own = noise(seed + 1, tokens * dim);
    let mut x = vec![0.0f32; tokens * dim];
    for t in 0..tokens {
        for k in 0..dim {
            let shared: f32 = (0..8).map(|l| latent[t * 8 + l] * mix[k * 8 + l]).sum();
            let gain = 1.0 / (1.0 + (k % 37) as f32 * 0.3);
            x[t * dim + k] = gain * (0.5 * shared + 0.5 * own[t * dim + k]);
        }
    }
    x
}

fn hessian(dim: usize, tokens: usize, seed: u64) -> Hessian {
    let mut acc = HessianAccumulator::new(dim);
    acc.add(&inputs(dim, tokens, seed), Part::Train).unwrap();
    acc.finish("test").unwrap().all
}

fn difference(a: &Matrix, b: &Matrix) -> Matrix {
    let data = a.data.iter().zip(&b.data).map(|(x, y)| x - y).collect();
    Matrix::new(a.rows, a.cols, data).unwrap()
}

/// Row by row in f64, as the method is written down.
fn textbook(weight: &Matrix, layout: &Layout, factor: &Factor) -> Vec<u8> {
    let (k, n) = (weight.rows, weight.cols);
    let mut w: Vec<f64> = factor
        .order()
        .iter()
        .flat_map(|&f| {
            weight
                .row(f as usize)
                .iter()
                .map(|&x| f64::from(x))
                .collect::<Vec<_>>()
        })
        .collect();
    let mut codes = vec![0u8; k * n];
    let mut at = 0;
    for g in layout.groups() {
        let rows: Vec<f32> = w[at * n..(at + g.rows) * n]
            .iter()
            .map(|&x| x as f32)
            .collect();
        let pivots = || (at..at + g.rows).map(|r| factor.pivot(r));
        let least = pivots().fold(f32::INFINITY, f32::min);
        let weights: Vec<f32> = pivots().map(|u| (least / u) * (least / u)).collect();
        let found = search(&[GroupBlock { w: &rows, cols: n }], g.bits, &weights);
        let (lo, hi) = code_range(g.bits);
        for r in at..at + g.rows {
            for c in 0..n {
                let s = scale_value(found.scale_max, found.codes[c]);
                let q = (w[r * n + c] as f32 / s).round_ties_even().clamp(lo, hi);
                codes[r * n + c] = (q - lo) as u8;
                let decoded = f64::from(half::f16::from_f32(q * s).to_f32());
                let e = (w[r * n + c] - decoded) / f64::from(factor.pivot(r));
                for later in r + 1..k {
                    w[later * n + c] -= e * f64::from(factor.row(r)[later]);
                }
            }
        }
        at += g.rows;
    }
    codes
}

#[test]
fn blocked_equals_row_by_row() {
    let (k, n) = (352, 96);
    let h = hessian(k, 2000, 3);
    let factor = Factor::new("t", &h, &activity_order(&h), 0.02).unwrap();
    let weight = Matrix::new(k, n, normal(4, k * n, 0.03)).unwrap();
    for text in [
        "1x8b_32g/2x4b_96g/1x4b_128g",
        "11x3b_32g",
        "1x5b_192g/2x2b_64g/1x2b_32g",
    ] {
        let layout: Layout = text.parse().unwrap();
        let got = Gptq { factor: &factor }
            .quantize("t", &weight, &layout)
            .unwrap();
        let want = textbook(&weight, &layout, &factor);
        let differ = got.codes.iter().zip(&want).filter(|(a, b)| a != b).count();
        // f32 against f64: a code that lies on an edge may fall either way, and takes the rest of
        // its column with it.
        assert!(
            differ * 50 < want.len(),
            "{text}: {differ} of {} codes differ",
            want.len()
        );
    }
}

#[test]
fn compensation_beats_rounding() {
    let (k, n) = (256, 64);
    let h = hessian(k, 3000, 9);
    let factor = Factor::new("t", &h, &activity_order(&h), 0.01).unwrap();
    let weight = Matrix::new(k, n, normal(5, k * n, 0.03)).unwrap();
    for bits in [2u8, 3, 4, 8] {
        let layout = Layout::uniform(bits, 64, k).unwrap();
        let loss = |q: Quantized| h.loss(&difference(&weight, &q.dequantize())).unwrap();
        let gptq = loss(
            Gptq { factor: &factor }
                .quantize("t", &weight, &layout)
                .unwrap(),
        );
        let rtn = loss(Rtn.quantize("t", &weight, &layout).unwrap());
        assert!(gptq < 0.8 * rtn, "{bits} bits: {gptq:e} against {rtn:e}");
    }
}

#[test]
fn same_codes_for_any_number_of_threads() {
    let (k, n) = (192, 224);
    let h = hessian(k, 1000, 1);
    let weight = Matrix::new(k, n, normal(2, k * n, 0.03)).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let factor = Factor::new("t", &h, &activity_order(&h), 0.02).unwrap();
            let layout: Layout = "1x6b_32g/1x3b_128g/1x3b_32g".parse().unwrap();
            Gptq { factor: &factor }
                .quantize("t", &weight, &layout)
                .unwrap()
        })
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn padding_dead_inputs_and_small_matrices() {
    // K = 32, one live column in 32, half the inputs dead, one exploding.
    let (k, n) = (32, 32);
    let mut x = inputs(k, 200, 2);
    for row in x.chunks_exact_mut(k) {
        row[..16].fill(0.0);
        row[20] *= 1e6;
    }
    let mut acc = HessianAccumulator::new(k);
    acc.add(&x, Part::Train).unwrap();
    let h = acc.finish("t").unwrap().all;
    let factor = Factor::new("t", &h, &activity_order(&h), 0.01).unwrap();
    assert_eq!(factor.order()[0], 20);
    let mut weight = Matrix::zeros(k, n);
    for r in 0..k {
        weight.row_mut(r)[0] = normal(r as u64, 1, 0.05)[0];
    }
    let layout = Layout::uniform(4, 32, k).unwrap();
    let q = Gptq { factor: &factor }
        .quantize("t", &weight, &layout)
        .unwrap();
    let back = q.dequantize();
    for r in 0..k {
        assert!(
            back.row(r)[1..].iter().all(|&w| w == 0.0),
            "padding stays zero"
        );
        assert!(q.codes[r * n + 1..(r + 1) * n].iter().all(|&c| c == 8));
        assert!((back.row(r)[0] - weight.row(r)[0]).abs() < 0.05, "row {r}");
    }
    assert!(q.scale_codes[1..].iter().all(|&c| c == 0));
}

#[test]
fn bad_weights_and_shapes_are_named() {
    let layout = Layout::uniform(4, 32, 32).unwrap();
    let mut weight = Matrix::zeros(32, 32);
    weight.row_mut(3)[7] = f32::NAN;
    let error = Rtn
        .quantize("layers.0.q_proj", &weight, &layout)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("layers.0.q_proj") && error.contains("NaN"),
        "{error}"
    );
    assert!(Rtn.quantize("t", &Matrix::zeros(32, 31), &layout).is_err());
    assert!(Rtn.quantize("t", &Matrix::zeros(64, 32), &layout).is_err());
    weight.row_mut(3)[7] = 1e9;
    assert!(Rtn.quantize("t", &weight, &layout).is_err());
}

#[test]
fn codes_do_not_depend_on_the_scale_of_the_inputs() {
    // Squares of the smallest are at the edge of f32, and 1 / U^2 beyond it.
    let (k, n, tokens) = (64, 32, 300);
    let weight = Matrix::new(k, n, normal(4, k * n, 0.05)).unwrap();
    let layout: Layout = "1x5b_32g/1x3b_32g".parse().unwrap();
    let codes = |power: i32| {
        let scale = 2f32.powi(power);
        let x: Vec<f32> = inputs(k, tokens, 9).iter().map(|x| x * scale).collect();
        let mut acc = HessianAccumulator::new(k);
        acc.add(&x, Part::Train).unwrap();
        let h = acc.finish("t").unwrap().all;
        let factor = Factor::new("t", &h, &activity_order(&h), 0.01).unwrap();
        Gptq { factor: &factor }
            .quantize("t", &weight, &layout)
            .unwrap()
            .codes
    };
    let plain = codes(0);
    for power in [-60, -30, 30, 58] {
        assert!(plain == codes(power), "2^{power}");
    }
}

#[test]
fn decoded_weights_stay_within_16_bits_or_are_refused() {
    let (k, n) = (64, 32);
    let h = hessian(k, 200, 3);
    let factor = Factor::new("t", &h, &activity_order(&h), 0.003).unwrap();
    for largest in [16_000.0f32, 40_000.0, 65_000.0] {
        let mut data = normal(8, k * n, 0.25 * largest);
        data.iter_mut()
            .for_each(|w| *w = w.clamp(-largest, largest));
        data[5] = largest;
        let weight = Matrix::new(k, n, data).unwrap();
        for bits in [2, 3, 8] {
            let layout = Layout::uniform(bits, 32, k).unwrap();
            match (Gptq { factor: &factor }).quantize("t", &weight, &layout) {
                Ok(q) => {
                    let finite = q.dequantize().data.iter().all(|w| w.is_finite());
                    assert!(finite, "{largest} at {bits} bits");
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(largest > 16_384.0 && text.contains("16-bit"), "{text}");
                }
            }
        }
    }
}
