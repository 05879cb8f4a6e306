//! How far a quantized model's predictions are from the original's.

use rayon::prelude::*;

/// Positions a thread takes at a time.
const CHUNK: usize = 8;

/// Sums over positions of two streams of logits: the original's and the quantized model's.
///
/// The divergence is KL(original || quantized) of the next-token distributions in nats, from f32
/// logits with sums in f64. Results do not depend on the number of threads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KlScore {
    kls: Vec<f32>,
    kl_sum: f64,
    agreements: u64,
    nll: f64,
    reference_nll: f64,
    predictions: u64,
}

/// One position.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Position {
    pub(crate) kl: f64,
    agrees: bool,
    nll: Option<(f64, f64)>,
}

impl KlScore {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a run of positions of one row: logits `[n, vocab]` of both models, and the tokens that
    /// follow each position (one fewer at the end of a row).
    pub fn add(&mut self, reference: &[f32], quantized: &[f32], vocab: usize, next: &[u32]) {
        let n = reference.len().min(quantized.len()) / vocab.max(1);
        let at: Vec<usize> = (0..n).collect();
        let found: Vec<Position> = at
            .par_chunks(CHUNK)
            .flat_map_iter(|chunk| {
                chunk.iter().map(|&i| {
                    let row = i * vocab..(i + 1) * vocab;
                    position(
                        &reference[row.clone()],
                        &quantized[row],
                        next.get(i).copied(),
                    )
                })
            })
            .collect();
        for p in found {
            self.kls.push(p.kl as f32);
            self.kl_sum += p.kl;
            self.agreements += u64::from(p.agrees);
            if let Some((reference, quantized)) = p.nll {
                self.reference_nll += reference;
                self.nll += quantized;
                self.predictions += 1;
            }
        }
    }

    /// Positions seen.
    pub fn positions(&self) -> usize {
        self.kls.len()
    }

    /// Mean divergence.
    pub fn mean_kl(&self) -> f64 {
        self.kl_sum / self.kls.len().max(1) as f64
    }

    /// The divergence that 1% of the positions exceed, interpolated between neighbours.
    pub fn p99_kl(&self) -> f64 {
        let mut sorted = self.kls.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return 0.0;
        };
        let at = 0.99 * last as f64;
        let (low, high) = (at.floor() as usize, at.ceil() as usize);
        let (a, b) = (f64::from(sorted[low]), f64::from(sorted[high]));
        a + (b - a) * (at - low as f64)
    }

    /// Whether every number is one: false when a model computed NaN or infinity.
    pub fn is_finite(&self) -> bool {
        let sums = [self.kl_sum, self.nll, self.reference_nll];
        sums.iter().all(|s| s.is_finite())
    }

    /// Share of positions where both models find the same token likeliest.
    pub fn top1(&self) -> f64 {
        self.agreements as f64 / self.kls.len().max(1) as f64
    }

    /// Perplexity of the quantized model.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.predictions.max(1) as f64).exp()
    }

    /// Perplexity of the original.
    pub fn reference_perplexity(&self) -> f64 {
        (self.reference_nll / self.predictions.max(1) as f64).exp()
    }
}

pub(crate) fn position(reference: &[f32], quantized: &[f32], next: Option<u32>) -> Position {
    let (top_r, norm_r) = norm(reference);
    let (top_q, norm_q) = norm(quantized);
    // No comparison with NaN holds, so the sum below would leave every term out.
    let mut kl = if norm_r.is_finite() { 0.0 } else { f64::NAN };
    for (&r, &q) in reference.iter().zip(quantized) {
        let log_p = f64::from(r) - norm_r;
        // Below this a term is under 1e-17 whatever the other model says.
        if log_p > -40.0 {
            kl += f64::from((log_p as f32).exp()) * (log_p - (f64::from(q) - norm_q));
        }
    }
    let nll = next
        .map(|t| t as usize)
        .filter(|&t| t < reference.len())
        .map(|t| {
            (
                norm_r - f64::from(reference[t]),
                norm_q - f64::from(quantized[t]),
            )
        });
    Position {
        // Rounding can leave a tiny negative sum when both are the same; NaN stays what it is.
        kl: if kl < 0.0 { 0.0 } else { kl },
        agrees: top_r == top_q,
        nll,
    }
}

