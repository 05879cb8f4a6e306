//! The original's choice of recipes under a bit budget: simulated annealing over the sum of
//! `error^p`, many runs for each of three purposes.

use rayon::prelude::*;

/// Runs for each purpose.
const RUNS: usize = 80;
const HOTTEST: f64 = 2.0;
const COLDEST: f64 = 1e-4;
const COOLING: f64 = 0.995;
/// Changes proposed at each temperature.
const PROPOSALS: usize = 1000;
/// Range of `p` in the first runs, and how far around the best the second ones look.
const POWERS: (f64, f64) = (1.5, 3.5);
const NEARBY: f64 = 0.075;

/// What a choice of recipes costs and what error it leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) bits: u64,
    pub(crate) error: f64,
}

/// One choice for every block, together at most `budget` bits. Like the original it stays at the
/// first choices when those take more.
pub(crate) fn choose(blocks: &[Vec<Choice>], budget: u64) -> Vec<usize> {
    let best_power = |powers: Vec<f64>, seed: u64| {
        let worst = |(i, p): (usize, f64)| {
            let picks = anneal(blocks, budget, p, seed + i as u64);
            (largest_error(blocks, &picks), p)
        };
        let runs: Vec<(f64, f64)> = indexed(powers).into_par_iter().map(worst).collect();
        let best = runs.iter().min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(POWERS.0, |run| run.1)
    };
    let power = best_power(spread(POWERS), 1);
    let power = best_power(spread((power - NEARBY, power + NEARBY)), 1001);
    let runs: Vec<(f64, Vec<usize>)> = indexed(vec![power; RUNS])
        .into_par_iter()
        .map(|(i, p)| {
            let picks = anneal(blocks, budget, p, 2001 + i as u64);
            (energy(blocks, &picks, p), picks)
        })
        .collect();
    let best = runs.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    let mut picks = best.map_or_else(Vec::new, |run| run.1);
    spend(blocks, budget, &mut picks);
    picks
}

fn spread((from, to): (f64, f64)) -> Vec<f64> {
    let at = |i: usize| from + (to - from) * i as f64 / (RUNS - 1) as f64;
    (0..RUNS).map(at).collect()
}

fn indexed(powers: Vec<f64>) -> Vec<(usize, f64)> {
    powers.into_iter().enumerate().collect()
}

pub(crate) fn total_bits(blocks: &[Vec<Choice>], picks: &[usize]) -> u64 {
    blocks.iter().zip(picks).map(|(b, &i)| b[i].bits).sum()
}

fn largest_error(blocks: &[Vec<Choice>], picks: &[usize]) -> f64 {
    let errors = blocks.iter().zip(picks).map(|(b, &i)| b[i].error);
    errors.fold(0.0, f64::max)
}

fn energy(blocks: &[Vec<Choice>], picks: &[usize], power: f64) -> f64 {
    let errors = blocks.iter().zip(picks).map(|(b, &i)| b[i].error);
    errors.map(|e| e.powf(power)).sum()
}

/// One run; returns where it ends, not the best that it saw.
fn anneal(blocks: &[Vec<Choice>], budget: u64, power: f64, seed: u64) -> Vec<usize> {
    let energies = |block: &Vec<Choice>| block.iter().map(|c| c.error.powf(power)).collect();
    let energies: Vec<Vec<f64>> = blocks.iter().map(energies).collect();
    let mut picks = vec![0; blocks.len()];
    let mut bits = total_bits(blocks, &picks);
    let mut random = Random(seed);
    let mut temperature = HOTTEST;
    while temperature > COLDEST {
        for _ in 0..PROPOSALS {
            let block = random.below(blocks.len());
            let new = random.below(blocks[block].len());
            let old = picks[block];
            let changed = bits - blocks[block][old].bits + blocks[block][new].bits;
            if changed > budget {
                continue;
            }
            let worse = energies[block][new] - energies[block][old];
            if worse < 0.0 || random.unit() < (-worse / temperature).exp() {
                picks[block] = new;
                bits = changed;
            }
        }
        temperature *= COOLING;
    }
    picks
}

/// Moves blocks on to the next choice of the list while that fits.
fn spend(blocks: &[Vec<Choice>], budget: u64, picks: &mut [usize]) {
    let mut bits = total_bits(blocks, picks);
    let mut changed = true;
    while changed {
        changed = false;
        for (block, pick) in blocks.iter().zip(picks.iter_mut()) {
            let Some(next) = block.get(*pick + 1) else {
                continue;
            };
            let after = bits - block[*pick].bits + next.bits;
            if after <= budget {
                (*pick, bits, changed) = (*pick + 1, after, true);
            }
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: usize) -> usize {
        (((self.next() >> 32) * count as u64) >> 32) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Vec<Vec<Choice>> {
        let choice = |b: usize, i: usize| Choice {
            bits: 1000 * (i as u64 + 2),
            error: (1.0 + b as f64) * 0.1 * 0.5f64.powi(i as i32),
        };
        let block = |b: usize| (0..7).map(|i| choice(b, i)).collect();
        (0..8).map(block).collect()
    }

    #[test]
    fn a_run_keeps_the_budget_and_betters_the_start() {
        let blocks = blocks();
        let picks = anneal(&blocks, 34_000, 2.0, 7);
        assert!(total_bits(&blocks, &picks) <= 34_000);
        let even = vec![2; blocks.len()];
        let (got, plain) = (energy(&blocks, &picks, 2.0), energy(&blocks, &even, 2.0));
        assert!(got < plain, "{got} {plain}");
    }

    #[test]
    fn what_is_left_is_spent() {
        let blocks = blocks();
        let mut picks = vec![0; blocks.len()];
        spend(&blocks, 19_500, &mut picks);
        assert_eq!(picks, [1, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(total_bits(&blocks, &picks), 19_000);
    }

    #[test]
    fn too_small_a_budget_leaves_the_first_choices() {
        let blocks = blocks();
        assert_eq!(anneal(&blocks, 9_000, 2.0, 1), vec![0; blocks.len()]);
    }
}
