//! A GPU and the weights on it.

use std::sync::{Arc, Mutex, PoisonError};

use exl_kernels::QuantMatrix;
use exl_kernels::cuda::{
    CudaMatrix, Device, DevicePool, DeviceProps, DeviceRegion, Event, MatrixUploader, Pack,
};

use crate::weight::Upload;
use crate::{Error, Result, Weight};

/// Size of the copies that measure the memory, far beyond any cache, and their number: the first
/// ones run before the clocks are up.
const COPY_BYTES: usize = 1 << 30;
const COPIES: usize = 50;

/// What the GPU kernels inside this program were compiled by and for.
///
/// # Errors
/// [`Error::Gpu`] when it was built without them.
pub fn gpu_kernels() -> Result<String> {
    Ok(Pack::load().map_err(Error::Gpu)?.describe())
}

/// A GPU that weights, caches and executors live on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gpu(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    device: Arc<Device>,
    loader: Mutex<Loader>,
    /// Taken once the GPU was open, by whomever.
    context: i64,
    /// By [`GpuPart`].
    taken: Mutex<[i64; PARTS]>,
}

/// What device memory is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuPart {
    /// Weights, and the memory that holds one while it is repacked.
    Weights,
    /// The KV cache.
    Cache,
    /// The arena.
    Activations,
    /// Scratch memory of kernels.
    Scratch,
    /// The step block, counters and tables of kernels.
    Step,
    /// Captured decode steps.
    Graphs,
}

const PARTS: usize = 6;

/// Device memory that was taken, in bytes: how far the driver's figure of free memory fell while each
/// part was allocated. It gives memory out in pages of 2 MiB; programs that take or free some
/// meanwhile are counted as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuTaken {
    /// The driver's context, with all that other programs and the driver had taken before.
    pub context: i64,
    /// Code of the kernels that were used.
    pub kernels: i64,
    /// See [`GpuPart`].
    pub weights: i64,
    /// See [`GpuPart`].
    pub cache: i64,
    /// See [`GpuPart`].
    pub activations: i64,
    /// See [`GpuPart`].
    pub scratch: i64,
    /// See [`GpuPart`].
    pub step: i64,
    /// See [`GpuPart`].
    pub graphs: i64,
    /// All that is not free now, less the parts above: allocations that the driver made by itself
    /// while work ran.
    pub rest: i64,
}

/// Where weights go.
#[derive(Debug)]
struct Loader {
    pool: DevicePool,
    uploader: MatrixUploader,
}

impl Gpu {
    /// Opens the GPU with this ordinal.
    ///
    /// # Errors
    /// [`Error::Gpu`]: no driver, one that is too old, no such GPU.
    pub fn open(ordinal: u32) -> Result<Self> {
        let device = Device::open(ordinal).map_err(Error::Gpu)?;
        let (free, total) = device.memory().map_err(Error::Gpu)?;
        Ok(Self(Arc::new(Shared {
            context: (total - free).cast_signed() - device.kernel_bytes(),
            taken: Mutex::new([0; PARTS]),
            device,
            loader: Mutex::new(Loader {
                pool: DevicePool::new("weights"),
                uploader: MatrixUploader::new(),
            }),
        })))
    }

    /// What kernels are selected by.
    pub fn props(&self) -> &DeviceProps {
        self.0.device.props()
    }

    /// The device itself.
    pub fn device(&self) -> &Arc<Device> {
        &self.0.device
    }

