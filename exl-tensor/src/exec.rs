//! Executors: what runs a plan.

mod check;
mod cuda;
mod host;
mod regions;
mod sketch;

pub use check::{CheckReport, Side, SlotDiff, check};
pub use cuda::{CudaExecutor, CudaOptions};
pub use host::HostExecutor;
pub use sketch::{GpuSketch, PlanMemory};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use exl_kernels::DType;

use crate::{Error, KvBuffers, Plan, Result, Slot, StepBlock, Weight, Weights};

/// A plan with its weights resolved, ready to run.
#[derive(Clone, Debug)]
pub struct Bound {
    id: u64,
    plan: Arc<Plan>,
    weights: Vec<Arc<Weight>>,
}

impl Bound {
    /// Looks up every weight of the plan and checks its shape.
    ///
    /// # Errors
    /// [`Error::MissingWeight`], [`Error::Shape`].
    pub fn new(plan: Arc<Plan>, weights: &Weights) -> Result<Self> {
        let found = plan
            .weights()
            .iter()
            .map(|info| {
                let weight = weights
                    .get(&info.name)
                    .ok_or_else(|| Error::MissingWeight {
                        name: info.name.clone(),
                    })?;
                let shape = weight.shape();
                if fits(&info.shape, &shape, weight.quant_kind().is_some()) {
                    return Ok(weight.clone());
                }
                Err(Error::Shape {
                    name: info.name.clone(),
                    expected: format!("{:?}", info.shape),
                    found: format!("{shape:?}"),
                })
            })
            .collect::<Result<_>>()?;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            plan,
            weights: found,
        })
    }

    /// Tells plans with their weights apart, so that executors can keep what they made for one;
    /// clones share it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    pub(crate) fn weight(&self, id: crate::WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }
}

/// Quantized matrices may have more outputs than the layer: files pad them to a multiple of 32.
fn fits(wanted: &[usize], found: &[usize], quantized: bool) -> bool {
    if !quantized {
        return wanted == found;
    }
    let [outputs, inputs] = wanted else {
        return false;
    };
    found[1] == *inputs && (found[0] == *outputs || found[0] == outputs.next_multiple_of(32))
}

/// How long a part of a step took.
#[derive(Clone, Debug, PartialEq)]
pub struct PartTime {
    /// Op, or kernel.
    pub name: &'static str,
    /// Seconds by the clock of what ran it.
    pub seconds: f64,
}

/// Something that runs plans.
pub trait Executor: std::fmt::Debug + Send {
    /// Name for reports.
    fn name(&self) -> String;

    /// Makes room for a plan: afterwards, running it grows neither the arena nor the kernels'
    /// scratch memory. Cheap for a plan prepared shortly before.
    ///
    /// # Errors
    /// Out of memory.
    fn prepare(&mut self, bound: &Bound) -> Result<()>;

    /// Runs one op of a prepared plan.
    ///
    /// # Errors
    /// [`Error::Op`] when the kernel refuses its arguments.
    fn run_op(
        &mut self,
        bound: &Bound,
        index: usize,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<()>;

    /// A slot's values, F32 `[rows, dim]`, on the host.
    ///
    /// # Errors
    /// What the device reports; [`Error::Step`] for a slot of another type.
    fn values(&mut self, bound: &Bound, slot: Slot) -> Result<&[f32]>;

    /// A slot's integers, I32 `[rows, dim]`, on the host.
    ///
    /// # Errors
    /// As [`Executor::values`].
    fn integers(&mut self, bound: &Bound, slot: Slot) -> Result<&[i32]>;

    /// Bytes of the arena at present.
    fn arena_bytes(&self) -> usize;

    /// Bytes of the kernels' scratch memory at present.
    fn scratch_bytes(&self) -> usize;

    /// Fills a slot from the host.
    ///
    /// # Errors
    /// [`Error::Step`] when the length is not the slot's.
    fn write(&mut self, bound: &Bound, slot: Slot, values: &[f32]) -> Result<()>;

    /// Fills a slot of integers from the host.
    ///
    /// # Errors
    /// As [`Executor::write`].
    fn write_integers(&mut self, bound: &Bound, slot: Slot, values: &[i32]) -> Result<()>;

    /// Runs a prepared plan.
    ///
    /// # Errors
    /// As [`Executor::run_op`]; [`Error::Step`] when the step block was made for another shape.
    fn run(&mut self, bound: &Bound, step: &StepBlock, kv: &mut KvBuffers) -> Result<()> {
        check_key(bound, step)?;
        (0..bound.plan().ops().len()).try_for_each(|i| self.run_op(bound, i, step, kv))
    }

    /// Runs a prepared plan part by part, each after the one before has ended, and says how long each
    /// took. Parts that overlap in [`Executor::run`] take longer together than a step.
    ///
    /// # Errors
    /// As [`Executor::run`].
    fn profile(
        &mut self,
        bound: &Bound,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<Vec<PartTime>> {
        check_key(bound, step)?;
        let ops = bound.plan().ops().iter().enumerate();
        ops.map(|(i, op)| {
            let start = Instant::now();
            self.run_op(bound, i, step, kv)?;
            Ok(PartTime {
                name: op.name(),
                seconds: start.elapsed().as_secs_f64(),
            })
        })
        .collect()
    }
}

fn check_dtype(bound: &Bound, slot: Slot, wanted: DType) -> Result<()> {
    let info = bound.plan().slot(slot);
    if info.dtype == wanted {
        return Ok(());
    }
    let (name, found) = (&info.name, info.dtype);
    Err(Error::Step(format!(
        "slot {name} holds {found:?}, it was asked for as {wanted:?}"
    )))
}

/// Checks that values from the host fill a slot.
fn check_values(bound: &Bound, slot: Slot, dtype: DType, count: usize) -> Result<()> {
    check_dtype(bound, slot, dtype)?;
    let info = bound.plan().slot(slot);
    let (what, want) = (&info.name, info.rows * info.dim);
    if want == count {
        return Ok(());
    }
    Err(Error::Step(format!(
        "input {what} takes {want} values, got {count}"
    )))
}

fn check_key(bound: &Bound, step: &StepBlock) -> Result<()> {
    let (wanted, found) = (bound.plan().key(), step.key());
    if wanted == found {
        return Ok(());
    }
    Err(Error::Step(format!(
        "block for {found} with a plan for {wanted}"
    )))
}
