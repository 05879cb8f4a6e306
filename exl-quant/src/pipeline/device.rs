//! Where a conversion computes: executors, caches and weights on the CPU or on a GPU.

use std::sync::Arc;

use exl_kernels::cuda::DeviceRegion;
use exl_tensor::{
    Activations, Bound, Buffer, Cpu, CpuOptions, CudaExecutor, CudaOptions, DType, Executor, Gpu,
    HostExecutor, KvBuffers, KvShape, Plan, Slot, StepBlock, Weight, Weights,
};

use super::ConvertOptions;
use crate::Result;

/// The CPU with a number of threads, or a GPU.
#[derive(Clone, Debug)]
pub(super) enum Device {
    Cpu(usize),
    Gpu(Gpu),
}

impl Device {
    pub(super) fn of(options: &ConvertOptions) -> Self {
        Self::new(options.threads, options.gpu.as_ref())
    }

    /// A GPU, or without one the CPU with `threads` threads, 0 for all.
    pub(super) fn new(threads: usize, gpu: Option<&Gpu>) -> Self {
        match gpu {
            Some(gpu) => Device::Gpu(gpu.clone()),
            None => Device::Cpu(threads),
        }
    }

    /// An executor that keeps `plans` plans ready.
    pub(super) fn engine(&self, plans: usize) -> Result<Engine> {
        match self {
            Device::Cpu(threads) => Ok(Engine::Cpu(HostExecutor::cpu(Cpu::new(CpuOptions {
                threads: *threads,
                isa: None,
                activations: Activations::Exact16,
            }))?)),
            Device::Gpu(gpu) => {
                let mut executor = CudaExecutor::new(gpu, CudaOptions::default())?;
                executor.keep(plans);
                Ok(Engine::Gpu(executor))
            }
        }
    }

    /// A cache.
    pub(super) fn kv(&self, shape: KvShape, pages: usize) -> Result<KvBuffers> {
        Ok(match self {
            Device::Cpu(_) => KvBuffers::new(shape, pages)?,
            Device::Gpu(gpu) => KvBuffers::on_gpu(gpu, shape, pages)?,
        })
    }

    /// A plan with its weights, brought to the GPU if there is one. They leave it with the plan.
    pub(super) fn bind(&self, plan: Plan, weights: &Weights) -> Result<Bound> {
        let Device::Gpu(gpu) = self else {
            return Ok(Bound::new(Arc::new(plan), weights)?);
        };
        let mut placed = Weights::new();
        let needed = plan.weights().iter().map(|info| info.name.as_str());
        // What is missing is told below.
        let needed: Vec<(&str, &Arc<Weight>)> = needed
            .filter_map(|name| Some((name, weights.get(name)?)))
            .collect();
        let mixed = mixed(needed.iter().map(|(_, weight)| &***weight));
        for (name, weight) in needed {
            let weight = match mixed && weight.shape().len() == 2 {
                true => gpu.upload_alone(name, &wide(name, weight)?)?,
                false => gpu.upload_alone(name, weight)?,
            };
            placed.insert(name, weight);
        }
        Ok(Bound::new(Arc::new(plan), &placed)?)
    }
}

/// Whether matrices have different element types, as when some are quantized and decoded: ops take
/// several matrices of one type.
fn mixed<'a>(weights: impl Iterator<Item = &'a Weight>) -> bool {
    let dtype = |w: &Weight| match w {
        Weight::Dense(d) if w.shape().len() == 2 => Some(d.dtype()),
        _ => None,
    };
    let types: Vec<DType> = weights.filter_map(dtype).collect();
    types.windows(2).any(|t| t[0] != t[1])
}

/// A dense weight in F32.
fn wide(name: &str, weight: &Weight) -> Result<Weight> {
    let data = Buffer::from_vec(weight.to_f32(name)?);
    Ok(Weight::dense(name, DType::F32, &weight.shape(), data)?)
}

/// An executor on either device.
#[derive(Debug)]
pub(super) enum Engine {
    Cpu(HostExecutor),
    Gpu(CudaExecutor),
}

impl Engine {
    fn executor(&mut self) -> &mut dyn Executor {
        match self {
            Engine::Cpu(executor) => executor,
            Engine::Gpu(executor) => executor,
        }
    }

    /// Fills inputs by slot and runs a plan.
    pub(super) fn run(
        &mut self,
        bound: &Bound,
        inputs: &[(Slot, &[f32])],
        step: &StepBlock,
        kv: &mut KvBuffers,
    ) -> Result<()> {
        let executor = self.executor();
        executor.prepare(bound)?;
        for (slot, values) in inputs {
            executor.write(bound, *slot, values)?;
        }
        Ok(executor.run(bound, step, kv)?)
    }

    /// A slot's values on the host.
    pub(super) fn values(&mut self, bound: &Bound, slot: Slot) -> Result<&[f32]> {
        Ok(self.executor().values(bound, slot)?)
    }

    /// A slot's values on the GPU.
    fn region(&self, bound: &Bound, slot: Slot) -> Result<Option<DeviceRegion>> {
        match self {
            Engine::Cpu(_) => Ok(None),
            Engine::Gpu(executor) => Ok(Some(executor.region(bound, slot)?)),
        }
    }
}

/// One slot of a plan that has just run.
#[derive(Debug)]
pub(super) struct Tap<'a> {
    pub(super) engine: &'a mut Engine,
    pub(super) bound: &'a Bound,
    pub(super) slot: Slot,
}

impl Tap<'_> {
    /// The values on the host.
    pub(super) fn values(&mut self) -> Result<&[f32]> {
        self.engine.values(self.bound, self.slot)
    }

    /// The integers of a slot that holds such, on the host.
    pub(super) fn integers(&mut self) -> Result<&[i32]> {
        Ok(self.engine.executor().integers(self.bound, self.slot)?)
    }

    /// The values on the GPU, if they are there.
    pub(super) fn region(&self) -> Result<Option<DeviceRegion>> {
        self.engine.region(self.bound, self.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_different_types_are_told() {
        let weight = |dtype: DType, shape: &[usize]| {
            let bytes = shape.iter().product::<usize>() * dtype.bytes();
            Weight::dense("w", dtype, shape, Buffer::from_slice(&vec![0u8; bytes])).unwrap()
        };
        let (norm, a) = (weight(DType::F32, &[4]), weight(DType::Bf16, &[4, 4]));
        let b = weight(DType::F32, &[4, 4]);
        assert!(!mixed([&norm, &a, &a].into_iter()));
        assert!(mixed([&norm, &a, &b].into_iter()));
        assert_eq!(wide("w", &a).unwrap().bytes(), 64);
    }
}
