//! The original beside a model that is being quantized.
//!
//! Some rows of the calibration run through the original too, layer by layer with the others, so that
//! the rounding of every linear but experts' sees how far its inputs are from the original's
//! ([`crate::CrossMoment`]).

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
    pub(super) walk: Walk<'a>,
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
}

#[cfg(test)]
mod tests {
    use super::super::device::Device;
    use super::super::machine::padded;
    use super::super::sites::{STOPS, Site, head_solver};
    use super::super::solver::Solver;
    use super::*;
    use crate::Layout;
    use exl_models::LoadOptions;
    use exl_tensor::{Buffer, DType, Weight};

    const LENGTH: usize = 16;

    /// Codes of some linear of every input of two layers and of the head, beside the original or not; with
    /// a weight of the first layer changed behind its stop or not.
    fn codes(beside: bool, change: bool) -> Vec<Vec<u8>> {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
        let source = ModelSource::open(demo.as_ref(), &LoadOptions::default()).unwrap();
        let (spec, device) = (source.spec().clone(), Device::new(1, None));
        let row = |r: u32| {
            (0..LENGTH as u32)
                .map(|i| (r * 37 + i * 11) % 2000)
                .collect()
        };
        let tokens: Vec<Vec<u32>> = (0..10).map(row).collect();
        let rows = vec![1, 4, 9];
        let some: Vec<Vec<u32>> = rows.iter().map(|&r| tokens[r].clone()).collect();
        let mut machine = Machine::new(&spec, LENGTH, &device).unwrap();
        let mut hidden = embed(&source, &mut machine, &tokens).unwrap();
        let mut other = Machine::new(&spec, LENGTH, &device).unwrap();
        let mut original = Original {
            hidden: embed(&source, &mut other, &some).unwrap(),
            machine: other,
            rows,
        };
        let mut found = Vec::new();
        let mut round = |name: &str, weight: &Weight, solver: &mut dyn Solver| {
            let matrix = padded(name, weight).unwrap();
            let layout = Layout::uniform(6, 64, matrix.rows).unwrap();
            solver.set_damping(name, 0.05).unwrap();
            let rounded = solver.round(name, &matrix, &layout, &[]).unwrap();
            found.push(rounded.quantized.codes);
        };
        for layer in 0..2 {
            let mut walk = Walk::new(&source, &mut machine, layer, &mut hidden).unwrap();
            let mut theirs = original.layer(layer, walk.weights.clone()).unwrap();
            for stop in STOPS {
                let sites = stop.sites(&spec.layers[layer]).into_iter();
                let sites: Vec<(Site, bool)> = sites.map(|s| (s, true)).collect();
                let visit = |weights: &mut Weights, found: super::super::sites::Visit<'_>| {
                    let name = found.site.linears.last().unwrap();
                    let weight = weights.get(name).unwrap().clone();
                    round(name, &weight, found.solver.unwrap());
                    if change && layer == 0 {
                        let values = weight.to_f32(name).unwrap();
                        let values = values.iter().map(|x| 0.8 * x).collect();
                        let (shape, data) = (weight.shape(), Buffer::from_vec(values));
                        let smaller = Weight::dense(name, DType::F32, &shape, data).unwrap();
                        weights.insert(name.clone(), smaller);
                    }
                    Ok(())
                };
                let theirs = beside.then_some(&mut theirs);
                walk.solve(stop, &sites, theirs, visit).unwrap();
            }
            walk.finish().unwrap();
            if beside {
                theirs.walk.finish().unwrap();
            }
        }
        let name = &spec.head.linear.key;
        let theirs = beside.then_some(&mut original);
        let mut solver = head_solver(&source, (&mut machine, &hidden), theirs).unwrap();
        let head = source.load_module(exl_models::Module::Head).unwrap();
        round(name, head.get(name).unwrap(), solver.as_mut());
        found
    }

    #[test]
    fn a_model_beside_itself_has_nothing_to_make_up_for() {
        assert!(codes(true, false) == codes(false, false));
        let (with, without) = (codes(true, true), codes(false, true));
        let changed: Vec<bool> = with.iter().zip(&without).map(|(a, b)| a != b).collect();
        // All but the first input, which is the embedding's.
        assert!(!changed[0]);
        assert!(changed[1..].iter().all(|&c| c), "{changed:?}");
    }

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
