//! Which layout each matrix gets: an exact multiple-choice knapsack.

use crate::{Error, Result};

/// Cells of the cost axis of the dynamic programme.
const CELLS: u64 = 16_384;

/// One way to store a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Size in any whole unit, the same for all items.
    pub cost: u64,
    /// What is lost; smaller is better.
    pub loss: f64,
}

/// Picks one choice per item so that the costs stay within `budget` and the losses add up to the
/// least. Returns the index of each item's choice.
///
/// Costs are rounded up to 1/16384 of the room between the cheapest and the dearest selection for
/// the dynamic programme (exact when the room is smaller than that); what rounding leaves over is
/// then spent by exchanging choices of one and of two items until nothing improves. The result
/// depends on nothing but the arguments; ties go to the lower index.
///
/// # Errors
/// [`Error::Budget`] when even the cheapest choices exceed the budget, or an item has none.
pub fn allocate(items: &[Vec<Choice>], budget: u64) -> Result<Vec<usize>> {
    let mut floor = 0u64;
    for (i, item) in items.iter().enumerate() {
        let cheapest = item
            .iter()
            .map(|c| c.cost)
            .min()
            .ok_or_else(|| Error::Budget {
                what: format!("item {i} has no choice"),
            })?;
        floor += cheapest;
    }
    if floor > budget {
        return Err(Error::Budget {
            what: format!("the smallest layouts take {floor}, the budget is {budget}"),
        });
    }
    let frontiers: Vec<Vec<usize>> = items.iter().map(|item| frontier(item)).collect();
    let dearest: u64 = items
        .iter()
        .zip(&frontiers)
        .map(|(item, f)| item[f[f.len() - 1]].cost)
        .sum();
    let room = budget.min(dearest) - floor;
    let unit = room.div_ceil(CELLS).max(1);
    let mut picks = programme(items, &frontiers, (room / unit) as usize, unit);
    improve(items, &frontiers, &mut picks, budget);
    Ok(picks)
}

/// Choices that no other choice beats in both cost and loss, cheapest first.
fn frontier(item: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..item.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (item[a], item[b]);
        x.cost
            .cmp(&y.cost)
            .then(x.loss.total_cmp(&y.loss))
            .then(a.cmp(&b))
    });
    let mut best = f64::INFINITY;
    order.retain(|&i| {
        let keep = item[i].loss < best;
        best = best.min(item[i].loss);
        keep
    });
    if order.is_empty() {
        // Losses that are all infinite or NaN leave nothing to compare.
        order.push((0..item.len()).min_by_key(|&i| item[i].cost).unwrap_or(0));
    }
    order
}

/// Least loss per cell of extra cost over each item's cheapest choice.
fn programme(
    items: &[Vec<Choice>],
    frontiers: &[Vec<usize>],
    cells: usize,
    unit: u64,
) -> Vec<usize> {
    let mut best = vec![0.0f64; cells + 1];
    let mut chosen: Vec<Vec<u16>> = Vec::with_capacity(items.len());
    let extra = |item: &[Choice], f: &[usize], k: usize| {
        (item[f[k]].cost - item[f[0]].cost).div_ceil(unit) as usize
    };
    for (item, f) in items.iter().zip(frontiers) {
        let mut next = vec![f64::INFINITY; cells + 1];
        let mut pick = vec![0u16; cells + 1];
        for (k, &i) in f.iter().enumerate() {
            let cost = extra(item, f, k);
            for at in cost..=cells {
                let loss = best[at - cost] + item[i].loss;
                if loss < next[at] {
                    next[at] = loss;
                    pick[at] = k as u16;
                }
            }
        }
        best = next;
        chosen.push(pick);
    }
    let mut at = cells;
    let mut picks = vec![0; items.len()];
    for (n, (item, f)) in items.iter().zip(frontiers).enumerate().rev() {
        let k = chosen[n][at] as usize;
        picks[n] = f[k];
        at -= extra(item, f, k);
    }
    picks
}

/// Exchanges one or two choices at a time while the loss falls and the budget holds.
fn improve(items: &[Vec<Choice>], frontiers: &[Vec<usize>], picks: &mut [usize], budget: u64) {
    let cost =
        |picks: &[usize]| -> u64 { picks.iter().zip(items).map(|(&p, item)| item[p].cost).sum() };
    // Each round lowers the loss; the cap only guards against rounding going in circles.
    for _ in 0..4 * items.len() + 16 {
        let spent = cost(picks);
        let mut found: Option<(f64, Vec<(usize, usize)>)> = None;
        let mut consider = |gain: f64, moves: Vec<(usize, usize)>| {
            if gain > 0.0 && found.as_ref().is_none_or(|(g, _)| gain > *g) {
                found = Some((gain, moves));
            }
        };
        for (n, f) in frontiers.iter().enumerate() {
            let now = items[n][picks[n]];
            for &k in f {
                let to = items[n][k];
                if spent - now.cost + to.cost <= budget {
                    consider(now.loss - to.loss, vec![(n, k)]);
                }
            }
        }
        for (n, k, gain, saved) in steps_down(items, frontiers, picks) {
            for (m, f) in frontiers.iter().enumerate().filter(|(m, _)| *m != n) {
                let now = items[m][picks[m]];
                for &j in f {
                    let to = items[m][j];
                    if to.cost > now.cost && spent - saved - now.cost + to.cost <= budget {
                        consider(gain + now.loss - to.loss, vec![(n, k), (m, j)]);
                    }
                }
            }
        }
        match found {
            Some((_, moves)) => moves.into_iter().for_each(|(n, k)| picks[n] = k),
            None => return,
        }
    }
}

