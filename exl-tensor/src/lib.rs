#![doc = include_str!("../README.md")]

mod arena;
mod buffer;
mod cost;
mod error;
mod exec;
mod gpu;
mod kv;
mod plan;
mod step;
mod weight;

pub use arena::{ARENA_ALIGN, ArenaLayout};
pub use buffer::{Buffer, HostMemory};
pub use cost::{Cost, CostReport, OpCost};
pub use error::{Error, Result};
pub use exec::{
    Bound, CheckReport, CudaExecutor, CudaOptions, Executor, GpuSketch, HostExecutor, PartTime,
    PlanMemory, Side, SlotDiff, check,
};
/// The cases every implementation of the ops must pass, for self-tests.
pub use exl_kernels::conformance;
pub use exl_kernels::cpu::{Activations, Cpu, CpuOptions, Isa};
/// GPUs that the driver sees, and what one is.
pub use exl_kernels::cuda::{DeviceInfo, DeviceProps, probe};
pub use exl_kernels::ops::{
    Activation, PAGE_TOKENS, RopeStyle, RouteNorm, SAMPLE_WORDS, SampleParams,
};
pub use exl_kernels::{DType, Exl2Parts, GptqParts, Group, KeyHeads, KvFormat, KvType};
pub use gpu::{Gpu, GpuPart, GpuTaken, gpu_kernels};
pub use kv::{KvBuffers, KvPages, KvShape, SlidingLayers, least_window_pages};
pub use plan::{
    AttnArgs, GateUpArgs, MoeDownOp, MoeGateUpOp, MoeRouteOp, Part, Phase, Plan, PlanAdapter,
    PlanBuilder, PlanExtras, PlanKey, PlanOp, RopeArgs, Routing, RowScales, RowSet, SampleShape,
    Slot, SlotInfo, WeightId, WeightInfo,
};
pub use step::{StepBlock, StepDraw, StepExtras, StepField, StepSeq};
pub use weight::{DenseWeight, QuantKind, QuantWeight, Weight, Weights};
