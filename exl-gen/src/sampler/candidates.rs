//! Candidates in order of likelihood, sorted only as far as needed.

use super::Sampled;

/// Tokens that can still be drawn. Weights are relative to the likeliest and never renormalised
/// in place: every step here depends on their ratios and their sum alone.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    items: Vec<(u32, f32)>,
    weights: Vec<f64>,
    /// Items in final order; `weights` holds as many.
    sorted: usize,
    /// Sum of all weights, once somebody asked for it.
    total: Option<f64>,
    scale: f64,
    most: f64,
}

impl Candidates {
    /// Takes all finite logits at a temperature.
    pub(super) fn load(&mut self, logits: &[f32], temperature: f32) {
        self.items.clear();
        self.weights.clear();
        self.sorted = 0;
        self.items.extend(
            (0u32..)
                .zip(logits.iter().copied())
                .filter(|&(_, logit)| logit > f32::NEG_INFINITY),
        );
        let most = self
            .items
            .iter()
            .fold(f32::NEG_INFINITY, |most, item| most.max(item.1));
        self.most = f64::from(most);
        self.scale = 1.0 / f64::from(temperature);
        self.total = None;
    }

    /// Sum of all weights. Summed late, because a cut to few candidates spares most of the work.
    fn total(&mut self) -> f64 {
        let total = match self.total {
            Some(total) => total,
            None => self.items.iter().map(|item| self.weight(item.1)).sum(),
        };
        self.total = Some(total);
        total
    }

    fn weight(&self, logit: f32) -> f64 {
        if f64::from(logit) == self.most {
            return 1.0;
        }
        ((f64::from(logit) - self.most) * self.scale).exp()
    }

    /// Brings the first `count` items into final order.
    fn sort(&mut self, count: usize) {
        let count = count.min(self.items.len());
        if count <= self.sorted {
            return;
        }
        let order =
            |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0));
        let rest = &mut self.items[self.sorted..];
        let wanted = count - self.sorted;
        if wanted < rest.len() {
            rest.select_nth_unstable_by(wanted, order);
        }
        rest[..wanted].sort_unstable_by(order);
        for at in self.sorted..count {
            let weight = self.weight(self.items[at].1);
            self.weights.push(weight);
        }
        self.sorted = count;
    }

    /// The item at a place in the order and its weight; sorts ahead in growing steps.
    fn at(&mut self, place: usize) -> Option<(u32, f64)> {
        if place >= self.items.len() {
            return None;
        }
        if place >= self.sorted {
            self.sort((place + 1).max(self.sorted * 4).max(64));
        }
        Some((self.items[place].0, self.weights[place]))
    }

    fn keep(&mut self, count: usize) {
        self.sort(count);
        self.items.truncate(count);
        self.weights.truncate(count);
        self.sorted = self.items.len();
        self.total = Some(self.weights.iter().sum());
    }

    /// Keeps the `k` likeliest; 0 keeps all.
    pub(super) fn top_k(&mut self, k: usize) {
        if k > 0 && k < self.items.len() {
            self.keep(k);
        }
    }

    /// Keeps the shortest front whose share reaches `p`.
    pub(super) fn top_p(&mut self, p: f32) {
        if p <= 0.0 || p >= 1.0 {
            return;
        }
        let (bound, mut sum, mut count) = (f64::from(p) * self.total(), 0.0, 0);
        while sum < bound
            && let Some((_, weight)) = self.at(count)
        {
            sum += weight;
            count += 1;
        }
        self.keep(count.max(1));
    }

    /// Keeps those whose weight is at least `m` of the likeliest's.
    pub(super) fn min_p(&mut self, m: f32) {
        if m <= 0.0 {
            return;
        }
        // Logits are rounded: a candidate right at the bound must not fall for that.
        let bound = f64::from(m) * (1.0 - 1e-6);
        let mut count = 0;
        while self.at(count).is_some_and(|(_, weight)| weight >= bound) {
            count += 1;
        }
        self.keep(count.max(1));
    }

    /// Inverse of the cumulative distribution at `u`, likeliest first.
    pub(super) fn draw(&mut self, u: f64) -> Sampled {
        let total = self.total();
        let bound = u * total;
        let (mut sum, mut place) = (0.0, 0);
        let mut last = Sampled {
            token: 0,
            probability: 0.0,
        };
        while let Some((token, weight)) = self.at(place) {
            // Rounding may leave the sum short of the bound: the last one with weight wins.
            if weight > 0.0 {
                last = Sampled {
                    token,
                    probability: (weight / total) as f32,
                };
            }
            sum += weight;
            if sum > bound || weight == 0.0 {
                break;
            }
            place += 1;
        }
        last
    }

    #[cfg(test)]
    pub(super) fn probabilities(&mut self) -> Vec<(u32, f64)> {
        let (count, total) = (self.items.len(), self.total());
        self.sort(count);
        (0..count)
            .map(|at| (self.items[at].0, self.weights[at] / total))
            .collect()
    }
}
