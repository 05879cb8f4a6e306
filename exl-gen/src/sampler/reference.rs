//! The definitions of docs/sampling.md word by word, in f64, over lists that are sorted in full.

use super::{Mirostat, SamplerSettings, Stage};

/// Candidates: token and logarithm of its probability, likeliest first, lowest id first among
/// equals.
pub(super) type Distribution = Vec<(u32, f64)>;

pub(super) fn softmax(logits: &[f32]) -> Distribution {
    let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    normal(all)
}

fn normal(mut all: Distribution) -> Distribution {
    let most = all[0].1;
    let total: f64 = all.iter().map(|c| (c.1 - most).exp()).sum();
    all.iter_mut().for_each(|c| c.1 -= most + total.ln());
    all
}

fn entropy(all: &Distribution) -> f64 {
    -all.iter().map(|c| c.1.exp() * c.1).sum::<f64>()
}

/// Probabilities to the power of `exponent`.
fn power(all: &Distribution, exponent: f64) -> Distribution {
    all.iter().map(|&(t, ln)| (t, ln * exponent)).collect()
}

/// One step. Mirostat's bound is `mu`; XTC's coin has fallen for exclusion.
pub(super) fn step(
    stage: Stage,
    s: &SamplerSettings,
    all: &Distribution,
    (mu, vocab): (f64, usize),
) -> Distribution {
    let (most, n) = (all[0].1.exp(), all.len());
    let least = |bound: f64| {
        let enough = |c: &&(u32, f64)| c.1.exp() >= bound * (1.0 - 1e-6);
        let kept: Distribution = all.iter().filter(enough).copied().collect();
        if kept.is_empty() {
            all[..1].to_vec()
        } else {
            kept
        }
    };
    normal(match stage {
        Stage::Smoothing => {
            let bent = |ln: f64| -f64::from(s.smoothing_factor) * (ln - all[0].1).powi(2);
            all.iter().map(|&(t, ln)| (t, bent(ln))).collect()
        }
        Stage::Temperature => power(all, 1.0 / f64::from(s.temperature)),
        Stage::DynamicTemperature if n == 1 => all.clone(),
        Stage::DynamicTemperature => {
            let (low, high) = (f64::from(s.min_temperature), f64::from(s.max_temperature));
            let share = entropy(all) / (n as f64).ln();
            let t = low + (high - low) * share.powf(f64::from(s.temperature_exponent));
            if t < 0.01 {
                all[..1].to_vec()
            } else {
                power(all, 1.0 / t)
            }
        }
        Stage::TopK => all[..s.top_k.min(n)].to_vec(),
        Stage::TopP => front(all, f64::from(s.top_p)),
        Stage::TopA => least(f64::from(s.top_a) * most * most),
        Stage::MinP => least(f64::from(s.min_p) * most),
        Stage::Tfs => tail_free(all, f64::from(s.tfs)),
        Stage::Typical => typical(all, f64::from(s.typical_p)),
        Stage::Mirostat if s.mirostat == Mirostat::V1 => all[..zipf(all, mu, vocab)].to_vec(),
        Stage::Mirostat => least((-mu).exp2()),
        Stage::Xtc => xtc(all, f64::from(s.xtc_threshold)),
    })
}

/// Those with less than `share` before them.
fn front(all: &Distribution, share: f64) -> Distribution {
    let mut before = 0.0;
    let wanted = all.iter().take_while(|c| {
        let wanted = before < share;
        before += c.1.exp();
        wanted
    });
    wanted.copied().collect()
}

fn tail_free(all: &Distribution, z: f64) -> Distribution {
    if all.len() < 3 {
        return all.clone();
    }
    let p: Vec<f64> = all.iter().map(|c| c.1.exp()).collect();
    let bend = |i: usize| (-p[i] + 2.0 * p[i + 1] - p[i + 2]).abs();
    let bends: Vec<f64> = (0..all.len() - 2).map(bend).collect();
    let total: f64 = bends.iter().sum();
    let mut sum = 0.0;
    for (i, bend) in bends.iter().enumerate() {
        sum += bend;
        if sum > z * total {
            return all[..=i].to_vec();
        }
    }
    all.clone()
}

fn typical(all: &Distribution, t: f64) -> Distribution {
    let h = entropy(all);
    let mut order: Vec<(f64, usize)> = all
        .iter()
        .enumerate()
        .map(|(i, c)| ((-c.1 - h).abs(), i))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut kept, mut sum) = (Vec::new(), 0.0);
    for (_, i) in order {
        kept.push(i);
        sum += all[i].1.exp();
        if sum >= t * (1.0 - 1e-6) {
            break;
        }
    }
    kept.sort_unstable();
    kept.into_iter().map(|i| all[i]).collect()
}

/// Candidates that version 1 of mirostat keeps.
fn zipf(all: &Distribution, mu: f64, vocab: usize) -> usize {
    let (mut up, mut down) = (0.0, 0.0);
    for i in 1..all.len().min(100) {
        let t = ((i as f64 + 1.0) / i as f64).ln();
        up += t * (all[i - 1].1 - all[i].1);
        down += t * t;
    }
    let (s, n) = (up / down, vocab as f64);
    let epsilon = s - 1.0;
    let k = (epsilon * mu.exp2() / (1.0 - n.powf(-epsilon))).powf(1.0 / s);
    if k.is_nan() {
        return all.len();
    }
    (k.round().max(1.0) as usize).min(all.len())
}

fn xtc(all: &Distribution, t: f64) -> Distribution {
    let choices = all.iter().filter(|c| c.1.exp() >= t * (1.0 - 1e-6)).count();
    all[choices.saturating_sub(1)..].to_vec()
}

/// DRY's penalty of every token: tries every length and every place.
pub(super) fn dry(s: &SamplerSettings, history: &[u32], vocab: usize) -> Vec<f64> {
    let mut penalty = vec![0.0; vocab];
    let window = s.dry_range.map_or(0, |r| history.len().saturating_sub(r));
    let history = &history[window..];
    for length in (1..=s.dry_max_ngram.min(history.len())).rev() {
        let end = &history[history.len() - length..];
        let found: Vec<usize> = (0..history.len() - length)
            .filter(|&at| &history[at..at + length] == end)
            .collect();
        if found.is_empty() {
            continue;
        }
        if length >= s.dry_allowed_length {
            let power = (length - s.dry_allowed_length) as i32;
            for at in found {
                penalty[history[at + length] as usize] +=
                    f64::from(s.dry_multiplier) * f64::from(s.dry_base).powi(power);
            }
        }
        break;
    }
    penalty
}