    /// Free and all bytes of its memory.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.0.device.memory().map_err(Error::Gpu)
    }

    /// What its memory is taken for.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn taken(&self) -> Result<GpuTaken> {
        let (free, total) = self.memory()?;
        let taken = *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let part = |part: GpuPart| taken[part as usize];
        let (context, kernels) = (self.0.context, self.0.device.kernel_bytes());
        let known = context + kernels + taken.iter().sum::<i64>();
        Ok(GpuTaken {
            context,
            kernels,
            weights: part(GpuPart::Weights),
            cache: part(GpuPart::Cache),
            activations: part(GpuPart::Activations),
            scratch: part(GpuPart::Scratch),
            step: part(GpuPart::Step),
            graphs: part(GpuPart::Graphs),
            rest: (total - free).cast_signed() - known,
        })
    }

    /// Bytes taken for weights that stay, and bytes of those that hold some.
    pub fn weight_memory(&self) -> (u64, u64) {
        let loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        (loader.pool.allocated() as u64, loader.pool.used() as u64)
    }

    /// Loads every kernel that this GPU can run, also those that nothing uses yet.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn load_kernels(&self) -> Result<()> {
        let device = &self.0.device;
        let mut all = device.kernels().map(|kernel| device.function_info(kernel));
        all.try_for_each(|info| info.map(drop)).map_err(Error::Gpu)
    }

    /// Runs what takes or frees device memory for a part; kernels loaded meanwhile are not its.
    pub(crate) fn metered<T>(&self, part: GpuPart, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let device = &self.0.device;
        let now = || -> Result<i64> {
            let (free, _) = self.memory()?;
            Ok(free.cast_signed() + device.kernel_bytes())
        };
        let before = now()?;
        // What failed may have freed something before.
        let done = run();
        let taken = before - now()?;
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)[part as usize] += taken;
        done
    }

    /// Bytes per second that a copy within the device's memory reads and writes together.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn memory_bandwidth(&self) -> Result<f64> {
        let (free, _) = self.memory()?;
        self.copy_speed(COPY_BYTES.min(free as usize / 4))
            .map_err(Error::Gpu)
    }

    fn copy_speed(&self, bytes: usize) -> exl_kernels::Result<f64> {
        let device = &self.0.device;
        let region = || DeviceRegion::zeroed(device, bytes, "measuring the memory");
        let (from, to) = (region()?, region()?);
        let (begin, end) = (Event::new(device)?, Event::new(device)?);
        let stream = device.stream();
        let mut best = 0.0f64;
        for _ in 0..COPIES {
            stream.record(&begin)?;
            stream.copy((&to, 0), (&from, 0), bytes)?;
            stream.record(&end)?;
            stream.synchronize()?;
            let seconds = f64::from(end.elapsed_ms(&begin)?) / 1e3;
            best = best.max(2.0 * bytes as f64 / seconds);
        }
        Ok(best)
    }

    /// Makes room for weights of so many bytes together, which then leave nothing unused.
    ///
    /// # Errors
    /// [`Error::Gpu`]: out of device memory.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        self.metered(GpuPart::Weights, || {
            let reserved = loader.pool.reserve(&self.0.device, bytes as usize);
            reserved.map_err(Error::Gpu)
        })
    }

    /// Copies a weight to the GPU.
    ///
    /// # Errors
    /// [`Error::Weight`] naming it: out of device memory, what the driver reports.
    pub fn upload(&self, name: &str, weight: &Weight) -> Result<Weight> {
        let mut loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        self.metered(GpuPart::Weights, || {
            weight.copied(&mut Named {
                name,
                device: &self.0.device,
                loader: &mut loader,
            })
        })
    }

    /// Copies a weight to memory of its own on the GPU, which is free again as soon as the weight is
    /// dropped: for weights that come and go.
    ///
    /// # Errors
    /// As [`Gpu::upload`].
    pub fn upload_alone(&self, name: &str, weight: &Weight) -> Result<Weight> {
        weight.copied(&mut Named {
            name,
            device: &self.0.device,
            loader: &mut Loader {
                pool: DevicePool::with_chunk_bytes(name, 1),
                uploader: MatrixUploader::new(),
            },
        })
    }

    /// Frees what only loading needs.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn finish_loading(&self) -> Result<()> {
        let mut loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        self.metered(GpuPart::Weights, || {
            loader.uploader.finish();
            Ok(())
        })
    }
}

/// Brings the parts of one weight to the GPU.
struct Named<'a> {
    name: &'a str,
    device: &'a Device,
    loader: &'a mut Loader,
}

impl Named<'_> {
    fn failed(&self) -> impl FnOnce(exl_kernels::Error) -> Error + use<> {
        let name = self.name.to_owned();
        |source| Error::Weight { name, source }
    }
}

impl Upload for Named<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<DeviceRegion> {
        let region = self.loader.pool.take(self.device, bytes.len());
        let region = region.map_err(self.failed())?;
        let copied = self.device.copy_in(&region, 0, bytes);
        copied.map_err(self.failed())?;
        Ok(region)
    }

    fn matrix(&mut self, matrix: &QuantMatrix) -> Result<CudaMatrix> {
        let Loader { pool, uploader } = &mut *self.loader;
        let uploaded = uploader.upload(self.device, pool, matrix);
        uploaded.map_err(self.failed())
    }
}
