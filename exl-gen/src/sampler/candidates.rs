//! Candidates in order of likelihood, sorted only as far as needed.

mod filters;

/// Logits are rounded: a candidate right at a bound must not fall for that.
const ROUNDING: f64 = 1.0 - 1e-6;

/// What a step makes of the distance to the best logit. Both keep the order.
#[derive(Clone, Copy, Debug)]
enum Warp {
    Scale(f64),
    /// `-factor * (x - top)^2`.
    Smooth {
        factor: f64,
        top: f64,
    },
}

/// Tokens that can still be drawn. Weights are relative to the best logit loaded and never
/// renormalised in place: every step here depends on their ratios and their sum alone.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    items: Vec<(u32, f32)>,
    weights: Vec<f64>,
    /// Items in final order; `weights` holds as many.
    sorted: usize,
    /// Sum of all weights, once somebody asked for it.
    total: Option<f64>,
    warps: Vec<Warp>,
    most: f64,
}

impl Candidates {
    /// Takes all finite logits.
    pub(super) fn load(&mut self, logits: &[f32]) {
        self.items.clear();
        self.weights.clear();
        self.warps.clear();
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

    /// A logit after the steps so far, less a constant: the logarithm of its weight.
    fn relative(&self, logit: f32) -> f64 {
        let distance = if f64::from(logit) == self.most {
            // Not a number for an infinite logit.
            0.0
        } else {
            f64::from(logit) - self.most
        };
        self.warps.iter().fold(distance, |x, warp| match *warp {
            Warp::Scale(scale) => x * scale,
            Warp::Smooth { factor, top } => -factor * (x - top) * (x - top),
        })
    }

    fn weight(&self, logit: f32) -> f64 {
        self.relative(logit).exp()
    }

    fn warp(&mut self, warp: Warp) {
        self.warps.push(warp);
        for at in 0..self.sorted {
            self.weights[at] = self.weight(self.items[at].1);
        }
        self.total = None;
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
        let best = self.at(0).map_or(0.0, |(_, weight)| weight);
        self.keep_from(f64::from(m) * ROUNDING * best);
    }

    /// Keeps those with at least this weight, and one in any case.
    fn keep_from(&mut self, bound: f64) {
        let mut count = 0;
        while self.at(count).is_some_and(|(_, weight)| weight >= bound) {
            count += 1;
        }
        self.keep(count.max(1));
    }

    /// Keeps what `keep` wants of the sorted ones, by place and token, and all others.
    fn retain(&mut self, keep: impl Fn(usize, u32) -> bool) {
        let (sorted, before) = (self.sorted, self.items.len());
        let kept = |place: usize, token: u32| place >= sorted || keep(place, token);
        let mut place = 0..;
        let items = &self.items;
        self.weights.retain(|_| {
            let at = place.next().unwrap_or(sorted);
            kept(at, items[at].0)
        });
        let mut place = 0..;
        self.items
            .retain(|item| kept(place.next().unwrap_or(before), item.0));
        self.sorted = self.weights.len();
        self.total = None;
    }

    /// Inverse of the cumulative distribution at `u`, likeliest first.
    /// Gives the token and its probability.
    pub(super) fn draw(&mut self, u: f64) -> (u32, f64) {
        let total = self.total();
        let bound = u * total;
        let (mut sum, mut place) = (0.0, 0);
        let mut last = (0, 0.0);
        while let Some((token, weight)) = self.at(place) {
            // Rounding may leave the sum short of the bound: the last one with weight wins.
            if weight > 0.0 {
                last = (token, weight / total);
            }
            sum += weight;
            if sum > bound || weight == 0.0 {
                break;
            }
            place += 1;
        }
        last
    }

    /// All that can be drawn with its probability, likeliest first.
    pub(super) fn probabilities(&mut self) -> Vec<(u32, f64)> {
        let (count, total) = (self.items.len(), self.total());
        self.sort(count);
        (0..count)
            .map(|at| (self.items[at].0, self.weights[at] / total))
            .collect()
    }
}