/// The `count` likeliest tokens, the likeliest first, with their probabilities; ties go to the lower
/// token.
#[cfg(feature = "pipeline")]
pub(crate) fn likeliest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let (_, norm) = norm(logits);
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if found.len() == count && found.last().is_some_and(|l| logit <= l.1) {
            continue;
        }
        let at = found.partition_point(|f| f.1 >= logit);
        found.insert(at, (token as u32, logit));
        found.truncate(count);
    }
    let share = |(token, logit): (u32, f32)| (token, (f64::from(logit) - norm).exp() as f32);
    found.into_iter().map(share).collect()
}

/// Index of the largest logit and the logarithm of the sum of exponentials.
fn norm(logits: &[f32]) -> (usize, f64) {
    let mut top = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[top] {
            top = i;
        }
    }
    let most = logits.get(top).copied().unwrap_or(0.0);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - most).exp())).sum();
    (top, f64::from(most) + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }

    #[test]
    fn two_coins() {
        // KL of (3/4, 1/4) to (1/2, 1/2) is 3/4 ln(3/2) + 1/4 ln(1/2).
        let mut score = KlScore::new();
        score.add(&[3f32.ln(), 0.0], &[0.0, 0.0], 2, &[1]);
        close(score.mean_kl(), 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln());
        close(score.top1(), 1.0);
        close(score.perplexity(), 2.0);
        close(score.reference_perplexity(), 4.0);
    }

    #[test]
    fn equal_models_do_not_differ_and_rows_end_without_a_next_token() {
        let logits: Vec<f32> = noise(1, 5 * 30).iter().map(|x| x * 8.0).collect();
        let mut score = KlScore::new();
        score.add(&logits, &logits, 30, &[0, 1, 2, 3]);
        assert!(score.mean_kl() < 1e-7 && score.top1() == 1.0);
        assert_eq!((score.positions(), score.predictions), (5, 4));
        close(score.perplexity(), score.reference_perplexity());
    }

    #[test]
    fn what_is_no_number_is_not_taken_for_agreement() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut score = KlScore::new();
            score.add(&[1.0, 2.0, 3.0], &[1.0, bad, 3.0], 3, &[1]);
            assert!(!score.is_finite() && !score.mean_kl().is_finite(), "{bad}");
        }
        // Also where no token follows, and in the original.
        for bad in [f32::NAN, f32::INFINITY] {
            let mut score = KlScore::new();
            score.add(&[1.0, bad, 3.0], &[1.0, 2.0, 3.0], 3, &[]);
            assert!(!score.is_finite() && !score.mean_kl().is_finite(), "{bad}");
        }
        let mut score = KlScore::new();
        score.add(&[1.0, 2.0], &[2.0, 1.0], 2, &[1]);
        assert!(score.is_finite());
    }

    #[cfg(feature = "pipeline")]
    #[test]
    fn the_likeliest_come_first() {
        let logits = [0.0, 2f32.ln(), 0.0, 4f32.ln()];
        let found = likeliest(&logits, 3);
        let tokens: Vec<u32> = found.iter().map(|f| f.0).collect();
        assert_eq!(tokens, [3, 1, 0]);
        close(f64::from(found[0].1), 0.5);
        close(f64::from(found[2].1), 0.125);
        assert_eq!(likeliest(&[1.0], 3).len(), 1);
    }

    #[test]
    fn percentile_interpolates_and_threads_do_not_matter() {
        let a: Vec<f32> = noise(2, 101 * 16).iter().map(|x| x * 4.0).collect();
        let b: Vec<f32> = noise(3, 101 * 16).iter().map(|x| x * 4.0).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut score = KlScore::new();
                score.add(&a, &b, 16, &[0; 100]);
                score
            })
        };
        let one = run(1);
        assert_eq!(one, run(3));
        let mut sorted = one.kls.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        close(one.p99_kl(), f64::from(sorted[99]));
        assert!(one.mean_kl() > 0.1 && one.p99_kl() > one.mean_kl());
    }
}
