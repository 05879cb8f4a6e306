//! Filters that are not a plain cut by rank or share, and the temperatures.

use super::{Candidates, ROUNDING, Warp};

/// Candidates from which version 1 of mirostat estimates Zipf's exponent.
const ZIPF_CANDIDATES: usize = 100;

impl Candidates {
    /// Divides the logits.
    pub(in super::super) fn temperature(&mut self, temperature: f32) {
        self.warp(Warp::Scale(1.0 / f64::from(temperature)));
    }

    /// A logit `d` below the best becomes `-factor * d^2`.
    pub(in super::super) fn smoothing(&mut self, factor: f32) {
        self.sort(1);
        let top = self.relative(self.items[0].1);
        self.warp(Warp::Smooth {
            factor: f64::from(factor),
            top,
        });
    }

    /// Temperature from `low` to `high`, by the share that the entropy has of its maximum, raised
    /// to `exponent`; gives it. A temperature of nothing keeps the likeliest alone.
    pub(in super::super) fn dynamic_temperature(
        &mut self,
        (low, high): (f32, f32),
        exponent: f32,
    ) -> f64 {
        let most = (self.items.len() as f64).ln();
        if self.items.len() < 2 {
            return 1.0;
        }
        let share = (self.entropy() / most).clamp(0.0, 1.0);
        let (low, high) = (f64::from(low), f64::from(high));
        let temperature = low + (high - low) * share.powf(f64::from(exponent));
        if temperature < f64::from(super::super::settings::GREEDY_BELOW) {
            self.keep(1);
        } else {
            self.warp(Warp::Scale(1.0 / temperature));
        }
        temperature
    }

    /// In nats.
    pub(in super::super) fn entropy(&mut self) -> f64 {
        let total = self.total();
        let mean: f64 = self
            .items
            .iter()
            .map(|item| {
                let (x, weight) = (self.relative(item.1), self.weight(item.1));
                if weight > 0.0 { x * weight } else { 0.0 }
            })
            .sum();
        total.ln() - mean / total
    }

    /// Keeps those with `p >= a * p_max^2`.
    pub(in super::super) fn top_a(&mut self, a: f32) {
        let total = self.total();
        let best = self.at(0).map_or(0.0, |(_, weight)| weight);
        self.keep_from(f64::from(a) * best * best / total);
    }

    /// Keeps the front up to a share `z` of the absolute second differences of the sorted
    /// probabilities.
    pub(in super::super) fn tfs(&mut self, z: f32) {
        let count = self.items.len();
        if count < 3 {
            return;
        }
        self.sort(count);
        let curve = |w: &[f64]| (w[0] - 2.0 * w[1] + w[2]).abs();
        let bound = f64::from(z) * self.weights.windows(3).map(curve).sum::<f64>();
        let mut sum = 0.0;
        let crossing = self.weights.windows(3).map(curve).position(|part| {
            sum += part;
            sum > bound
        });
        if let Some(at) = crossing {
            self.keep(at + 1);
        }
    }

    /// Keeps those whose surprise is nearest to the entropy until their sum reaches `p`.
    pub(in super::super) fn typical(&mut self, p: f32) {
        let (count, total, entropy) = (self.items.len(), self.total(), self.entropy());
        self.sort(count);
        let deviation: Vec<f64> = self
            .items
            .iter()
            .map(|item| (total.ln() - self.relative(item.1) - entropy).abs())
            .collect();
        let mut places: Vec<usize> = (0..count).collect();
        // Stable: the likelier one of equals first.
        places.sort_by(|&a, &b| deviation[a].total_cmp(&deviation[b]));
        let bound = f64::from(p) * total * ROUNDING;
        let (mut sum, mut keep) = (0.0, vec![false; count]);
        for place in places {
            keep[place] = true;
            sum += self.weights[place];
            if sum >= bound {
                break;
            }
        }
        self.retain(|place, _| keep[place]);
    }

    /// Version 2: keeps what is at most `mu` bits surprising.
    pub(in super::super) fn mirostat_v2(&mut self, mu: f64) {
        let bound = (-mu).exp2() * self.total();
        self.keep_from(bound * ROUNDING);
    }

    /// Version 1: top-k, where `k` follows from Zipf's law for a vocabulary of `vocab` tokens and
    /// an expected surprise of `mu` bits.
    pub(in super::super) fn mirostat_v1(&mut self, mu: f64, vocab: usize) {
        let s = self.zipf_exponent();
        let epsilon = s - 1.0;
        let scale = if epsilon.abs() < 1e-9 {
            1.0 / (vocab as f64).ln()
        } else {
            epsilon / -(-epsilon * (vocab as f64).ln()).exp_m1()
        };
        let k = (scale * mu.exp2()).powf(1.0 / s).round();
        let count = self.items.len();
        // Not a number where all candidates are equal: nothing tells them apart.
        let k = if k.is_nan() {
            count
        } else {
            k.max(1.0) as usize
        };
        if k < count {
            self.keep(k);
        }
    }

    /// Least squares of the logarithms of neighbouring probabilities over those of their ranks.
    pub(in super::super) fn zipf_exponent(&mut self) -> f64 {
        let (mut products, mut squares) = (0.0, 0.0);
        for place in 1..ZIPF_CANDIDATES {
            if self.at(place).is_none() {
                break;
            }
            let before = self.relative(self.items[place - 1].1);
            let fall = before - self.relative(self.items[place].1);
            if fall.is_infinite() {
                break;
            }
            let t = ((place + 1) as f64 / place as f64).ln();
            products += t * fall;
            squares += t * t;
        }
        products / squares
    }

    /// Takes away the candidates with a probability of at least `threshold` but the least likely
    /// of them; `protected` ones neither go nor count.
    pub(in super::super) fn exclude_top_choices(
        &mut self,
        threshold: f32,
        protected: impl Fn(u32) -> bool,
    ) {
        let bound = f64::from(threshold) * self.total() * ROUNDING;
        let (mut choices, mut place) = (Vec::new(), 0);
        while let Some((token, weight)) = self.at(place)
            && weight >= bound
        {
            if !protected(token) {
                choices.push(place);
            }
            place += 1;
        }
        let Some(&least) = choices.last() else {
            return;
        };
        self.retain(|place, token| place >= least || protected(token));
    }
}
