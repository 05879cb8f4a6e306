//! The mathematics on the CPU.

use rayon::prelude::*;

use super::{DAMPINGS, Rounded, Rows, Solver};
use crate::measure::{Curve, difference, measure_with, sample_columns};
use crate::refine::{MOST_INPUTS, refine};
use crate::{
    Factor, Gptq, Hessian, HessianSet, Layout, Matrix, Quantizer, Result, SAMPLE_COLUMNS,
    activity_order,
};

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
        let tried: Vec<(f64, Factor)> = DAMPINGS
            .into_par_iter()
            .map(|damping| {
                let factor = Factor::new(name, &self.hessians.train, &self.order, damping)?;
                let q = Gptq { factor: &factor }.quantize(name, &sample, &layout)?;
                let change = difference(&sample, &q.dequantize());
                Ok((self.hessians.hold_out.loss(&change)?, factor))
            })
            .collect::<Result<_>>()?;
        let best = tried
            .into_iter()
            .reduce(|a, b| if b.0 < a.0 { b } else { a });
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
        let mut quantized = Gptq { factor }.quantize(name, weight, layout)?;
        let mut decoded = quantized.dequantize();
        if weight.rows <= MOST_INPUTS {
            let mut refined = quantized.clone();
            let damping = factor.damping();
            let h = self.hessians.train.data();
            refine(&mut refined, (weight, &decoded), h, damping);
            let better = refined.dequantize();
            let left = |decoded| self.hessians.hold_out.loss(&difference(weight, decoded));
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
