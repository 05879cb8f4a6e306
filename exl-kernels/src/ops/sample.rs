//! The choice of the next token, with the draws of exl-gen's sampler.

use std::collections::HashSet;

use crate::Result;
use crate::mem::{Mem, MemMut};

/// 32-bit words of one row of [`Sample::params`].
pub const SAMPLE_WORDS: usize = 16;

/// Below this temperature sampling is greedy.
const GREEDY_BELOW: f32 = 0.01;

/// How the token of one row is chosen: a row of [`Sample::params`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleParams {
    /// Probabilities are proportional to `exp(logit / temperature)`; below 0.01 the likeliest
    /// token is taken.
    pub temperature: f32,
    /// Keeps the `k` likeliest; 0 is off.
    pub top_k: u32,
    /// Keeps the likeliest until their sum reaches this; 0 and 1 are off.
    pub top_p: f32,
    /// Keeps those at least this times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Logits of tokens seen are divided by this if positive, multiplied if negative; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logit for each time a token was seen; 0 is off.
    pub frequency_penalty: f32,
    /// Taken off the logit of every token seen; 0 is off.
    pub presence_penalty: f32,
    /// Newest tokens that count for penalties at full strength; [`u32::MAX`] means all.
    pub penalty_range: u32,
    /// Tokens before those over which the strength fades to nothing.
    pub penalty_decay: u32,
    /// Seed of the draws (Philox4x32-10).
    pub seed: u64,
    /// Number of the draw.
    pub counter: u64,
}

impl Default for SampleParams {
    /// Always the likeliest token, no penalties.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_range: u32::MAX,
            penalty_decay: 0,
            seed: 0,
            counter: 0,
        }
    }
}

impl SampleParams {
    /// As kernels read them, in the order of the fields, the low half of 64 bits first.
    pub fn to_words(&self) -> [i32; SAMPLE_WORDS] {
        let words = [
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition_penalty.to_bits(),
            self.frequency_penalty.to_bits(),
            self.presence_penalty.to_bits(),
            self.penalty_range,
            self.penalty_decay,
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.counter as u32,
            (self.counter >> 32) as u32,
            0,
            0,
            0,
        ];
        words.map(u32::cast_signed)
    }

    /// The inverse of [`SampleParams::to_words`].
    pub fn from_words(words: &[i32; SAMPLE_WORDS]) -> Self {
        let w = words.map(i32::cast_unsigned);
        let long = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        Self {
            temperature: f32::from_bits(w[0]),
            top_k: w[1],
            top_p: f32::from_bits(w[2]),
            min_p: f32::from_bits(w[3]),
            repetition_penalty: f32::from_bits(w[4]),
            frequency_penalty: f32::from_bits(w[5]),
            presence_penalty: f32::from_bits(w[6]),
            penalty_range: w[7],
            penalty_decay: w[8],
            seed: long(w[9], w[10]),
            counter: long(w[11], w[12]),
        }
    }

    /// Whether the draw is always the likeliest token.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_k == 1
    }

    /// How many of the newest tokens the penalties look at when there are `history`: the least
    /// width of [`Sample::recent`].
    pub fn reach(&self, history: usize) -> usize {
        if !self.penalises() {
            return 0;
        }
        let reach = (self.penalty_range as usize).saturating_add(self.penalty_decay as usize);
        reach.min(history)
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }

    /// The draw, strictly between 0 and 1: the middle of one of 2^32 equal steps.
    fn uniform(&self) -> f64 {
        (f64::from(philox(self.seed, self.counter)) + 0.5) / 4_294_967_296.0
    }
}

/// First word of block `counter` of Philox4x32-10 (Salmon et al., SC 2011).
fn philox(seed: u64, counter: u64) -> u32 {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
    for _ in 0..10 {
        let (high0, low0) = multiply(0xd251_1f53, c[0]);
        let (high1, low1) = multiply(0xcd9e_8d57, c[2]);
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0];
        key = [
            key[0].wrapping_add(0x9e37_79b9),
            key[1].wrapping_add(0xbb67_ae85),
        ];
    }
    c[0]
}

/// The next token of every row of logits.
///
/// Order of the steps: repetition, frequency and presence penalties; ids beyond the vocabulary and
/// blocked ids; temperature; top-k; top-p; min-p; the draw. Candidates are ordered by falling
/// logit, equal ones by rising id. The token is the first one in this order at which the sum of
/// the probabilities of the candidates left exceeds the draw.
#[derive(Debug)]
pub struct Sample<'a> {
    /// F32 `[rows, vocab]`. Penalties and blocked ids are applied in place.
    pub logits: MemMut<'a>,
    /// I32 `[rows, SAMPLE_WORDS]`: [`SampleParams::to_words`].
    pub params: Mem<'a>,
    /// I32 `[rows, window]`: tokens seen, the newest first; others than ids (-1) are skipped. The
    /// window has to hold as many as the penalties of a row reach back.
    pub recent: Mem<'a>,
    /// I32 `[rows, blocked_width]`: ids that must not be drawn; others (-1) are skipped.
    pub blocked: Mem<'a>,
    /// I32 `[rows]`: the token; -1 when a logit is NaN or no token is left.
    pub out: MemMut<'a>,
    /// Rows of logits.
    pub rows: usize,
    /// Length of a row.
    pub vocab: usize,
    /// Tokens that exist, at most `vocab`; logits beyond are padding, whatever they are.
    pub tokens: usize,
    /// Width of `recent`.
    pub window: usize,
    /// Width of `blocked`.
    pub blocked_width: usize,
}

