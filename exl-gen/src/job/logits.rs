//! Arithmetic on rows of logits.

use crate::request::TokenLogprobs;

/// `ln(sum(exp(row)))`.
fn log_sum(row: &[f32]) -> f32 {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !most.is_finite() {
        return most;
    }
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    most + sum.ln() as f32
}

/// Classifier-free guidance: `scale` times the log-probabilities of `row` and `1 - scale` times those
/// of `negative`.
pub(super) fn guide(row: &mut [f32], negative: &[f32], scale: f32) {
    let (own, other) = (log_sum(row), log_sum(negative));
    for (logit, against) in row.iter_mut().zip(negative) {
        *logit = mix(*logit - own, *against - other, scale);
    }
}

fn mix(positive: f32, negative: f32, scale: f32) -> f32 {
    // Infinities of both signs would meet in a NaN.
    if positive == f32::NEG_INFINITY {
        return positive;
    }
    scale * positive + (1.0 - scale) * negative.max(f32::MIN / 1e6)
}

/// Excludes all tokens but `allowed`.
pub(super) fn only(row: &mut [f32], allowed: &[u32]) {
    let mut kept = allowed.iter().peekable();
    for (id, logit) in row.iter_mut().enumerate() {
        if kept.next_if(|&&allowed| allowed as usize == id).is_none() {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Log-probabilities of a token and of the `count` likeliest, before penalties and temperature.
pub(super) fn logprobs(row: &[f32], token: u32, count: usize) -> TokenLogprobs {
    let sum = log_sum(row);
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let count = count.min(ids.len());
    let order = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if count > 0 && count < ids.len() {
        ids.select_nth_unstable_by(count - 1, order);
    }
    ids.truncate(count);
    ids.sort_unstable_by(order);
    let logprob = |id: u32| row.get(id as usize).map_or(f32::NEG_INFINITY, |l| l - sum);
    TokenLogprobs {
        token,
        logprob: logprob(token),
        top: ids.into_iter().map(|id| (id, logprob(id))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guidance_of_known_values() {
        assert_eq!(mix(-1.0, -0.5, 2.0), -1.5);
        assert_eq!(mix(-1.0, -2.0, 2.0), 0.0);
        assert_eq!(
            mix(f32::NEG_INFINITY, f32::NEG_INFINITY, 2.0),
            f32::NEG_INFINITY
        );
        // Adding to all logits changes nothing.
        let (mut a, mut b) = ([1.0, 2.0, 0.0], [11.0, 12.0, 10.0]);
        guide(&mut a, &[0.0, 0.0, 3.0], 1.5);
        guide(&mut b, &[5.0, 5.0, 8.0], 1.5);
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5),
            "{a:?} {b:?}"
        );
        // Scale 1 is the plain distribution.
        let mut plain = [1.0, 2.0, 0.0];
        guide(&mut plain, &[0.0, 9.0, 3.0], 1.0);
        assert!((plain[1] - plain[0] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn logprobs_are_ordered_and_sum_to_one() {
        let row = [0.5f32.ln(), 0.125f32.ln(), 0.25f32.ln(), 0.125f32.ln()];
        let found = logprobs(&row, 3, 3);
        assert!((found.logprob - 0.125f32.ln()).abs() < 1e-6);
        let ids: Vec<u32> = found.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [0, 2, 1]);
        let sum: f32 = logprobs(&row, 0, 9).top.iter().map(|(_, l)| l.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert!(logprobs(&row, 9, 0).top.is_empty());
    }

    #[test]
    fn only_some_tokens_are_left() {
        let mut row = [1.0, 2.0, 3.0, 4.0];
        only(&mut row, &[1, 3, 9]);
        assert_eq!(row, [f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY, 4.0]);
    }
}
