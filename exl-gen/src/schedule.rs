//! Which jobs start, and which tokens of which jobs go into the next step.

/// Bounds of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most tokens of a step.
    pub(crate) rows: usize,
    /// Most prompt tokens of a step, so that running answers do not stall behind a long prompt.
    pub(crate) chunk: usize,
}

/// Shares of a step: `pending[i]` tokens wait in job `i`, 1 for a job that decodes. Gives pairs of
/// job and token count. Every decoding job is in each step; prompts share the rest, oldest first.
pub(crate) fn share(pending: &[usize], limits: Limits) -> Vec<(usize, usize)> {
    let mut shares: Vec<(usize, usize)> = pending
        .iter()
        .enumerate()
        .filter(|&(_, &tokens)| tokens == 1)
        .map(|(job, _)| (job, 1))
        .take(limits.rows)
        .collect();
    let mut left = (limits.rows - shares.len()).min(limits.chunk);
    for (job, &tokens) in pending
        .iter()
        .enumerate()
        .filter(|&(_, &tokens)| tokens > 1)
    {
        let rows = tokens.min(left);
        if rows == 0 {
            break;
        }
        shares.push((job, rows));
        left -= rows;
    }
    shares
}

/// How often later jobs may start before one that waits for room; after that nobody overtakes it.
pub(crate) const MAX_SKIPS: usize = 4;

/// The next waiting job to start, if any: the first that `fits`, unless one before it was skipped
/// too often. `skips` holds that count per waiting job and is raised for those overtaken.
pub(crate) fn next_start(skips: &mut [&mut usize], fits: impl Fn(usize) -> bool) -> Option<usize> {
    let chosen = (0..skips.len()).find(|&job| fits(job))?;
    if skips[..chosen].iter().any(|skips| **skips >= MAX_SKIPS) {
        return None;
    }
    for skips in &mut skips[..chosen] {
        **skips += 1;
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prompts_are_cut_into_chunks_behind_decodes() {
        let limits = Limits { rows: 10, chunk: 6 };
        assert_eq!(share(&[1, 100, 1, 3], limits), [(0, 1), (2, 1), (1, 6)]);
        assert_eq!(share(&[4, 100], limits), [(0, 4), (1, 2)]);
        assert_eq!(share(&[], limits), []);
        assert_eq!(share(&[1; 12], limits).len(), 10);
    }

    #[test]
    fn a_large_job_is_overtaken_four_times() {
        let mut large = 0;
        for _ in 0..MAX_SKIPS {
            assert_eq!(
                next_start(&mut [&mut large, &mut 0], |job| job == 1),
                Some(1)
            );
        }
        assert_eq!(next_start(&mut [&mut large, &mut 0], |job| job == 1), None);
        assert_eq!(next_start(&mut [&mut large, &mut 0], |_| true), Some(0));
        assert_eq!(next_start(&mut [], |_| true), None);
    }

    proptest! {
        #[test]
        fn capacity_is_kept_and_somebody_moves(
            pending in prop::collection::vec(1usize..2000, 1..40),
            rows in 1usize..600,
            chunk in 1usize..600,
        ) {
            let shares = share(&pending, Limits { rows, chunk });
            prop_assert!(!shares.is_empty());
            prop_assert!(shares.iter().map(|share| share.1).sum::<usize>() <= rows);
            let mut seen = vec![false; pending.len()];
            let mut prompt = 0;
            for (job, tokens) in shares {
                prop_assert!(tokens >= 1 && tokens <= pending[job]);
                prop_assert!(!std::mem::replace(&mut seen[job], true));
                prompt += if pending[job] > 1 { tokens } else { 0 };
            }
            prop_assert!(prompt <= chunk);
        }
    }
}
