//! Repetition, frequency and presence penalties with range and decay.

use std::collections::HashSet;

use super::SamplerSettings;

/// Walks back from the newest token: `penalty_range` tokens at full strength, then
/// `penalty_decay` tokens whose strength falls linearly to nothing.
pub(super) fn apply(settings: &SamplerSettings, logits: &mut [f32], history: &[u32]) {
    let SamplerSettings {
        repetition_penalty: repetition,
        frequency_penalty: frequency,
        presence_penalty: presence,
        ..
    } = *settings;
    if repetition == 1.0 && frequency == 0.0 && presence == 0.0 {
        return;
    }
    let full = settings.penalty_range.unwrap_or(history.len());
    let decay = settings.penalty_decay;
    let mut seen = HashSet::new();
    for (back, &id) in history.iter().rev().enumerate() {
        let weight = if back < full {
            1.0
        } else if back - full < decay {
            1.0 - (back - full + 1) as f32 / decay as f32
        } else {
            break;
        };
        let Some(logit) = logits.get_mut(id as usize) else {
            continue;
        };
        // The newest occurrence counts for the penalties that apply once.
        if seen.insert(id) {
            let factor = 1.0 + (repetition - 1.0) * weight;
            *logit = if *logit > 0.0 {
                *logit / factor
            } else {
                *logit * factor
            };
            *logit -= presence * weight;
        }
        *logit -= frequency * weight;
    }
}
