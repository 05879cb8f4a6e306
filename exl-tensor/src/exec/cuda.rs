//! Runs a plan on a GPU: a launch list, or its captured graph.

use std::collections::HashMap;

use exl_kernels::cuda::{
    COUNTERS, Device, DeviceProps, DeviceRegion, Event, Graph, Launch, PinnedMemory, ReadyLaunch,
    Scratch, Stream, Target, link, lower, scratch_bytes, table_bytes,
};
use exl_kernels::{DType, Mem, MemMut};

use super::regions::{Arena, Regions};
use super::{Bound, Executor, PartTime, check_dtype, check_values};
use crate::{Error, Gpu, GpuPart, KvBuffers, Phase, Result, Slot, StepBlock, StepField};

/// Plans whose launches are kept unless somebody says otherwise; more than a runner keeps ready.
const KEPT_PLANS: usize = 64;

/// How a [`CudaExecutor`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Captures decode plans when they run for the second time.
    pub graphs: bool,
    /// Lets kernels overlap where the GPU and the driver can.
    pub overlap: bool,
    /// Fixed order of all sums, whatever else is in the batch: quantized weights are read once for
    /// every 32 rows of a step, and one row alone takes the kernel of several (docs/kernels.md).
    pub deterministic: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            graphs: true,
            overlap: true,
            deterministic: false,
        }
    }
}

/// Runs plans on a GPU.
#[derive(Debug)]
pub struct CudaExecutor {
    // Before the regions: graphs refer to them.
    plans: HashMap<u64, Lowered>,
    gpu: Gpu,
    options: CudaOptions,
    arena: DeviceRegion,
    scratch: DeviceRegion,
    counters: DeviceRegion,
    step: DeviceRegion,
    /// Values on their way to the host, and steps on theirs to the GPU.
    from_gpu: PinnedMemory,
    to_gpu: PinnedMemory,
    /// Nothing is queued.
    idle: bool,
    clock: u64,
    /// Plans whose launches are kept.
    kept: usize,
}

/// The launches of a plan with one cache.
#[derive(Debug)]
struct Lowered {
    /// Keeps the weights alive.
    bound: Bound,
    kv: usize,
    /// Of all ops together.
    launches: Vec<ReadyLaunch>,
    /// Those of each op by itself, once one was run so.
    ops: Vec<Vec<ReadyLaunch>>,
    graph: Option<Graph>,
    runs: u64,
    used: u64,
}

