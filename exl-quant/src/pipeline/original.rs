//! The original beside a model that is being quantized.
//!
//! Some rows of the calibration run through the original too, layer by layer with the others, so that
//! every linear's rounding sees how far its inputs are from the original's ([`crate::CrossMoment`]).

use exl_models::ModelSource;
use exl_tensor::{Bound, Weights};

use super::Job;
use super::machine::{Machine, Slots};
use super::sites::{Rows, Stop, Walk, embed};
use crate::{Part, Result};

/// Tokens wanted for each input of the widest linear: what is gained hardly grows with more, while a
/// row costs as much as one of the quantized model.
const TOKENS_PER_INPUT: usize = 16;

/// Training rows in the original.
#[derive(Debug)]
pub(super) struct Original {
    machine: Machine,
    hidden: Rows,
    /// Which rows of the calibration they are, ascending.
    rows: Vec<usize>,
}

/// One layer of it.
#[derive(Debug)]
pub(super) struct Beside<'a> {
    walk: Walk<'a>,
    rows: &'a [usize],
}

/// Which of `count` calibration rows of `length` tokens the original runs too, with a widest linear of
/// `inputs`: training rows spread evenly.
pub(super) fn sampled(count: usize, length: usize, inputs: usize) -> Vec<usize> {
    let train: Vec<usize> = (0..count)
        .filter(|&r| Part::of_row(r) == Part::Train)
        .collect();
    let wanted = (TOKENS_PER_INPUT * inputs).div_ceil(length.max(1));
    let taken = wanted.min(train.len());
    (0..taken).map(|i| train[i * train.len() / taken]).collect()
}

/// Inputs of the widest linear.
pub(super) fn widest(source: &ModelSource) -> usize {
    let linears = source.layout().iter().filter(|k| k.is_linear());
    linears.map(|k| k.shape[1]).max().unwrap_or(0)
}

impl Original {
    /// Embeds its rows.
    pub(super) fn new(job: &Job<'_>) -> Result<Self> {
        let (all, length) = (&job.calibration.rows, job.calibration.length());
        let rows = sampled(all.len(), length, widest(&job.source));
        let tokens: Vec<Vec<u32>> = rows.iter().map(|&r| all[r].clone()).collect();
        let mut machine = Machine::new(job.source.spec(), length, &job.device)?;
        Ok(Self {
            hidden: embed(&job.source, &mut machine, &tokens)?,
            machine,
            rows,
        })
    }

    /// Layer `layer` with its weights.
    pub(super) fn layer(&mut self, layer: usize, weights: Weights) -> Result<Beside<'_>> {
        Ok(Beside {
            walk: Walk::with(weights, &mut self.machine, layer, &mut self.hidden)?,
            rows: &self.rows,
        })
    }

    /// What brings rows to the head.
    pub(super) fn head_input(&mut self, weights: &Weights) -> Result<Bound> {
        self.machine.positions()?;
        self.machine.head_input(weights)
    }

    /// Brings row `r` of the calibration there, if it is one of its rows.
    pub(super) fn head_row<'s>(
        &'s mut self,
        bound: &'s Bound,
        r: usize,
    ) -> Result<Option<Slots<'s>>> {
        let Ok(at) = self.rows.binary_search(&r) else {
            return Ok(None);
        };
        let hidden = &self.hidden[at];
        self.machine.run(bound, &[("hidden", hidden)]).map(Some)
    }
}

impl Beside<'_> {
    /// As [`Walk::arrive`].
    pub(super) fn arrive(&mut self, stop: Stop) -> Result<Bound> {
        self.walk.arrive(stop)
    }

    /// Brings row `r` of the calibration to a stop, if it is one of its rows.
    pub(super) fn row<'s>(
        &'s mut self,
        bound: &'s Bound,
        stop: Stop,
        r: usize,
    ) -> Result<Option<Slots<'s>>> {
        match self.rows.binary_search(&r) {
            Ok(at) => self.walk.row(bound, stop, at).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// As [`Walk::leave`].
    pub(super) fn leave(&mut self, stop: Stop) {
        self.walk.leave(stop);
    }

    /// As [`Walk::finish`].
    pub(super) fn finish(self) -> Result<()> {
        self.walk.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spread_over_those_that_are_fitted_to() {
        // 24 rows of 2048 tokens: 1536 inputs want twelve of the 21 training rows.
        let rows = sampled(24, 2048, 1536);
        assert_eq!(rows.len(), 12);
        assert!(rows.iter().all(|&r| Part::of_row(r) == Part::Train));
        assert!(rows.is_sorted_by(|a, b| a < b) && rows[11] > 20);
        // A wide linear wants more than there are, a single row is there in any case.
        assert_eq!(sampled(24, 2048, 28672).len(), 21);
        assert_eq!(sampled(1, 64, 32), [0]);
        assert!(sampled(0, 64, 32).is_empty());
    }
}
