//! What a model takes on a GPU, worked out without one: the sizes that loading and lowering use, over
//! memory that does not exist.

use std::collections::HashMap;
use std::sync::Arc;

use exl_kernels::cuda::{DevicePool, DeviceProps, DeviceRegion, MatrixShape};
use exl_kernels::{DType, Group};

use super::Bound;
use super::cuda::{Space, scratch_for, tables_for};
use crate::{KvBuffers, KvPages, KvShape, Plan, QuantKind, Result, StepBlock, Weight, Weights};

/// The weights of a model as far as sizes depend on them.
#[derive(Debug, Default)]
pub struct GpuSketch {
    /// Without memory: they never leave this struct.
    weights: Weights,
    /// Of all regions.
    bytes: u64,
    /// Permutations by their contents, as the loader shares them.
    perms: HashMap<Vec<u32>, u64>,
}

/// Device memory of one plan in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanMemory {
    /// Slots.
    pub arena: u64,
    /// Scratch memory of the most demanding op.
    pub scratch: u64,
    /// The step block, and tables in which kernels look up experts.
    pub step: u64,
}

impl PlanMemory {
    /// What serves both plans, one after the other.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            arena: self.arena.max(other.arena),
            scratch: self.scratch.max(other.scratch),
            step: self.step.max(other.step),
        }
    }
}

impl GpuSketch {
    /// No weights yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a dense weight.
    pub fn dense(&mut self, name: &str, dtype: DType, shape: &[usize]) {
        let bytes = shape.iter().product::<usize>() * dtype.bytes();
        self.bytes += DevicePool::padded(bytes) as u64;
        // SAFETY: nothing runs with the weights of a sketch.
        let region = unsafe { DeviceRegion::unbacked(bytes) };
        let weight = Weight::dense_on_gpu(dtype, shape, region);
        self.weights.insert(name, weight);
    }

    /// Adds an EXL2 matrix of `(inputs, outputs)`; `q_invperm` is the packed row of each feature.
    pub fn exl2(
        &mut self,
        name: &str,
        (inputs, outputs): (usize, usize),
        groups: Vec<Group>,
        q_invperm: &[u32],
    ) {
        let mut perm = vec![0; q_invperm.len()];
        for (feature, &row) in q_invperm.iter().enumerate() {
            if let Some(at) = perm.get_mut(row as usize) {
                *at = feature as u32;
            }
        }
        let shape = MatrixShape {
            inputs,
            outputs,
            groups,
            columns: false,
        };
        self.quantized(name, QuantKind::Exl2, &shape, perm);
    }

    /// Adds a GPTQ matrix of `(inputs, outputs)`; `g_idx` is the group of each feature unless they are
    /// in order.
    pub fn gptq(
        &mut self,
        name: &str,
        (inputs, outputs): (usize, usize),
        group_size: usize,
        g_idx: Option<&[u32]>,
    ) {
        let mut perm: Vec<u32> = (0..inputs as u32).collect();
        if let Some(index) = g_idx {
            perm.sort_by_key(|&i| index.get(i as usize));
        }
        let firsts = (0..inputs).step_by(group_size.max(1));
        let groups = firsts.map(|first| Group {
            bits: 4,
            rows: (inputs - first).min(group_size) as u32,
        });
        let shape = MatrixShape {
            inputs,
            outputs,
            groups: groups.collect(),
            columns: true,
        };
        self.quantized(name, QuantKind::Gptq, &shape, perm);
    }

    fn quantized(&mut self, name: &str, kind: QuantKind, shape: &MatrixShape, perm: Vec<u32>) {
        self.bytes += DevicePool::padded(shape.bytes()) as u64;
        let in_order = perm.iter().enumerate().all(|(i, &p)| i == p as usize);
        let perm = match (in_order, self.perms.get(&perm)) {
            (true, _) => 0,
            (false, Some(&known)) => known,
            (false, None) => {
                self.bytes += DevicePool::padded(shape.perm_bytes()) as u64;
                let new = self.perms.len() as u64 + 1;
                self.perms.insert(perm, new);
                new
            }
        };
        // SAFETY: nothing runs with the weights of a sketch.
        let matrix = unsafe { shape.unbacked(perm) };
        self.weights.insert(name, Weight::on_gpu(kind, matrix));
    }

    /// Gives a weight a second name.
    pub fn share(&mut self, name: &str, as_name: &str) {
        if let Some(weight) = self.weights.get(name).cloned() {
            self.weights.insert_shared(as_name, weight);
        }
    }

    /// Bytes of all weights on the GPU.
    pub fn weight_bytes(&self) -> u64 {
        self.bytes
    }

    /// What a plan takes with a cache of this shape and these pages on a GPU.
    ///
    /// # Errors
    /// [`crate::Error::MissingWeight`], [`crate::Error::Shape`] for weights that are not the plan's.
    pub fn plan(
        &self,
        plan: &Arc<Plan>,
        (cache, pages): (&KvShape, KvPages),
        props: &DeviceProps,
    ) -> Result<PlanMemory> {
        let bound = Bound::new(plan.clone(), &self.weights)?;
        let (arena, step_bytes) = (plan.arena().bytes(), StepBlock::bytes_for(plan.key()));
        // SAFETY: sizes are worked out, nothing runs.
        let (arena_region, step_region) = unsafe {
            (
                DeviceRegion::unbacked(arena),
                DeviceRegion::unbacked(step_bytes),
            )
        };
        let space = Space {
            arena: &arena_region,
            step: &step_region,
        };
        // SAFETY: as above.
        let mut kv = unsafe { KvBuffers::unbacked(*cache, pages)? };
        // The contents of the step do not matter.
        let step = StepBlock::new(plan.key())?;
        let scratch = scratch_for(&bound, &step, &mut kv, &space, props);
        let tables = tables_for(&bound, &step, &mut kv, &space);
        Ok(PlanMemory {
            arena: arena as u64,
            scratch: scratch as u64,
            step: (step_bytes + tables) as u64,
        })
    }
}
