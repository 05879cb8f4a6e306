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
        Ok(Self(Arc::new(Shared {
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
        let reserved = loader.pool.reserve(&self.0.device, bytes as usize);
        reserved.map_err(Error::Gpu)
    }

    /// Copies a weight to the GPU.
    ///
    /// # Errors
    /// [`Error::Weight`] naming it: out of device memory, what the driver reports.
    pub fn upload(&self, name: &str, weight: &Weight) -> Result<Weight> {
        let mut loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        weight.copied(&mut Named {
            name,
            device: &self.0.device,
            loader: &mut loader,
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
    pub fn finish_loading(&self) {
        let mut loader = self.0.loader.lock().unwrap_or_else(PoisonError::into_inner);
        loader.uploader.finish();
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
