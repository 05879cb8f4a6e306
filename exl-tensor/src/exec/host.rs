//! Interprets a plan on the host: SIMD kernels, or the f64 reference.

use std::collections::VecDeque;

use exl_kernels::cpu::Cpu;
use exl_kernels::{DType, KvType, Mem, MemMut, reference};

use super::regions::{Arena, Regions};
use super::{Bound, Executor, check_dtype, check_values};
use crate::plan::PlanOp;
use crate::{
    Error, HostMemory, KvBuffers, KvShape, Result, SlidingLayers, Slot, StepBlock, StepField,
};

/// Prepared plans remembered: more than a runner keeps ready.
const PREPARED: usize = 64;

#[derive(Debug)]
enum Kernels {
    Cpu(Box<Cpu>),
    Reference,
}

/// Runs plans in host memory.
#[derive(Debug)]
pub struct HostExecutor {
    kernels: Kernels,
    arena: HostMemory,
    /// Bytes of scratch memory that were reserved.
    scratch: usize,
    /// [`Bound::id`]s whose scratch memory is reserved, the newest first.
    prepared: VecDeque<u64>,
}

impl HostExecutor {
    /// With the SIMD kernels.
    ///
    /// # Errors
    /// Out of memory.
    pub fn cpu(cpu: Cpu) -> Result<Self> {
        Self::new(Kernels::Cpu(Box::new(cpu)))
    }

    /// With the f64 reference kernels: slow, for checking.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reference() -> Result<Self> {
        Self::new(Kernels::Reference)
    }

    fn new(kernels: Kernels) -> Result<Self> {
        Ok(Self {
            kernels,
            arena: HostMemory::zeroed(0, "the arena")?,
            scratch: 0,
            prepared: VecDeque::new(),
        })
    }

    /// Scratch bytes of the plan's most demanding op. Sizes follow from shapes and weights alone,
    /// so a cache without pages and an empty step stand in for those of the run.
    fn workspace_bytes(&self, cpu: &Cpu, bound: &Bound) -> Result<usize> {
        let ops = bound.plan().ops();
        let layers = ops.iter().map(|op| match op {
            PlanOp::RopeAppend { layer, .. } | PlanOp::PagedAttn { layer, .. } => layer + 1,
            _ => 0,
        });
        let shape = KvShape {
            layers: layers.max().unwrap_or(0),
            sliding: SlidingLayers::default(),
            kv_heads: 1,
            head_dim: 1,
            kv: KvType::F32,
        };
        let mut kv = KvBuffers::new(shape, 0)?;
        let step = StepBlock::new(bound.plan().key())?;
        let bytes = ops.iter().map(|op| {
            let regions = Regions::new(bound, &self.arena);
            cpu.workspace_bytes(&regions.op(op, &step, &mut kv))
        });
        Ok(bytes.max().unwrap_or(0))
    }

    /// The CPU kernels, if it runs them.
    pub fn kernels(&self) -> Option<&Cpu> {
        match &self.kernels {
            Kernels::Cpu(cpu) => Some(cpu),
            Kernels::Reference => None,
        }
    }

    /// A slot's values, F32 `[rows, dim]`, until the next run.
    ///
    /// # Panics
    /// When the slot holds integers.
    pub fn slot(&self, bound: &Bound, slot: Slot) -> &[f32] {
        let info = bound.plan().slot(slot);
        let region = self
            .arena
            .mem(bound.plan().arena().offset(slot), info.bytes(), info.dtype);
        region.slice().expect("the slot is F32 in host memory")
    }

    /// A slot's values for writing.
    ///
    /// # Panics
    /// When the slot holds integers.
    pub fn slot_mut(&mut self, bound: &Bound, slot: Slot) -> &mut [f32] {
        let info = bound.plan().slot(slot);
        let offset = bound.plan().arena().offset(slot);
        // SAFETY: `&mut self` excludes every other region of the arena.
        let mut region = unsafe { self.arena.mem_mut(offset, info.bytes(), info.dtype) };
        let view = region
            .slice_mut::<f32>()
            .expect("the slot is F32 in host memory");
        // SAFETY: the region borrows the arena, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(view.as_mut_ptr(), info.rows * info.dim) }
    }
}

