//! Mixes of widths and group sizes worth storing a matrix in.
//!
//! Rounded uniformly, a matrix tells what every width and group size leaves; rounded with a wide
//! beginning of growing length, it tells in which rows. Loss is nearly additive over rows, so from
//! these few measurements the loss of any mix is predicted, and a dynamic programme over packed
//! rows finds the mix of least loss for every price of a bit.

use crate::Result;
use crate::layout::{GroupSpec, Layout, ROW_STEP, WIDTHS};

/// Rows per group that mixes are made of.
const SIZES: [usize; 3] = [32, 64, 128];
/// Steps that the rows of a matrix are cut into at most, more or less.
const STEPS: usize = 64;
/// Prices of a bit that are tried.
const PRICES: usize = 48;
/// Widths of the beginning and the rest where it is measured which rows lose how much.
const CUT_WIDTHS: (u8, u8) = (5, 3);

/// Loss of every width and group size over the rows of one matrix.
#[derive(Clone, Debug)]
pub(crate) struct Losses {
    inputs: usize,
    /// Rows per step of the programme, the last one may be shorter.
    step: usize,
    /// `[WIDTHS][SIZES]`: loss of the whole matrix.
    uniform: Vec<[f64; SIZES.len()]>,
    /// Share of the loss that falls on the steps before each step, and 1 at the end.
    before: Vec<f64>,
}

/// The layouts to measure for a matrix with `inputs` features: uniform ones, then cuts.
#[derive(Clone, Debug)]
pub(crate) struct Probes {
    inputs: usize,
    /// Rows of the wide beginning.
    cuts: Vec<usize>,
    layouts: Vec<Layout>,
}

impl Probes {
    /// # Errors
    /// [`crate::Error::Layout`] when `inputs` is no positive multiple of 32.
    pub(crate) fn new(inputs: usize) -> Result<Self> {
        let mut layouts = Vec::new();
        for bits in WIDTHS {
            for rows in SIZES {
                layouts.push(Layout::uniform(bits, rows, inputs)?);
            }
        }
        let steps = inputs / ROW_STEP;
        let mut cuts = vec![1, 2, steps / 8, steps / 4, steps / 2, 3 * steps / 4];
        cuts.retain(|&c| c > 0 && c < steps);
        cuts.sort_unstable();
        cuts.dedup();
        let cuts: Vec<usize> = cuts.iter().map(|c| c * ROW_STEP).collect();
        for &cut in &cuts {
            let group = |row: usize| GroupSpec {
                bits: if row < cut {
                    CUT_WIDTHS.0
                } else {
                    CUT_WIDTHS.1
                },
                rows: ROW_STEP,
            };
            layouts.push(Layout::new(
                (0..inputs).step_by(ROW_STEP).map(group).collect(),
            )?);
        }
        Ok(Self {
            inputs,
            cuts,
            layouts,
        })
    }

    /// What is to be measured.
    pub(crate) fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    /// What the losses of [`Probes::layouts`] say.
    pub(crate) fn losses(&self, measured: &[f64]) -> Losses {
        let (uniform, cut) = measured.split_at(WIDTHS.len() * SIZES.len());
        let uniform: Vec<[f64; SIZES.len()]> = uniform
            .chunks_exact(SIZES.len())
            .map(|c| [c[0], c[1], c[2]])
            .collect();
        let of = |bits: u8| uniform[WIDTHS.iter().position(|&w| w == bits).unwrap_or(0)][0];
        let (wide, narrow) = (of(CUT_WIDTHS.0), of(CUT_WIDTHS.1));
        // (rows, share of the loss in them), rising from (0, 0) to (inputs, 1).
        let mut known = vec![(0usize, 0.0f64)];
        for (&rows, &loss) in self.cuts.iter().zip(cut) {
            let share = (narrow - loss) / (narrow - wide).max(f64::MIN_POSITIVE);
            let last = known[known.len() - 1].1;
            known.push((rows, share.clamp(last, 1.0)));
        }
        known.push((self.inputs, 1.0));
        let step = ROW_STEP * (self.inputs / ROW_STEP).div_ceil(STEPS).next_power_of_two();
        let before = (0..=self.inputs.div_ceil(step))
            .map(|i| share_before(&known, (i * step).min(self.inputs)))
            .collect();
        Losses {
            inputs: self.inputs,
            step,
            uniform,
            before,
        }
    }
}

