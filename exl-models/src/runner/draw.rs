//! What a step that draws tokens looks like.

use exl_tensor::SampleShape;
/// How a token is chosen, and what it is chosen from: one row of logits.
pub use exl_tensor::{SampleParams, StepDraw as Draw};

use crate::{Error, Result};

/// Narrowest window of tokens seen, so that the first tokens of an answer share a plan.
const LEAST_WINDOW: usize = 64;
/// Narrowest list of blocked ids.
const LEAST_BLOCKED: usize = 4;

/// The shape that all the draws fit: widths are 0 or powers of two, so that few plans exist.
pub(super) fn shape(draws: &[Draw<'_>], tokens: usize) -> Result<SampleShape> {
    if tokens == 0 {
        return Err(Error::Step("there is no token to draw".to_owned()));
    }
    let window = draws.iter().map(|d| d.params.reach(d.recent.len()));
    let blocked = draws.iter().map(|d| d.blocked.len());
    Ok(SampleShape {
        tokens,
        window: width(window.max().unwrap_or(0), LEAST_WINDOW),
        blocked: width(blocked.max().unwrap_or(0), LEAST_BLOCKED),
    })
}

fn width(needed: usize, least: usize) -> usize {
    match needed {
        0 => 0,
        n => n.max(least).next_power_of_two(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_shapes_serve_all_draws() {
        let history = vec![1; 1000];
        let shape_of = |frequency_penalty, penalty_range, blocked: &[u32]| {
            let params = SampleParams {
                frequency_penalty,
                penalty_range,
                ..SampleParams::default()
            };
            let draw = Draw {
                params,
                recent: &history,
                blocked,
            };
            let found = shape(&[draw, draw], 5).unwrap();
            (found.window, found.blocked)
        };
        assert_eq!(shape_of(0.0, u32::MAX, &[]), (0, 0));
        assert_eq!(shape_of(0.5, u32::MAX, &[1]), (1024, 4));
        assert_eq!(shape_of(0.5, 10, &[1; 5]), (64, 8));
        assert_eq!(shape_of(0.5, 65, &[]), (128, 0));
        assert!(shape(&[], 0).is_err());
    }
}