impl CudaExecutor {
    /// An executor on a GPU. Memory for plans is taken by [`Executor::prepare`].
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn new(gpu: &Gpu, options: CudaOptions) -> Result<Self> {
        let device = gpu.device();
        let region = |bytes, what| {
            gpu.metered(GpuPart::Step, || {
                DeviceRegion::zeroed(device, bytes, what).map_err(Error::Gpu)
            })
        };
        let pinned = |bytes| PinnedMemory::new(device, bytes).map_err(Error::Gpu);
        Ok(Self {
            plans: HashMap::new(),
            options,
            arena: region(256, "activations")?,
            scratch: region(256, "scratch memory")?,
            counters: region(4 * COUNTERS, "counters")?,
            step: region(256, "the step block")?,
            from_gpu: pinned(256)?,
            to_gpu: pinned(256)?,
            idle: true,
            clock: 0,
            kept: KEPT_PLANS,
            gpu: gpu.clone(),
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Keeps the launches of the newest `plans` plans, one at least. A plan that is kept keeps its
    /// weights in device memory.
    pub fn keep(&mut self, plans: usize) {
        self.kept = plans.max(1);
    }

    /// Where a slot's values are on the GPU, until the next run.
    ///
    /// # Errors
    /// [`Error::Gpu`] when the plan has not been prepared.
    pub fn region(&self, bound: &Bound, slot: Slot) -> Result<DeviceRegion> {
        let plan = bound.plan();
        let part = self
            .arena
            .part(plan.arena().offset(slot), plan.slot(slot).bytes());
        part.map_err(Error::Gpu)
    }

    /// Takes all device memory that a plan needs with a cache, so that no step has to: later ones that
    /// need no more find it there.
    ///
    /// # Errors
    /// [`Error::Gpu`]: out of device memory.
    pub fn reserve(&mut self, bound: &Bound, kv: &mut KvBuffers) -> Result<()> {
        self.prepare(bound)?;
        let step = StepBlock::new(bound.plan().key())?;
        let bytes = scratch_for(bound, &step, kv, &self.space(), self.gpu.props());
        self.grow(Growing::Scratch, bytes)
    }

    /// Kernel launches of a plan that has run.
    pub fn launches(&self, bound: &Bound) -> Option<usize> {
        self.plans.get(&bound.id()).map(|l| l.launches.len())
    }

    fn wait(&mut self) -> Result<()> {
        if !self.idle {
            self.gpu.device().synchronize().map_err(Error::Gpu)?;
            self.idle = true;
        }
        Ok(())
    }

    /// A region of at least `bytes`. Launches that were made with the old one are dropped.
    fn grow(&mut self, which: Growing, bytes: usize) -> Result<()> {
        let (region, part, what) = match which {
            Growing::Arena => (&self.arena, GpuPart::Activations, "activations"),
            Growing::Scratch => (&self.scratch, GpuPart::Scratch, "scratch memory of kernels"),
            Growing::Step => (&self.step, GpuPart::Step, "the step block"),
        };
        if region.bytes() >= bytes {
            return Ok(());
        }
        self.wait()?;
        self.forget(|_| true)?;
        let device = self.gpu.device().clone();
        let region = match which {
            Growing::Arena => &mut self.arena,
            Growing::Scratch => &mut self.scratch,
            Growing::Step => &mut self.step,
        };
        self.gpu.metered(part, || {
            // The old memory goes first: both together may not fit.
            *region = DeviceRegion::zeroed(&device, 256, what).map_err(Error::Gpu)?;
            *region = DeviceRegion::zeroed(&device, bytes, what).map_err(Error::Gpu)?;
            Ok(())
        })
    }

    /// Drops the launches and graphs of these plans.
    fn forget(&mut self, which: impl Fn(&u64) -> bool) -> Result<()> {
        let plans = &mut self.plans;
        self.gpu.metered(GpuPart::Graphs, || {
            plans.retain(|id, _| !which(id));
            Ok(())
        })
    }

    /// Makes the launches of a plan unless they are there.
    fn lower(&mut self, bound: &Bound, step: &StepBlock, kv: &mut KvBuffers) -> Result<()> {
        self.clock += 1;
        let identity = kv.identity();
        if let Some(lowered) = self.plans.get_mut(&bound.id())
            && lowered.kv == identity
        {
            lowered.used = self.clock;
            return Ok(());
        }
        let bytes = scratch_for(bound, step, kv, &self.space(), self.gpu.props());
        self.grow(Growing::Scratch, bytes)?;
        let mut list = self.launches_of(bound, step, kv)?.concat();
        link(&mut list, &self.target());
        let launches = self.ready(&list)?;
        self.make_room()?;
        let lowered = Lowered {
            bound: bound.clone(),
            kv: identity,
            launches,
            ops: Vec::new(),
            graph: None,
            runs: 0,
            used: self.clock,
        };
        self.plans.insert(bound.id(), lowered);
        Ok(())
    }

    /// What each op of a plan is lowered to.
    fn launches_of(
        &self,
        bound: &Bound,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<Vec<Vec<Launch>>> {
        let (space, target) = (self.space(), self.target());
        let ops = bound.plan().ops().iter().enumerate();
        ops.map(|(index, plan_op)| {
            let op = Regions::new(bound, &space).op(plan_op, step, kv);
            let mut list = Vec::new();
            lower(&op, &target, &mut list).map_err(|source| Error::Op {
                index,
                op: plan_op.name(),
                source,
            })?;
            Ok(list)
        })
        .collect()
    }

    fn target(&self) -> Target<'_> {
        Target {
            props: self.gpu.props(),
            scratch: Scratch {
                address: self.scratch.address(),
                bytes: self.scratch.bytes() as u64,
                counters: self.counters.address(),
            },
            deterministic: self.options.deterministic,
        }
    }

    /// Launches of a plan that is kept with them.
    fn ready(&self, list: &[Launch]) -> Result<Vec<ReadyLaunch>> {
        let device = self.gpu.device();
        // Tables of launches take memory.
        self.gpu.metered(GpuPart::Step, || {
            // SAFETY: the launches name the arena, scratch, counters and step block, which outlive
            // them here (growing one drops the launches), weights that `bound` keeps, and the cache,
            // whose identity is compared before every run.
            let ready = list.iter().map(|l| unsafe { device.ready(l) });
            ready
                .collect::<std::result::Result<_, _>>()
                .map_err(Error::Gpu)
        })
    }

    fn space(&self) -> Space<'_> {
        Space {
            arena: &self.arena,
            step: &self.step,
        }
    }

    fn make_room(&mut self) -> Result<()> {
        while self.plans.len() >= self.kept {
            let oldest = self.plans.iter().min_by_key(|(_, l)| l.used);
            let Some(oldest) = oldest.map(|(&id, _)| id) else {
                return Ok(());
            };
            self.forget(|id| *id == oldest)?;
        }
        Ok(())
    }

    /// Queues the copy of a step to the GPU.
    fn send(&mut self, step: &StepBlock) -> Result<()> {
        // The pinned memory may still be on its way.
        self.wait()?;
        let bytes = step.bytes();
        if self.to_gpu.len() < bytes.len() {
            self.to_gpu = PinnedMemory::new(self.gpu.device(), bytes.len()).map_err(Error::Gpu)?;
        }
        self.to_gpu[..bytes.len()].copy_from_slice(bytes);
        self.idle = false;
        let stream = self.gpu.device().stream();
        // SAFETY: `wait` comes before the memory is written again, and before the region is
        // replaced; dropping either waits for the copy.
        unsafe { stream.copy_in_async(&self.step, 0, &self.to_gpu, bytes.len()) }
            .map_err(Error::Gpu)
    }

    /// A slot's bytes on the host, after all that is queued.
    fn fetch(&mut self, bound: &Bound, slot: Slot) -> Result<&[u8]> {
        let bytes = bound.plan().slot(slot).bytes();
        if self.from_gpu.len() < bytes {
            self.from_gpu = PinnedMemory::new(self.gpu.device(), bytes).map_err(Error::Gpu)?;
        }
        let stream = self.gpu.device().stream();
        let offset = bound.plan().arena().offset(slot);
        // SAFETY: nothing touches the memory before the wait below.
        let queued = unsafe { stream.copy_out_async(&self.arena, offset, &self.from_gpu, bytes) };
        self.idle = false;
        self.wait()?;
        queued.map_err(Error::Gpu)?;
        Ok(&self.from_gpu[..bytes])
    }

    /// Copies the bytes of a slot from the host.
    fn put(&mut self, bound: &Bound, slot: Slot, bytes: &[u8]) -> Result<()> {
        let offset = bound.plan().arena().offset(slot);
        let device = self.gpu.device();
        device
            .copy_in(&self.arena, offset, bytes)
            .map_err(Error::Gpu)
    }

    fn launch(&mut self, id: u64, op: Option<usize>) -> Result<()> {
        let overlap = self.options.overlap && self.gpu.device().overlaps_launches();
        let stream = self.gpu.device().stream();
        let lowered = self.plans.get_mut(&id).expect("the plan was lowered");
        if let Some(op) = op {
            let launches = &lowered.ops[op];
            return stream.launch_all(launches, overlap).map_err(Error::Gpu);
        }
        let decode = lowered.bound.plan().key().phase == Phase::Decode;
        // The first run loads kernels, which cannot be captured.
        if lowered.graph.is_none() && lowered.runs > 0 && decode && self.options.graphs {
            let launches = &lowered.launches;
            let graph = self
                .gpu
                .metered(GpuPart::Graphs, || capture(stream, launches, overlap));
            lowered.graph = Some(graph?);
        }
        lowered.runs += 1;
        match &lowered.graph {
            Some(graph) => graph.launch(stream).map_err(Error::Gpu),
            None => stream
                .launch_all(&lowered.launches, overlap)
                .map_err(Error::Gpu),
        }
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        // An error here means that the GPU is gone, and its memory with it.
        let _ = self.wait();
    }
}

/// The launches as a graph that is on the GPU.
fn capture(stream: &Stream, launches: &[ReadyLaunch], overlap: bool) -> Result<Graph> {
    let graph = stream.capture(|stream| stream.launch_all(launches, overlap));
    let graph = graph.map_err(Error::Gpu)?;
    graph.upload(stream).map_err(Error::Gpu)?;
    Ok(graph)
}

/// Bytes of the tables that a plan's launches keep, which are the same for all plans of a model.
pub(super) fn tables_for(
    bound: &Bound,
    step: &StepBlock,
    kv: &mut KvBuffers,
    space: &Space<'_>,
) -> usize {
    let ops = bound.plan().ops().iter();
    let bytes = ops.map(|op| table_bytes(&Regions::new(bound, space).op(op, step, kv)));
    bytes.sum::<u64>() as usize
}

/// Scratch bytes of the plan's most demanding op, wherever its operands are.
pub(super) fn scratch_for(
    bound: &Bound,
    step: &StepBlock,
    kv: &mut KvBuffers,
    space: &Space<'_>,
    props: &DeviceProps,
) -> usize {
    let mut most = 0;
    for plan_op in bound.plan().ops() {
        let op = Regions::new(bound, space).op(plan_op, step, kv);
        most = most.max(scratch_bytes(&op, props));
    }
    most as usize
}

#[derive(Clone, Copy)]
enum Growing {
    Arena,
    Scratch,
    Step,
}

impl Executor for CudaExecutor {
    fn name(&self) -> String {
        let device = self.gpu.device();
        format!("cuda:{} ({})", device.ordinal(), device.props().name)
    }

    fn prepare(&mut self, bound: &Bound) -> Result<()> {
        self.grow(Growing::Arena, bound.plan().arena().bytes())?;
        self.grow(Growing::Step, StepBlock::bytes_for(bound.plan().key()))
    }

    fn run_op(
        &mut self,
        bound: &Bound,
        index: usize,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<()> {
        self.lower(bound, step, kv)?;
        self.send(step)?;
        // Those of all ops together are other launches (link).
        if self.plans[&bound.id()].ops.is_empty() {
            let lists = self.launches_of(bound, step, kv)?;
            let ops = lists.iter().map(|list| self.ready(list));
            let ops = ops.collect::<Result<_>>()?;
            let lowered = self.plans.get_mut(&bound.id());
            lowered.expect("the plan was lowered").ops = ops;
        }
        self.launch(bound.id(), Some(index))
    }

    fn values(&mut self, bound: &Bound, slot: Slot) -> Result<&[f32]> {
        check_dtype(bound, slot, DType::F32)?;
        Ok(bytemuck::cast_slice(self.fetch(bound, slot)?))
    }

    fn integers(&mut self, bound: &Bound, slot: Slot) -> Result<&[i32]> {
        check_dtype(bound, slot, DType::I32)?;
        Ok(bytemuck::cast_slice(self.fetch(bound, slot)?))
    }

    fn arena_bytes(&self) -> usize {
        self.arena.bytes()
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }

    fn write(&mut self, bound: &Bound, slot: Slot, values: &[f32]) -> Result<()> {
        check_values(bound, slot, DType::F32, values.len())?;
        self.put(bound, slot, bytemuck::cast_slice(values))
    }

    fn write_integers(&mut self, bound: &Bound, slot: Slot, values: &[i32]) -> Result<()> {
        check_values(bound, slot, DType::I32, values.len())?;
        self.put(bound, slot, bytemuck::cast_slice(values))
    }

    fn run(&mut self, bound: &Bound, step: &StepBlock, kv: &mut KvBuffers) -> Result<()> {
        super::check_key(bound, step)?;
        self.lower(bound, step, kv)?;
        self.send(step)?;
        self.launch(bound.id(), None)
    }

    fn profile(
        &mut self,
        bound: &Bound,
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<Vec<PartTime>> {
        super::check_key(bound, step)?;
        self.lower(bound, step, kv)?;
        self.send(step)?;
        let device = self.gpu.device();
        let times = time_each(device, &self.plans[&bound.id()].launches).map_err(Error::Gpu);
        self.wait()?;
        times
    }
}

/// Runs launches one after the other between two events each.
fn time_each(device: &Device, launches: &[ReadyLaunch]) -> exl_kernels::Result<Vec<PartTime>> {
    let events = (0..=launches.len()).map(|_| Event::new(device));
    let events: Vec<Event> = events.collect::<exl_kernels::Result<_>>()?;
    let stream = device.stream();
    stream.record(&events[0])?;
    for (launch, event) in launches.iter().zip(&events[1..]) {
        stream.launch(launch, false)?;
        stream.record(event)?;
    }
    stream.synchronize()?;
    let pairs = launches.iter().zip(events.windows(2));
    pairs
        .map(|(launch, pair)| {
            Ok(PartTime {
                name: launch.kernel().entry,
                seconds: f64::from(pair[1].elapsed_ms(&pair[0])?) / 1e3,
            })
        })
        .collect()
}

/// The memory of one plan's operands.
pub(super) struct Space<'a> {
    pub(super) arena: &'a DeviceRegion,
    pub(super) step: &'a DeviceRegion,
}

impl Arena for Space<'_> {
    fn region(&self, offset: usize, bytes: usize, dtype: DType) -> Mem<'_> {
        self.arena
            .mem(offset, bytes, dtype)
            .expect("the arena was prepared for the plan")
    }

    unsafe fn region_mut(&self, offset: usize, bytes: usize, dtype: DType) -> MemMut<'_> {
        // SAFETY: the caller's promise.
        unsafe { self.arena.mem_mut(offset, bytes, dtype) }
            .expect("the arena was prepared for the plan")
    }

    fn step<'a>(&'a self, step: &'a StepBlock, field: StepField) -> Mem<'a> {
        let (offset, bytes) = step.range(field);
        self.step
            .mem(offset, bytes, field.dtype())
            .expect("the step block was prepared for the plan")
    }
}