/// Linear between the known points.
fn share_before(known: &[(usize, f64)], row: usize) -> f64 {
    let after = known.iter().position(|k| k.0 >= row).unwrap_or(0).max(1);
    let (a, b) = (known[after - 1], known[after]);
    let t = (row - a.0) as f64 / (b.0 - a.0).max(1) as f64;
    a.1 + (b.1 - a.1) * t
}

/// The best way to store the rows from a step on.
#[derive(Clone, Copy, Debug)]
struct Tail {
    price: f64,
    /// Width and group size of the first steps, and how many of them.
    width: usize,
    size: usize,
    steps: usize,
}

impl Losses {
    /// Mixes over the whole range of sizes for a matrix of `outputs` columns, smallest first, with
    /// the loss predicted for each.
    ///
    /// # Errors
    /// [`crate::Error::Layout`], which nothing here gives cause for.
    pub(crate) fn mixes(&self, outputs: usize) -> Result<Vec<(Layout, f64)>> {
        let weights = (self.inputs * outputs) as f64;
        // One bit more for all weights takes three quarters of the loss away.
        let slope = |loss: f64| 1.5 * loss.max(f64::MIN_POSITIVE) / weights;
        let (dear, cheap) = (
            slope(self.uniform[0][0]) / 16.0,
            slope(self.uniform[WIDTHS.len() - 1][SIZES.len() - 1]) * 4.0,
        );
        let mut out: Vec<(Layout, f64)> = Vec::new();
        for i in 0..PRICES {
            let t = i as f64 / (PRICES - 1) as f64;
            let price = cheap * (dear / cheap).powf(t);
            let found = self.cheapest(outputs, price)?;
            if out.last().is_none_or(|l| l.0 != found.0) {
                out.push(found);
            }
        }
        Ok(out)
    }

    /// The mix with the least sum of loss and `price` times size.
    fn cheapest(&self, outputs: usize, price: f64) -> Result<(Layout, f64)> {
        let steps = self.before.len() - 1;
        let none = Tail {
            price: f64::INFINITY,
            width: 0,
            size: 0,
            steps: 0,
        };
        // `best[i][w]`: the rows from step `i` on at widths from the `w`-th on.
        let mut best = vec![[none; WIDTHS.len()]; steps + 1];
        best[steps] = [Tail { price: 0.0, ..none }; WIDTHS.len()];
        for at in (0..steps).rev() {
            for width in (0..WIDTHS.len()).rev() {
                let mut found = best[at].get(width + 1).copied().unwrap_or(none);
                for (size, &rows) in SIZES.iter().enumerate() {
                    let count = (rows / self.step).max(1);
                    if at + count > steps {
                        continue;
                    }
                    let (bits, loss) = self.run(at, count, (width, size), outputs);
                    let price = loss + price * bits + best[at + count][width].price;
                    if price < found.price {
                        found = Tail {
                            price,
                            width,
                            size,
                            steps: count,
                        };
                    }
                }
                best[at][width] = found;
            }
        }
        let (mut at, mut width, mut loss) = (0, 0, 0.0);
        let mut groups = Vec::new();
        while at < steps {
            let tail = best[at][width];
            loss += self.run(at, tail.steps, (tail.width, tail.size), outputs).1;
            let end = ((at + tail.steps) * self.step).min(self.inputs);
            for row in (at * self.step..end).step_by(SIZES[tail.size]) {
                groups.push(GroupSpec {
                    bits: WIDTHS[tail.width],
                    rows: SIZES[tail.size].min(end - row),
                });
            }
            (at, width) = (at + tail.steps, tail.width);
        }
        Ok((Layout::new(groups)?, loss))
    }

