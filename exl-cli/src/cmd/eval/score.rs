//! Perplexity, KL divergence and agreement from logits.

use std::sync::Mutex;

/// Positions that a thread takes at a time.
const SHARE: usize = 4;

/// What two distributions of the next token say about one position.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Position {
    /// `-ln p(next token)` of the judged model; `None` where the row ends.
    nll: Option<f64>,
    /// `KL(reference || judged)` in nats, and whether both find the same token likeliest.
    distance: Option<(f64, bool)>,
}

/// Sums over all positions seen.
#[derive(Debug, Default)]
pub(super) struct Score {
    nll: f64,
    predictions: u64,
    kls: Vec<f32>,
    agreements: u64,
}

/// Logits of a run of positions of one row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logits<'a> {
    /// `[n, vocab]` of the judged model.
    pub(super) judged: &'a [f32],
    /// The same of the reference, if there is one.
    pub(super) reference: Option<&'a [f32]>,
    pub(super) vocab: usize,
    /// The token that follows each position; one fewer at the end of a row.
    pub(super) next: &'a [u32],
}

impl Score {
    /// Adds a run of positions, shared out among threads.
    pub(super) fn add(&mut self, logits: &Logits<'_>, threads: usize) {
        let n = logits.judged.len() / logits.vocab;
        let mut found = vec![None; n];
        {
            let work = Mutex::new(found.chunks_mut(SHARE).enumerate());
            let take = || work.lock().ok().and_then(|mut chunks| chunks.next());
            let worker = || {
                while let Some((chunk, out)) = take() {
                    for (i, slot) in out.iter_mut().enumerate() {
                        *slot = Some(position(logits, chunk * SHARE + i));
                    }
                }
            };
            std::thread::scope(|scope| {
                for _ in 1..threads.min(n.div_ceil(SHARE)) {
                    scope.spawn(worker);
                }
                worker();
            });
        }
        // In order, so that sums do not depend on the threads.
        for position in found.into_iter().flatten() {
            if let Some(nll) = position.nll {
                self.nll += nll;
                self.predictions += 1;
            }
            if let Some((kl, same)) = position.distance {
                self.kls.push(kl as f32);
                self.agreements += u64::from(same);
            }
        }
    }

    /// `exp` of the mean negative log likelihood.
    pub(super) fn perplexity(&self) -> f64 {
        (self.nll / self.predictions as f64).exp()
    }

    /// Mean KL divergence in nats.
    pub(super) fn kl(&self) -> Option<f64> {
        let sum: f64 = self.kls.iter().map(|kl| f64::from(*kl)).sum();
        (!self.kls.is_empty()).then(|| sum / self.kls.len() as f64)
    }

    /// The KL divergence that 1% of positions exceed.
    pub(super) fn kl_p99(&self) -> Option<f64> {
        let mut sorted = self.kls.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        quantile(&sorted, 0.99)
    }

    /// Share of positions where both models find the same token likeliest.
    pub(super) fn top1(&self) -> Option<f64> {
        (!self.kls.is_empty()).then(|| self.agreements as f64 / self.kls.len() as f64)
    }
}

/// Linear interpolation between the neighbours, as numpy and torch do.
fn quantile(sorted: &[f32], q: f64) -> Option<f64> {
    let at = q * (sorted.len().checked_sub(1)? as f64);
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    let (a, b) = (f64::from(sorted[low]), f64::from(sorted[high]));
    Some(a + (b - a) * (at - low as f64))
}

fn position(logits: &Logits<'_>, at: usize) -> Position {
    let row = at * logits.vocab..(at + 1) * logits.vocab;
    let judged = &logits.judged[row.clone()];
    let judged_norm = log_sum_exp(judged);
    let nll = logits
        .next
        .get(at)
        .map(|t| judged_norm - f64::from(judged[*t as usize]));
    let distance = logits.reference.map(|reference| {
        let reference = &reference[row.clone()];
        let kl = divergence(reference, judged, judged_norm);
        (kl, argmax(reference) == argmax(judged))
    });
    Position { nll, distance }
}

fn divergence(reference: &[f32], judged: &[f32], judged_norm: f64) -> f64 {
    let norm = log_sum_exp(reference);
    let sum: f64 = reference
        .iter()
        .zip(judged)
        .map(|(r, j)| {
            let log_p = f64::from(*r) - norm;
            log_p.exp() * (log_p - (f64::from(*j) - judged_norm))
        })
        .sum();
    // Rounding can leave a tiny negative sum when both are the same.
    sum.max(0.0)
}

fn log_sum_exp(values: &[f32]) -> f64 {
    let most = f64::from(values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + values
        .iter()
        .map(|v| (f64::from(*v) - most).exp())
        .sum::<f64>()
        .ln()
}

fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }

    #[test]
    fn uniform_logits_have_the_vocabulary_as_perplexity() {
        let judged = vec![0.5f32; 3 * 8];
        let mut score = Score::default();
        score.add(
            &Logits {
                judged: &judged,
                reference: None,
                vocab: 8,
                next: &[1, 7],
            },
            2,
        );
        close(score.perplexity(), 8.0);
        assert_eq!(
            (score.kl(), score.kl_p99(), score.top1()),
            (None, None, None)
        );
        assert_eq!(score.predictions, 2);
    }

    /// KL of (3/4, 1/4) to (1/2, 1/2) is 3/4 ln(3/2) + 1/4 ln(1/2).
    #[test]
    fn the_divergence_of_two_coins() {
        let reference = [3f32.ln(), 0.0];
        let judged = [0.0f32, 0.0];
        let mut score = Score::default();
        let logits = Logits {
            judged: &judged,
            reference: Some(&reference),
            vocab: 2,
            next: &[],
        };
        score.add(&logits, 1);
        close(score.kl().unwrap(), 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln());
        assert_eq!(score.top1(), Some(1.0));
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let values: Vec<f32> = (0..40 * 16)
            .map(|i| ((i * 37) % 101) as f32 / 10.0)
            .collect();
        let other: Vec<f32> = values.iter().rev().copied().collect();
        let next = vec![3u32; 39];
        let logits = Logits {
            judged: &values,
            reference: Some(&other),
            vocab: 16,
            next: &next,
        };
        let (mut one, mut four) = (Score::default(), Score::default());
        one.add(&logits, 1);
        four.add(&logits, 4);
        assert_eq!(one.perplexity().to_bits(), four.perplexity().to_bits());
        assert_eq!(one.kls, four.kls);
        assert_eq!(one.agreements, four.agreements);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[], 0.99), None);
        assert_eq!(quantile(&[1.0], 0.99), Some(1.0));
        close(quantile(&[0.0, 1.0, 2.0], 0.75).unwrap(), 1.5);
    }
}
