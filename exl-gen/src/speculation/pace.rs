//! How many tokens it pays to guess.

/// Weight of the newest guess in the rate of right ones.
const WEIGHT: f64 = 0.15;
/// Rate before anything is known.
const START: f64 = 0.7;
/// Of so many turns in which guessing does not pay, one is used to see whether it does again. A draft
/// model has to read what was written since.
const RETRY: u32 = 16;
const RETRY_MODEL: u32 = 64;

/// What a step costs, in steps of one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Sequences in the step.
    pub(crate) jobs: usize,
    /// Of one more token in a step.
    pub(crate) row: f64,
    /// Of guessing one token, for one sequence.
    pub(crate) guess: f64,
}

impl Cost {
    /// Of a step in which every sequence checks `guesses` tokens.
    fn step(&self, guesses: usize) -> f64 {
        let jobs = self.jobs.max(1) as f64;
        let rows = jobs * (1.0 + guesses as f64);
        let guessing = guesses as f64 * self.guess * (1.0 + self.row * (jobs - 1.0));
        1.0 + self.row * (rows - 1.0) + guessing
    }
}

/// Follows how many guesses are right, and says how many to make. It depends on the answer alone and not
/// on the clock, so that runs repeat.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    rate: f64,
    skipped: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            rate: START,
            skipped: 0,
        }
    }
}

impl Pace {
    /// Guesses for the next step, at most `most`: as many as give the most tokens for what the step
    /// costs, if each is right with the rate of the last ones.
    pub(crate) fn length(&mut self, most: usize, cost: &Cost) -> usize {
        let mut best = (0, 1.0 / cost.step(0));
        let (mut tokens, mut right) = (1.0, 1.0);
        for guesses in 1..=most {
            right *= self.rate;
            tokens += right;
            let speed = tokens / cost.step(guesses);
            if speed > best.1 {
                best = (guesses, speed);
            }
        }
        if best.0 > 0 || most == 0 {
            return best.0;
        }
        // What would not pay even if it were right need not be tried.
        if cost.step(1) >= 2.0 * cost.step(0) {
            return 0;
        }
        self.skipped += 1;
        let retry = if cost.guess > 0.0 { RETRY_MODEL } else { RETRY };
        usize::from(self.skipped.is_multiple_of(retry))
    }

    /// Notes that the first `right` of `guesses` were. Those behind a wrong one say nothing.
    pub(crate) fn note(&mut self, guesses: usize, right: usize) {
        for place in 0..guesses.min(right + 1) {
            let hit = f64::from(u8::from(place < right));
            self.rate += WEIGHT * (hit - self.rate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Cost = Cost {
        jobs: 1,
        row: 0.2,
        guess: 0.0,
    };

    #[test]
    fn right_guesses_make_drafts_longer_and_wrong_ones_shorter() {
        let mut pace = Pace::default();
        let first = pace.length(16, &ALONE);
        assert!((1..8).contains(&first), "{first}");
        for _ in 0..8 {
            pace.note(4, 4);
        }
        assert_eq!(pace.length(16, &ALONE), 16);
        assert_eq!(pace.length(3, &ALONE), 3);
        assert_eq!(pace.length(0, &ALONE), 0);
        for _ in 0..20 {
            pace.note(4, 0);
        }
        // Guessing stopped; now and then one token is tried.
        let tried: Vec<usize> = (0..64).map(|_| pace.length(16, &ALONE)).collect();
        assert_eq!(tried.iter().sum::<usize>(), 4);
        assert!(tried.iter().all(|&length| length < 2));
        for _ in 0..6 {
            pace.note(1, 1);
        }
        assert!(pace.length(16, &ALONE) > 1);
    }

    /// What follows a wrong guess is not held against it.
    #[test]
    fn only_decided_guesses_count() {
        let (mut long, mut short) = (Pace::default(), Pace::default());
        long.note(9, 2);
        short.note(3, 2);
        assert_eq!(long.rate, short.rate);
        long.note(0, 0);
        assert_eq!(long.rate, short.rate);
    }

    #[test]
    fn dear_guesses_are_fewer() {
        let length = |jobs, guess| {
            let cost = Cost {
                jobs,
                row: 0.2,
                guess,
            };
            Pace::default().length(16, &cost)
        };
        assert!(length(1, 0.0) > length(8, 0.0));
        assert!(length(1, 0.0) > length(1, 0.3));
        assert_eq!(length(1, 1.0), 0);
        // A draft model as slow as the model is never asked.
        let cost = Cost {
            jobs: 1,
            row: 0.2,
            guess: 0.8,
        };
        let mut pace = Pace::default();
        assert!((0..1000).all(|_| pace.length(16, &cost) == 0));
    }
}
