//! Running ops on NVIDIA GPUs through the driver alone.
//!
//! [`lower`] turns an op into [`Launch`]es, plain data that depend on shapes, addresses and
//! [`DeviceProps`] only. A [`Device`] looks their kernels up in the embedded [`Pack`] and launches
//! them on a [`Stream`], one by one or captured as a [`Graph`].

mod device;
mod driver;
mod graph;
mod launch;
mod lower;
mod matrix;
mod memory;
mod pack;
mod props;
mod quantizer;
mod run;
mod stream;

pub use device::{Device, FunctionInfo};
pub use driver::{DeviceInfo, probe};
pub use graph::Graph;
pub use launch::{Args, Kernel, Launch, MAX_ARGS};
pub use lower::{COUNTERS, Scratch, Target, kernels, link, lower, scratch_bytes, table_bytes};
pub use matrix::{CudaMatrix, MatrixShape, MatrixUploader};
pub use memory::{DeviceMemory, DevicePool, DeviceRegion, PinnedMemory};
pub use pack::Pack;
pub use props::DeviceProps;
pub use quantizer::{CudaQuantizer, DeviceCodes, DeviceFactor, DeviceMatrix, HostCodes};
pub use run::{CoverPlace, CudaOps, RunOptions, covering};
pub use stream::{Event, ReadyLaunch, Stream};