/// Runs a [`Sample`] in host memory, in f64: regions have been checked.
pub(crate) fn sample(op: &mut Sample<'_>) -> Result<()> {
    let (params, recent) = (op.params.slice::<i32>()?, op.recent.slice::<i32>()?);
    let blocked = op.blocked.slice::<i32>()?;
    let logits = op.logits.slice_mut::<f32>()?;
    let out = op.out.slice_mut::<i32>()?;
    let (rows, _) = params.as_chunks::<SAMPLE_WORDS>();
    for (r, words) in rows.iter().enumerate() {
        let params = SampleParams::from_words(words);
        let logits = &mut logits[r * op.vocab..][..op.tokens];
        let recent = &recent[r * op.window..][..op.window];
        let blocked = &blocked[r * op.blocked_width..][..op.blocked_width];
        out[r] = choose(logits, &params, recent, blocked).map_or(-1, |id| id as i32);
    }
    Ok(())
}

fn choose(logits: &mut [f32], p: &SampleParams, recent: &[i32], blocked: &[i32]) -> Option<usize> {
    if p.penalises() {
        penalise(logits, p, recent);
    }
    let ids = blocked.iter().filter_map(|&id| usize::try_from(id).ok());
    for id in ids {
        if let Some(logit) = logits.get_mut(id) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if logits.iter().any(|l| l.is_nan()) {
        return None;
    }
    let finite = |l: &(usize, f32)| l.1 > f32::NEG_INFINITY;
    let mut items: Vec<(usize, f32)> = logits.iter().copied().enumerate().filter(finite).collect();
    // The first of equal ones; zeros are equal whatever their sign.
    let first = |a: (usize, f32), b: (usize, f32)| if b.1 > a.1 { b } else { a };
    let (best, most) = items.iter().copied().reduce(first)?;
    if p.is_greedy() {
        return Some(best);
    }
    items.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if p.top_k > 0 {
        items.truncate(p.top_k as usize);
    }
    let scale = 1.0 / f64::from(p.temperature);
    let weight = |logit: f32| match logit == most {
        true => 1.0,
        false => ((f64::from(logit) - f64::from(most)) * scale).exp(),
    };
    let mut weights: Vec<f64> = items.iter().map(|item| weight(item.1)).collect();
    if p.top_p > 0.0 && p.top_p < 1.0 {
        let bound = f64::from(p.top_p) * weights.iter().sum::<f64>();
        weights.truncate(front(&weights, |sum, _| sum < bound));
    }
    if p.min_p > 0.0 {
        // Logits are rounded: a candidate right at the bound must not fall for that.
        let bound = f64::from(p.min_p) * (1.0 - 1e-6);
        weights.truncate(front(&weights, |_, weight| weight >= bound));
    }
    let bound = p.uniform() * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let crosses = weights.iter().position(|weight| {
        sum += weight;
        sum > bound
    });
    // Rounding may leave the sum short of the bound: the last one with a weight wins.
    let last = || weights.iter().rposition(|&weight| weight > 0.0);
    Some(items[crosses.or_else(last)?].0)
}

/// How many candidates from the first on are kept, at least one: `keep` sees the sum of the weights
/// before a candidate, and its weight.
fn front(weights: &[f64], keep: impl Fn(f64, f64) -> bool) -> usize {
    let mut sum = 0.0;
    let kept = weights.iter().take_while(|&&weight| {
        let keeps = keep(sum, weight);
        sum += weight;
        keeps
    });
    kept.count().max(1)
}

/// In 32-bit floats, as the sampler does.
fn penalise(logits: &mut [f32], p: &SampleParams, recent: &[i32]) {
    let (full, decay) = (p.penalty_range as usize, p.penalty_decay as usize);
    let mut seen = HashSet::new();
    for (back, &id) in recent.iter().enumerate() {
        let weight = if back < full {
            1.0
        } else if back - full < decay {
            1.0 - (back - full + 1) as f32 / decay as f32
        } else {
            break;
        };
        let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) else {
            continue;
        };
        // The newest occurrence counts for the penalties that apply once.
        if seen.insert(id) {
            let factor = 1.0 + (p.repetition_penalty - 1.0) * weight;
            *logit = if *logit > 0.0 {
                *logit / factor
            } else {
                *logit * factor
            };
            *logit -= p.presence_penalty * weight;
        }
        *logit -= p.frequency_penalty * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f32], params: SampleParams) -> Option<usize> {
        choose(&mut logits.to_vec(), &params, &[], &[])
    }

    #[test]
    fn draws_are_those_of_philox() {
        for (seed, counter, word) in [
            // The first from its known answers, the others from its definition in Python.
            (0, 0, 0x6627_e8d5),
            (7, 0, 0xf460_7a2d),
            (7 | 1 << 40, 3 | 9 << 33, 0x4c55_eb09),
        ] {
            assert_eq!(philox(seed, counter), word);
            let params = SampleParams {
                seed,
                counter,
                ..SampleParams::default()
            };
            assert_eq!(params.uniform(), (f64::from(word) + 0.5) / 2f64.powi(32));
        }
    }

    #[test]
    fn words_keep_everything() {
        let params = SampleParams {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            presence_penalty: -0.3,
            penalty_range: 64,
            penalty_decay: 32,
            seed: 0x0123_4567_89ab_cdef,
            counter: 0xfedc_ba98_7654_3210,
        };
        assert_eq!(SampleParams::from_words(&params.to_words()), params);
        assert_eq!(
            params.to_words()[9..13],
            [-1_985_229_329, 0x0123_4567, 0x7654_3210, -19_088_744]
        );
    }

    #[test]
    fn penalties_reach_back_over_range_and_decay() {
        let params = SampleParams {
            penalty_range: 3,
            penalty_decay: 4,
            ..SampleParams::default()
        };
        assert_eq!(
            params.reach(100),
            0,
            "without a penalty nothing is looked at"
        );
        for (repetition_penalty, frequency_penalty, presence_penalty) in
            [(1.1, 0.0, 0.0), (1.0, -0.1, 0.0), (1.0, 0.0, 0.1)]
        {
            let params = SampleParams {
                repetition_penalty,
                frequency_penalty,
                presence_penalty,
                ..params
            };
            assert_eq!((params.reach(100), params.reach(5)), (7, 5));
            let all = SampleParams {
                penalty_range: u32::MAX,
                ..params
            };
            assert_eq!(all.reach(100), 100);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let greedy = SampleParams::default();
        assert_eq!(draw(&[1.0, 5.0, 5.0], greedy), Some(1));
        assert_eq!(draw(&[-0.0, 0.0, -1.0], greedy), Some(0));
        assert_eq!(draw(&[f32::NEG_INFINITY; 3], greedy), None);
        assert_eq!(draw(&[1.0, f32::NAN], greedy), None);
        let one = SampleParams {
            temperature: 3.0,
            top_k: 1,
            ..greedy
        };
        assert_eq!(draw(&[1.0, 5.0, 5.0], one), Some(1));
    }

    #[test]
    fn draws_follow_the_filtered_distribution() {
        let p = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        let counts = |params: SampleParams| {
            let mut counts = [0; 4];
            for counter in 0..4000 {
                let params = SampleParams {
                    seed: 5,
                    counter,
                    ..params
                };
                counts[draw(&p, params).unwrap()] += 1;
            }
            counts
        };
        let neutral = SampleParams {
            temperature: 1.0,
            ..SampleParams::default()
        };
        let near = |got: [i32; 4], expected: [f64; 4]| {
            for (got, expected) in got.iter().zip(expected) {
                // Five standard deviations.
                let sigma = (4000.0 * expected * (1.0 - expected)).sqrt();
                assert!(
                    (f64::from(*got) - 4000.0 * expected).abs() <= 5.0 * sigma,
                    "{got}"
                );
            }
        };
        near(counts(neutral), [0.1, 0.4, 0.2, 0.3]);
        let top_k = SampleParams {
            top_k: 2,
            ..neutral
        };
        near(counts(top_k), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        let top_p = SampleParams {
            top_p: 0.85,
            ..neutral
        };
        near(counts(top_p), [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        let min_p = SampleParams {
            min_p: 0.5,
            ..neutral
        };
        near(counts(min_p), [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        let sharp = SampleParams {
            temperature: 0.5,
            ..neutral
        };
        near(
            counts(sharp),
            [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3],
        );
    }

    #[test]
    fn penalties_and_blocked_ids() {
        let params = SampleParams {
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            presence_penalty: 0.5,
            penalty_range: 1,
            penalty_decay: 2,
            ..SampleParams::default()
        };
        let mut logits = [8.0, -2.0, 3.0, 1.0];
        // Strengths 1, 0.5, 0: the second 0 counts half of its frequency, the 1 nothing.
        let token = choose(&mut logits, &params, &[0, 0, 1, 2], &[-1, 7, 2]);
        assert_eq!(logits, [2.0, -2.0, f32::NEG_INFINITY, 1.0]);
        assert_eq!(token, Some(0));
    }
}
