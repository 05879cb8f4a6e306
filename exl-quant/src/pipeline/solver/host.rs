//! The mathematics on the CPU.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{DAMPINGS, Rounded, Rows, Solver};
use crate::measure::{
    Curve, candidate_bytes, candidate_threads, difference, measure_with, sample_columns, together,
};
use crate::refine::{MOST_INPUTS, refine};
use crate::{
    Factor, Gptq, Hessian, HessianSet, Layout, Matrix, Quantizer, Result, SAMPLE_COLUMNS,
    activity_order,
};

/// Bytes for each pair of features: the three Hessians, and what their inputs are away from the original's.
const HESSIANS: u64 = 16;
/// And while they are summed up: the sums, and that of both parts.
const SUMS: u64 = 16;
/// And for a factor in the making: the matrix and its inverse in f64, and the result.
const FACTOR: u64 = 20;
/// And for the best factor so far.
const BEST: u64 = 4;

/// As [`super::host_bytes`].
pub(super) fn bytes(inputs: usize, weights: u64, threads: usize) -> (u64, u64) {
    let pairs = (inputs * inputs) as u64;
    let candidates = together((FACTOR * pairs) as usize, DAMPINGS.len()) as u64;
    let hessians = (HESSIANS + SUMS.max(candidates * FACTOR + BEST)) * pairs;
    // As floats, what rounding aims at, its working copy, codes, the decoded values and their transpose;
    // while codes are bettered, both kinds of codes and of decoded values.
    let rounding = weights * (4 * 6 + 2);
    let candidates = candidate_threads(inputs, threads).max(candidates as usize);
    let measuring = 4 * weights + (candidates * candidate_bytes(inputs)) as u64;
    (hessians, rounding.max(measuring))
}

#[derive(Debug)]
pub(super) struct HostSolver {
    hessians: HessianSet,
    order: Vec<u32>,
    /// With the damping that was asked for.
    factor: Option<(f64, Factor)>,
}

impl HostSolver {
    pub(super) fn new(hessians: HessianSet) -> Self {
        Self {
            order: activity_order(&hessians.train),
            hessians,
            factor: None,
        }
    }

    fn factor(&self) -> &Factor {
        &self.factor.as_ref().expect("a damping was chosen").1
    }

    fn hessian(&self, rows: Rows) -> &Hessian {
        match rows {
            Rows::Train => &self.hessians.train,
            Rows::HoldOut => &self.hessians.hold_out,
            Rows::All => &self.hessians.all,
        }
    }
}

impl Solver for HostSolver {
    fn choose_damping(&mut self, name: &str, weight: &Matrix) -> Result<()> {
        let (sample, _) = sample_columns(weight, SAMPLE_COLUMNS);
        let layout = Layout::uniform(3, 128, sample.rows)?;
        let try_it = |&damping: &f64| {
            let factor = Factor::new(name, &self.hessians.train, &self.order, damping)?;
            let q = Gptq { factor: &factor }.quantize(name, &sample, &layout)?;
            let change = difference(&sample, &q.dequantize());
            Ok((self.hessians.hold_out.loss(&change)?, factor))
        };
        let mut best: Option<(f64, Factor)> = None;
        let factor_bytes = FACTOR as usize * sample.rows * sample.rows;
        for some in DAMPINGS.chunks(together(factor_bytes, DAMPINGS.len())) {
            let tried: Vec<_> = some.par_iter().map(try_it).collect::<Result<_>>()?;
            let all = best.into_iter().chain(tried);
            best = all.reduce(|a, b| if b.0 < a.0 { b } else { a });
        }
        let factor = best.expect("the list of dampings is not empty").1;
        self.factor = Some((factor.damping(), factor));
        Ok(())
    }

    fn set_damping(&mut self, name: &str, damping: f64) -> Result<()> {
        if self.factor.as_ref().is_none_or(|f| f.0 != damping) {
            let factor = Factor::new(name, &self.hessians.train, &self.order, damping)?;
            self.factor = Some((damping, factor));
        }
        Ok(())
    }

    fn damping(&self) -> (f64, u32) {
        (self.factor().damping(), self.factor().retries())
    }

    fn curve(&mut self, name: &str, weight: &Matrix) -> Result<Curve> {
        measure_with(name, weight, &self.hessians, self.factor())
    }

    fn judge(
        &mut self,
        weight: &Matrix,
        decoded: &Matrix,
        rows: &[Rows],
    ) -> Result<Vec<(f64, f64)>> {
        let left = difference(weight, decoded);
        let judge = |&rows: &Rows| {
            let h = self.hessian(rows);
            Ok((h.loss(&left)?, h.loss(weight)?))
        };
        rows.iter().map(judge).collect()
    }

    fn round(
        &mut self,
        name: &str,
        weight: &Matrix,
        layout: &Layout,
        rows: &[Rows],
    ) -> Result<Rounded> {
        let factor = self.factor();
        let aim = match &self.hessians.cross {
            Some(cross) => Cow::Owned(cross.aim(weight, factor)?),
            None => Cow::Borrowed(weight),
        };
        let mut quantized = Gptq { factor }.quantize(name, &aim, layout)?;
        let mut decoded = quantized.dequantize();
        if weight.rows <= MOST_INPUTS {
            let mut refined = quantized.clone();
            let damping = factor.damping();
            let h = self.hessians.train.data();
            refine(&mut refined, (&aim, &decoded), h, damping);
            let better = refined.dequantize();
            let left = |decoded| self.hessians.hold_out.loss(&difference(&aim, decoded));
            if left(&better)? < left(&decoded)? {
                (quantized, decoded) = (refined, better);
            }
        }
        let losses = self.judge(weight, &decoded, rows)?;
        Ok(Rounded {
            quantized,
            decoded,
            losses,
        })
    }
}
