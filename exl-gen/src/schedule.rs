//! Which jobs go into the next step, and which waiting job starts next.

/// Bounds of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most tokens of a step.
    pub(crate) rows: usize,
    /// Most prompt tokens of a step, so that running answers do not stall behind a long prompt.
    pub(crate) chunk: usize,
}

/// Most sequences of one job.
pub(crate) const MAX_LANES: usize = 2;

/// What a job could do in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    /// It waits for somebody else.
    Nothing,
    /// One token in each of its sequences, and then a draw.
    Decode {
        /// Its sequences.
        lanes: usize,
        /// Guessed tokens that the first of them would check as well.
        draft: usize,
    },
    /// Up to that many prompt tokens in each sequence.
    Prefill([usize; MAX_LANES]),
}

/// Tokens of one sequence of a job in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) job: usize,
    pub(crate) lane: usize,
    pub(crate) rows: usize,
}

/// Shares of a step for jobs in the order of precedence. Every decoding job is in each step. Their
/// drafts get what is left, or half of it beside prompts. Those
/// share the rest: each takes what it needs, but at most half of what is left while others wait, so
/// that a short prompt does not wait for a long one.
pub(crate) fn share(demands: &[Demand], limits: Limits) -> Vec<Share> {
    let mut shares = Vec::new();
    let mut rows = limits.rows;
    for (job, demand) in demands.iter().enumerate() {
        if let Demand::Decode { lanes, .. } = *demand
            && lanes <= rows
        {
            rows -= lanes;
            shares.extend((0..lanes).map(|lane| Share { job, lane, rows: 1 }));
        }
    }
    let prompts = demands.iter().any(|one| matches!(one, Demand::Prefill(_)));
    let mut drafts = if prompts { rows / 2 } else { rows };
    for one in shares.iter_mut().filter(|one| one.lane == 0) {
        if let Demand::Decode { draft, .. } = demands[one.job] {
            let granted = draft.min(drafts);
            drafts -= granted;
            rows -= granted;
            one.rows += granted;
        }
    }
    let mut wanted: Vec<Share> = Vec::new();
    for (job, demand) in demands.iter().enumerate() {
        if let Demand::Prefill(lanes) = *demand {
            let lanes = (0..).zip(lanes).filter(|&(_, rows)| rows > 0);
            wanted.extend(lanes.map(|(lane, rows)| Share { job, lane, rows }));
        }
    }
    let mut left = rows.min(limits.chunk);
    let last = wanted.len().saturating_sub(1);
    for (at, mut one) in wanted.into_iter().enumerate() {
        let most = if at < last { left.div_ceil(2) } else { left };
        one.rows = one.rows.min(most);
        if one.rows > 0 {
            left -= one.rows;
            shares.push(one);
        }
    }
    shares
}

/// How often later jobs may start before one that waits for room; after that nobody overtakes it.
pub(crate) const MAX_SKIPS: usize = 4;

/// Jobs that start before a waiting one until it counts as one priority higher.
pub(crate) const AGEING: usize = 64;