    /// Bits and loss of `count` steps from `at` on.
    fn run(
        &self,
        at: usize,
        count: usize,
        (width, size): (usize, usize),
        outputs: usize,
    ) -> (f64, f64) {
        let rows = ((at + count) * self.step).min(self.inputs) - at * self.step;
        let groups = rows.div_ceil(SIZES[size]);
        let bits = rows * WIDTHS[width] as usize * outputs + groups * (48 + 4 * outputs);
        let share = self.before[at + count] - self.before[at];
        (bits as f64, share * self.uniform[width][size])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, normal};
    use crate::{Factor, Gptq, HessianAccumulator, Matrix, Part, Quantizer, activity_order};

    /// Losses of a matrix whose first rows lose most, four times less per bit and less in smaller
    /// groups.
    fn made_up(inputs: usize) -> Losses {
        let probes = Probes::new(inputs).unwrap();
        let share = |row: usize| (row as f64 / inputs as f64).sqrt();
        let measured: Vec<f64> = probes
            .layouts()
            .iter()
            .map(|layout| {
                let mut at = 0;
                let part = |g: &GroupSpec| {
                    let before = share(at);
                    at += g.rows;
                    let size = (g.rows as f64 / 32.0).powf(0.2);
                    (share(at) - before) * size * 0.25f64.powi(i32::from(g.bits))
                };
                layout.groups().iter().map(part).sum()
            })
            .collect();
        probes.losses(&measured)
    }

    #[test]
    fn mixes_cover_all_sizes_and_put_bits_where_the_loss_is() {
        for inputs in [32, 160, 1536, 11008] {
            let mixes = made_up(inputs).mixes(512).unwrap();
            for pair in mixes.windows(2) {
                assert!(pair[0].0.bits(512) < pair[1].0.bits(512), "{inputs}");
                assert!(pair[0].1 > pair[1].1, "{inputs}");
            }
            let bpw: Vec<f64> = mixes.iter().map(|m| m.0.bpw(512)).collect();
            assert!(bpw[0] < 2.4 && *bpw.last().unwrap() > 8.0, "{bpw:?}");
            assert!(mixes.iter().all(|m| m.0.rows() == inputs));
            if inputs > 160 {
                assert!(bpw.windows(2).all(|w| w[1] - w[0] < 0.8), "{bpw:?}");
            }
        }
    }

    #[test]
    fn a_mix_beats_what_is_uniform_at_its_size() {
        let losses = made_up(1536);
        let uniform = Layout::uniform(4, 128, 1536).unwrap();
        let better = losses.mixes(512).unwrap().into_iter();
        let better = better
            .filter(|m| m.0.bits(512) <= uniform.bits(512))
            .map(|m| m.1)
            .fold(f64::INFINITY, f64::min);
        let size = SIZES.len() - 1;
        let four = WIDTHS.iter().position(|&w| w == 4).unwrap();
        // 4% better at no more bits.
        assert!(better < 0.98 * losses.uniform[four][size], "{better}");
    }

    #[test]
    fn predictions_are_what_rounding_leaves() {
        let (k, n) = (256, 64);
        let mut acc = HessianAccumulator::new(k);
        for row in 0..16 {
            let mut x = noise(row + 1, 64 * k);
            for (at, v) in x.iter_mut().enumerate() {
                *v /= 1.0 + (at % k) as f32 / 64.0;
            }
            acc.add(&x, Part::of_row(row as usize)).unwrap();
        }
        let h = acc.finish("t").unwrap();
        let weight = Matrix::new(k, n, normal(3, k * n, 0.05)).unwrap();
        let factor = Factor::new("t", &h.train, &activity_order(&h.train), 0.02).unwrap();
        let lost = |layout: &Layout| {
            let q = Gptq { factor: &factor }
                .quantize("t", &weight, layout)
                .unwrap();
            let left = crate::measure::difference(&weight, &q.dequantize());
            h.hold_out.loss(&left).unwrap()
        };
        let probes = Probes::new(k).unwrap();
        let measured: Vec<f64> = probes.layouts().iter().map(lost).collect();
        for (layout, predicted) in probes.losses(&measured).mixes(n).unwrap() {
            let real = lost(&layout);
            // Within 6% for all of them.
            let ratio = predicted / real;
            assert!((0.9..1.1).contains(&ratio), "{layout}: {predicted} {real}");
        }
    }
}