impl Executor for HostExecutor {
    fn name(&self) -> String {
        match &self.kernels {
            Kernels::Cpu(cpu) => format!("cpu/{:?}", cpu.isa()).to_lowercase(),
            Kernels::Reference => "reference".to_owned(),
        }
    }

    fn prepare(&mut self, bound: &Bound) -> Result<()> {
        let bytes = bound.plan().arena().bytes();
        if bytes > self.arena.bytes() {
            self.arena = HostMemory::zeroed(bytes, "the arena")?;
        }
        if let Kernels::Cpu(cpu) = &self.kernels
            && !self.prepared.contains(&bound.id())
        {
            let bytes = self.workspace_bytes(cpu, bound)?;
            cpu.reserve(bytes);
            self.scratch = self.scratch.max(bytes);
            self.prepared.truncate(PREPARED - 1);
            self.prepared.push_front(bound.id());
        }
        Ok(())
    }

    fn run_op(
        &mut self,
        bound: &Bound,
        index: usize,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<()> {
        let plan_op = &bound.plan().ops()[index];
        let regions = Regions::new(bound, &self.arena);
        let mut op = regions.op(plan_op, step, kv);
        let done = match &self.kernels {
            Kernels::Cpu(cpu) => cpu.run(&mut op),
            Kernels::Reference => reference::run(&mut op),
        };
        done.map_err(|source| Error::Op {
            index,
            op: plan_op.name(),
            source,
        })
    }

    fn values(&mut self, bound: &Bound, slot: Slot) -> Result<&[f32]> {
        check_dtype(bound, slot, DType::F32)?;
        Ok(self.slot(bound, slot))
    }

    fn integers(&mut self, bound: &Bound, slot: Slot) -> Result<&[i32]> {
        check_dtype(bound, slot, DType::I32)?;
        let info = bound.plan().slot(slot);
        let offset = bound.plan().arena().offset(slot);
        let region = self.arena.mem(offset, info.bytes(), info.dtype);
        Ok(region.slice().expect("the slot is I32 in host memory"))
    }

    fn arena_bytes(&self) -> usize {
        self.arena.bytes()
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn write(&mut self, bound: &Bound, slot: Slot, values: &[f32]) -> Result<()> {
        check_values(bound, slot, DType::F32, values.len())?;
        self.slot_mut(bound, slot).copy_from_slice(values);
        Ok(())
    }

    fn write_integers(&mut self, bound: &Bound, slot: Slot, values: &[i32]) -> Result<()> {
        check_values(bound, slot, DType::I32, values.len())?;
        let info = bound.plan().slot(slot);
        let offset = bound.plan().arena().offset(slot);
        // SAFETY: `&mut self` excludes every other region of the arena.
        let mut region = unsafe { self.arena.mem_mut(offset, info.bytes(), info.dtype) };
        let view = region.slice_mut::<i32>();
        view.expect("the slot is I32 in host memory")
            .copy_from_slice(values);
        Ok(())
    }
}

impl Arena for HostMemory {
    fn region(&self, offset: usize, bytes: usize, dtype: DType) -> Mem<'_> {
        self.mem(offset, bytes, dtype)
    }

    unsafe fn region_mut(&self, offset: usize, bytes: usize, dtype: DType) -> MemMut<'_> {
        // SAFETY: the caller's promise.
        unsafe { self.mem_mut(offset, bytes, dtype) }
    }

    fn step<'a>(&'a self, step: &'a StepBlock, field: StepField) -> Mem<'a> {
        step.mem(field)
    }
}
