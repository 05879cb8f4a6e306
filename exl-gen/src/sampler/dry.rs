//! DRY ("don't repeat yourself"): tokens that would continue a sequence that was there before.

use super::SamplerSettings;
use super::tokens::TokenSet;

/// Texts that end a sequence when the settings name none.
pub(super) const BREAKERS: [&str; 16] = [
    ".", ",", "!", "?", "<", ">", "[", "]", "(", ")", "{", "}", "\n", "\t", "\"", "\\",
];

/// Let `L` be the length of the longest end of the history that occurs in it before. Every token
/// that followed it there, `count` times, loses `multiplier * base^(L - allowed) * count`, if `L`
/// is at least the allowed length. Nothing is kept from call to call: rewinding needs no care.
pub(super) fn apply(
    settings: &SamplerSettings,
    logits: &mut [f32],
    history: &[u32],
    breakers: &TokenSet,
) {
    if settings.dry_multiplier == 0.0 {
        return;
    }
    let range = settings.dry_range.unwrap_or(history.len());
    let history = &history[history.len() - range.min(history.len())..];
    let (length, followers) = longest(history, settings.dry_max_ngram, breakers);
    if length < settings.dry_allowed_length.max(1) {
        return;
    }
    let exponent = (length - settings.dry_allowed_length) as f64;
    let penalty = f64::from(settings.dry_multiplier) * f64::from(settings.dry_base).powf(exponent);
    for token in followers {
        if let Some(logit) = logits.get_mut(token as usize) {
            // A bound, because minus infinity would exclude the token.
            *logit -= penalty.min(1e30) as f32;
        }
    }
}

/// Length of the longest end that occurs before, at most `most`, and the token behind each of its
/// occurrences. Neither goes over a breaker.
fn longest(history: &[u32], most: usize, breakers: &TokenSet) -> (usize, Vec<u32>) {
    let newest_first = || history.iter().rev();
    let most = newest_first()
        .take(most)
        .take_while(|&&id| !breakers.contains(id))
        .count();
    let (mut length, mut followers) = (0, Vec::new());
    for end in 1..history.len() {
        if breakers.contains(history[end]) {
            continue;
        }
        let before = history[..end].iter().rev().zip(newest_first());
        let equal = before.take(most).take_while(|(a, b)| a == b).count();
        if equal > length {
            length = equal;
            followers.clear();
        }
        if equal == length && equal > 0 {
            followers.push(history[end]);
        }
    }
    (length, followers)
}
