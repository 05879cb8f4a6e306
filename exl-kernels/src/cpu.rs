//! The CPU implementation of every op.

mod interim;
mod isa;
mod pool;

pub use isa::Isa;
pub use pool::Pool;

use crate::ops::{self, Op};
use crate::{Result, reference};

/// Precision of the activations that meet quantized weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// 16-bit integers per group, as two 8-bit terms: indistinguishable from 32-bit floats.
    #[default]
    Exact16,
    /// 8-bit integers per group: twice the arithmetic rate, a relative error near 0.4%.
    Fast8,
}

/// How to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, 0 for every core.
    pub threads: usize,
    /// Instruction set, `None` for the best.
    pub isa: Option<Isa>,
    /// Precision of activations.
    pub activations: Activations,
}

/// Threads, instruction set and scratch memory.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    activations: Activations,
}

impl Cpu {
    /// Starts the threads. An instruction set this processor lacks is replaced by the best it has.
    pub fn new(options: CpuOptions) -> Self {
        let best = Isa::detect();
        Self {
            isa: options.isa.unwrap_or(best).min(best),
            pool: Pool::new(options.threads),
            activations: options.activations,
        }
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Precision of activations.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// Runs an op.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when sizes, types or places do not fit.
    pub fn run(&self, op: &mut Op<'_>) -> Result<()> {
        ops::check(op)?;
        match op {
            Op::Linear(op) => interim::linear(op, self),
            Op::GateUp(op) => interim::gate_up(op, self),
            Op::HessianSyrk(op) => interim::syrk(op, self),
            op => reference::run(op),
        }
    }
}