/// For every item the next cheaper choice: (item, choice, negative gain, cost saved).
fn steps_down(
    items: &[Vec<Choice>],
    frontiers: &[Vec<usize>],
    picks: &[usize],
) -> Vec<(usize, usize, f64, u64)> {
    let step = |(n, f): (usize, &Vec<usize>)| {
        let now = items[n][picks[n]];
        let k = f
            .iter()
            .rev()
            .copied()
            .find(|&k| items[n][k].cost < now.cost)?;
        let to = items[n][k];
        Some((n, k, now.loss - to.loss, now.cost - to.cost))
    };
    frontiers.iter().enumerate().filter_map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn brute(items: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let mut best: Option<f64> = None;
        let total: usize = items.iter().map(Vec::len).product();
        for code in 0..total {
            let (mut rest, mut cost, mut loss) = (code, 0, 0.0);
            for item in items {
                let c = item[rest % item.len()];
                rest /= item.len();
                cost += c.cost;
                loss += c.loss;
            }
            if cost <= budget && best.is_none_or(|b| loss < b) {
                best = Some(loss);
            }
        }
        best
    }

    proptest! {
        #[test]
        fn equals_brute_force(
            items in prop::collection::vec(
                prop::collection::vec((1u64..200, 0.0f64..10.0), 1..5), 1..6),
            budget in 5u64..800,
        ) {
            let items: Vec<Vec<Choice>> = items
                .into_iter()
                .map(|i| i.into_iter().map(|(cost, loss)| Choice { cost, loss }).collect())
                .collect();
            match (allocate(&items, budget), brute(&items, budget)) {
                (Ok(picks), Some(want)) => {
                    let cost: u64 = picks.iter().zip(&items).map(|(&p, i)| i[p].cost).sum();
                    let loss: f64 = picks.iter().zip(&items).map(|(&p, i)| i[p].loss).sum();
                    prop_assert!(cost <= budget);
                    prop_assert!((loss - want).abs() < 1e-9, "{loss} {want}");
                }
                (Err(_), None) => {}
                (got, want) => prop_assert!(false, "{got:?} {want:?}"),
            }
        }

        #[test]
        fn large_costs_come_near_the_bound(
            slopes in prop::collection::vec(0.1f64..10.0, 20..40),
            share in 0.05f64..0.95,
        ) {
            // Convex curves in units far below the grid: the greedy bound is nearly met.
            let items: Vec<Vec<Choice>> = slopes
                .iter()
                .enumerate()
                .map(|(n, s)| {
                    (0..12u64)
                        .map(|k| Choice {
                            cost: 1_000_003 * (n as u64 % 7 + 1) * (k + 2) + 17 * k,
                            loss: s * 0.5f64.powi(k as i32),
                        })
                        .collect()
                })
                .collect();
            let low: u64 = items.iter().map(|i| i[0].cost).sum();
            let high: u64 = items.iter().map(|i| i[11].cost).sum();
            let budget = low + ((high - low) as f64 * share) as u64;
            let picks = allocate(&items, budget).unwrap();
            let cost: u64 = picks.iter().zip(&items).map(|(&p, i)| i[p].cost).sum();
            let loss: f64 = picks.iter().zip(&items).map(|(&p, i)| i[p].loss).sum();
            prop_assert!(cost <= budget);
            // Continuous relaxation along the convex curves.
            let mut segments: Vec<(f64, f64)> = items
                .iter()
                .flat_map(|i| i.windows(2).map(|w| {
                    ((w[0].loss - w[1].loss), (w[1].cost - w[0].cost) as f64)
                }))
                .collect();
            segments.sort_by(|a, b| (b.0 / b.1).total_cmp(&(a.0 / a.1)));
            let mut left = (budget - low) as f64;
            let mut bound: f64 = items.iter().map(|i| i[0].loss).sum();
            for (gain, cost) in segments {
                let part = (left / cost).min(1.0);
                bound -= gain * part;
                left -= cost * part;
            }
            let step = slopes.iter().copied().fold(0.0, f64::max) * 0.5;
            prop_assert!(loss <= bound + step, "{loss} bound {bound}");
        }
    }

    #[test]
    fn too_small_a_budget_is_an_error() {
        let items = vec![vec![Choice {
            cost: 10,
            loss: 1.0,
        }]];
        let error = allocate(&items, 9).unwrap_err().to_string();
        assert!(error.contains("10") && error.contains('9'), "{error}");
        assert!(allocate(&[vec![]], 9).is_err());
        assert_eq!(allocate(&items, 10).unwrap(), [0]);
    }

    #[test]
    fn infinite_losses_do_not_break_it() {
        let items = vec![vec![
            Choice {
                cost: 3,
                loss: f64::INFINITY,
            },
            Choice {
                cost: 2,
                loss: f64::NAN,
            },
        ]];
        assert!(allocate(&items, 5).is_ok());
    }
}