/// The next waiting job to start, if any: the first that `fits`, unless one before it was skipped
/// too often. `skips` holds that count per waiting job, in the order they are to start.
pub(crate) fn next_start(
    skips: impl Iterator<Item = usize>,
    mut fits: impl FnMut(usize) -> bool,
) -> Option<usize> {
    for (job, skips) in skips.enumerate() {
        if fits(job) {
            return Some(job);
        }
        if skips >= MAX_SKIPS {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(demands: &[Demand], rows: usize, chunk: usize) -> Vec<(usize, usize, usize)> {
        let shares = share(demands, Limits { rows, chunk }).into_iter();
        shares.map(|one| (one.job, one.lane, one.rows)).collect()
    }

    const ONE: Demand = decode(1, 0);

    const fn decode(lanes: usize, draft: usize) -> Demand {
        Demand::Decode { lanes, draft }
    }

    fn prompt(rows: usize) -> Demand {
        Demand::Prefill([rows, 0])
    }

    #[test]
    fn prompts_are_cut_into_chunks_behind_decodes() {
        assert_eq!(
            shares(&[ONE, prompt(100), ONE], 10, 6),
            [(0, 0, 1), (2, 0, 1), (1, 0, 6)]
        );
        assert_eq!(shares(&[], 10, 6), []);
        assert_eq!(shares(&[ONE; 12], 10, 6).len(), 10);
        assert_eq!(shares(&[Demand::Nothing, prompt(3)], 10, 6), [(1, 0, 3)]);
    }

    #[test]
    fn short_prompts_do_not_wait_for_long_ones() {
        assert_eq!(
            shares(&[prompt(1000), prompt(10), prompt(1000)], 512, 64),
            [(0, 0, 32), (1, 0, 10), (2, 0, 22)]
        );
        assert_eq!(
            shares(&[prompt(4), prompt(100)], 10, 6),
            [(0, 0, 3), (1, 0, 3)]
        );
    }

    #[test]
    fn two_sequences_of_a_job_decode_together() {
        let two = decode(2, 0);
        assert_eq!(shares(&[ONE, two, ONE], 2, 9), [(0, 0, 1), (2, 0, 1)]);
        assert_eq!(shares(&[two], 2, 9), [(0, 0, 1), (0, 1, 1)]);
        assert_eq!(
            shares(&[Demand::Prefill([8, 3])], 64, 64),
            [(0, 0, 8), (0, 1, 3)]
        );
    }

    #[test]
    fn drafts_get_what_is_left() {
        let demands = [decode(1, 3), decode(1, 4)];
        assert_eq!(shares(&demands, 20, 6), [(0, 0, 4), (1, 0, 5)]);
        assert_eq!(shares(&demands, 7, 6), [(0, 0, 4), (1, 0, 3)]);
        assert_eq!(shares(&demands, 2, 6), [(0, 0, 1), (1, 0, 1)]);
        // Half of it beside a prompt.
        assert_eq!(
            shares(&[decode(1, 9), prompt(50)], 11, 6),
            [(0, 0, 6), (1, 0, 5)]
        );
    }

    #[test]
    fn a_large_job_is_overtaken_four_times() {
        let start = |skips: &[usize], fitting: usize| {
            next_start(skips.iter().copied(), |job| job == fitting)
        };
        assert_eq!(start(&[MAX_SKIPS - 1, 0], 1), Some(1));
        assert_eq!(start(&[MAX_SKIPS, 0], 1), None);
        assert_eq!(start(&[MAX_SKIPS, 0], 0), Some(0));
        assert_eq!(start(&[], 0), None);
    }

    fn demand() -> impl Strategy<Value = Demand> {
        prop_oneof![
            1 => Just(Demand::Nothing),
            3 => (1usize..=MAX_LANES, 0usize..70)
                .prop_map(|(lanes, draft)| Demand::Decode { lanes, draft }),
            3 => (1usize..2000, 0usize..2000).prop_map(|(a, b)| Demand::Prefill([a, b])),
        ]
    }

    proptest! {
        #[test]
        fn capacity_is_kept_and_somebody_moves(
            demands in prop::collection::vec(demand(), 1..40),
            rows in 2usize..600,
            chunk in 1usize..600,
        ) {
            let shares = share(&demands, Limits { rows, chunk });
            let idle = demands.iter().all(|demand| *demand == Demand::Nothing);
            prop_assert_eq!(shares.is_empty(), idle);
            prop_assert!(shares.iter().map(|share| share.rows).sum::<usize>() <= rows);
            let mut seen = vec![[false; MAX_LANES]; demands.len()];
            let mut prompt = 0;
            for Share { job, lane, rows } in shares {
                prop_assert!(!std::mem::replace(&mut seen[job][lane], true));
                match demands[job] {
                    Demand::Nothing => prop_assert!(false),
                    Demand::Decode { lanes, draft } => {
                        let most = if lane == 0 { 1 + draft } else { 1 };
                        prop_assert!((1..=most).contains(&rows) && lane < lanes);
                    }
                    Demand::Prefill(lanes) => {
                        prop_assert!(rows >= 1 && rows <= lanes[lane]);
                        prompt += rows;
                    }
                }
            }
            prop_assert!(prompt <= chunk);
            // Both sequences of a job, or none.
            for (seen, demand) in seen.iter().zip(&demands) {
                if matches!(demand, Demand::Decode { lanes: 2, .. }) {
                    prop_assert_eq!(seen[0], seen[1]);
                }
            }
        }
    }
}
