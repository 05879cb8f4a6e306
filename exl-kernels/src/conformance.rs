//! Cases that every implementation of the ops must pass.
//!
//! A [`Case`] builds its buffers, hands an [`Op`] to whatever implementation it is given and
//! returns the outputs. [`Case::check`] runs the f64 reference beside it and compares. The same
//! cases serve the scalar, AVX2 and AVX-512 kernels and later a GPU.

mod attention;
mod data;
mod linear;
mod moe;
mod quant;
mod rows;
mod sample;

use std::fmt;

use crate::ops::Op;
use crate::{Result, reference};

/// An implementation under test.
pub type Run<'a> = &'a mut dyn FnMut(&mut Op<'_>) -> Result<()>;

type Evaluate = Box<dyn Fn(Run<'_>) -> Result<Vec<Vec<f32>>> + Send + Sync>;

/// One op with one set of arguments.
pub struct Case {
    /// `op::what/shape`.
    pub name: String,
    /// Largest allowed `max |a - b| / max |b|` of an output.
    pub tolerance: f32,
    evaluate: Evaluate,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Case({})", self.name)
    }
}

/// How a case went.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Name of the case.
    pub name: String,
    /// Largest relative difference over the outputs; NaN when one was not comparable.
    pub error: f32,
    /// What is allowed.
    pub tolerance: f32,
}

impl Outcome {
    /// Whether the difference is allowed. NaN is not.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }
}

impl Case {
    fn new(
        name: String,
        tolerance: f32,
        evaluate: impl Fn(Run<'_>) -> Result<Vec<Vec<f32>>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            tolerance,
            evaluate: Box::new(evaluate),
        }
    }

    /// Shows the case's ops to `look`, which need not run them.
    ///
    /// # Errors
    /// Whatever `look` returns.
    pub fn visit(&self, look: Run<'_>) -> Result<()> {
        (self.evaluate)(look).map(drop)
    }

    /// Runs the case on an implementation and on the reference.
    ///
    /// # Errors
    /// Whatever either of them returns.
    pub fn check(&self, run: Run<'_>) -> Result<Outcome> {
        let tested = (self.evaluate)(run)?;
        let exact = (self.evaluate)(&mut reference::run)?;
        let pairs = tested.iter().zip(&exact);
        let error = pairs.map(|(a, b)| difference(a, b)).fold(0f32, |worst, e| {
            if e.is_nan() || e > worst { e } else { worst }
        });
        Ok(Outcome {
            name: self.name.clone(),
            error,
            tolerance: self.tolerance,
        })
    }
}

/// `max |a - b| / max |b|`; outputs that are not finite must be so in the same places.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let finite = b.iter().filter(|v| v.is_finite());
    let scale = finite.fold(0f32, |m, v| m.max(v.abs())).max(1e-30);
    let mut worst = 0f32;
    for (a, b) in a.iter().zip(b) {
        match (a.is_finite(), b.is_finite()) {
            (true, true) => worst = worst.max((a - b).abs() / scale),
            (false, false) => {}
            _ => return f32::NAN,
        }
    }
    worst
}

/// Every case. `quick` leaves out the larger shapes.
pub fn cases(quick: bool) -> Vec<Case> {
    let mut list = rows::cases();
    list.extend(linear::cases(quick));
    list.extend(moe::cases(quick));
    list.extend(attention::cases(quick));
    list.extend(sample::cases(quick));
    list.extend(quant::cases(quick));
    list
}
