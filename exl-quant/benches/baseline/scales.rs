//! The original's choice of scales: one multiplier for all columns of a group, by the sum of
//! `|error|^3.5`, without weights and before the format's roundings.

use half::f16;

/// Multipliers tried.
const TRIED: usize = 97;
const LEAST: f32 = 0.70;
const MOST: f32 = 1.20;
/// Adding and subtracting this rounds an f32 below 2^22 to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// Scales of one group as the format stores them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupScales {
    /// Bits of the binary16 maximum.
    pub(crate) maximum: u16,
    /// One code per column, 0..=15.
    pub(crate) codes: Vec<u8>,
}

/// Smallest and largest signed code.
pub(crate) fn code_range(bits: u8) -> (f32, f32) {
    let half = (1u32 << (bits - 1)) as f32;
    (-half, half - 1.0)
}

/// Scales for the rows `w` (`[rows, columns]`) of a group.
pub(crate) fn search(w: &[f32], columns: usize, bits: u8) -> GroupScales {
    let mut needed = vec![0.0f32; columns];
    for row in w.chunks_exact(columns) {
        for (n, x) in needed.iter_mut().zip(row) {
            *n = n.max(x.abs());
        }
    }
    let span = ((1u32 << bits) - 1) as f32 / 2.0;
    for n in &mut needed {
        *n = (*n + 1e-12) / span;
    }
    let largest = needed.iter().fold(0.0f32, |a, &b| a.max(b));
    let step = |n: &f32| {
        (16.0 * (n / largest).sqrt())
            .round_ties_even()
            .clamp(1.0, 16.0)
    };
    let steps: Vec<f32> = needed.iter().map(step).collect();
    // In units of the largest scale, so that small weights lose nothing in the powers.
    let units: Vec<f32> = steps.iter().map(|s| (s / 16.0) * (s / 16.0)).collect();
    let w: Vec<f32> = w.iter().map(|x| x / largest).collect();
    let multiplier = |i: usize| {
        let at = i as f32 / (TRIED - 1) as f32;
        LEAST * (1.0 - at) + MOST * at
    };
    let best = (0..TRIED)
        .map(|i| (error(&w, &units, multiplier(i), bits), i))
        .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
        .map_or(TRIED - 1, |(_, i)| i);
    GroupScales {
        maximum: f16::from_f32(multiplier(best) * largest).to_bits(),
        codes: steps.iter().map(|&s| s as u8 - 1).collect(),
    }
}

/// The sum of `|error|^3.5` with the scales `multiplier * units`.
fn error(w: &[f32], units: &[f32], multiplier: f32, bits: u8) -> f64 {
    let (lo, hi) = code_range(bits);
    let scales: Vec<f32> = units.iter().map(|u| u * multiplier).collect();
    let inverses: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
    let mut sums = vec![0.0f32; units.len()];
    for row in w.chunks_exact(units.len()) {
        let columns = row.iter().zip(&scales).zip(&inverses);
        for (sum, ((&x, &scale), &inverse)) in sums.iter_mut().zip(columns) {
            let q = (x * inverse + ROUND) - ROUND;
            let q = if q < lo { lo } else { q };
            let q = if q > hi { hi } else { q };
            let e = (q * scale - x).abs();
            *sum += e * e * e * e.sqrt();
        }
    }
    sums.iter().map(|&s| f64::from(s)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use exl_quant::scale_value;

    /// Small weights of both signs with another size in each column.
    fn weights(rows: usize, columns: usize) -> Vec<f32> {
        let value = |i: usize| {
            let noise = ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5;
            noise * 0.01 * (1 + i % columns) as f32
        };
        (0..rows * columns).map(value).collect()
    }

    #[test]
    fn the_widest_column_gets_the_largest_code_and_scales_cover_the_weights() {
        let (rows, columns) = (64, 32);
        let w = weights(rows, columns);
        for bits in [2, 3, 4, 5, 6, 8] {
            let found = search(&w, columns, bits);
            assert_eq!(found.codes[columns - 1], 15);
            assert!(found.codes.windows(2).all(|c| c[0] <= c[1]));
            let (lo, hi) = code_range(bits);
            for (n, &code) in found.codes.iter().enumerate().skip(4) {
                let largest = (0..rows).map(|r| w[r * columns + n].abs());
                let largest = largest.fold(0.0f32, f32::max);
                let reach = scale_value(found.maximum, code) * (hi - lo) / 2.0;
                // 0.7 to 1.2 times what is needed, and the rounding of the code's square root.
                let ratio = reach / largest;
                assert!((0.55..1.45).contains(&ratio), "{bits} bits: {ratio}");
            }
        }
    }

    #[test]
    fn the_chosen_multiplier_leaves_the_least_error() {
        let (columns, bits) = (32, 3);
        let w = weights(64, columns);
        let found = search(&w, columns, bits);
        let scale = |factor: f32| {
            let maximum = f16::from_f32(f16::from_bits(found.maximum).to_f32() * factor);
            let value = |&c: &u8| scale_value(maximum.to_bits(), c);
            let scales: Vec<f32> = found.codes.iter().map(value).collect();
            error(&w, &scales, 1.0, bits)
        };
        assert!(scale(1.0) <= scale(0.93) && scale(1.0) <= scale(1.07));
    }

    #[test]
    fn zeros_are_no_trouble() {
        let found = search(&[0.0; 32 * 32], 32, 4);
        assert_eq!(scale_value(found.maximum, found.codes[0]), 0.0);
    }
}
