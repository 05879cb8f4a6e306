//! Storage of the paged KV cache; which page belongs to whom is decided elsewhere.

use exl_kernels::cuda::DeviceRegion;
use exl_kernels::ops::PAGE_TOKENS;
use exl_kernels::{DType, Mem, MemMut};

use crate::{Error, Gpu, GpuPart, HostMemory, Result};

mod transfer;

/// Shape of a model's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Attention layers.
    pub layers: usize,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// F16 or F32.
    pub dtype: DType,
}

impl KvShape {
    /// Bytes of one page of one of K or V in one layer.
    pub fn page_bytes(&self) -> usize {
        product(&[
            PAGE_TOKENS,
            self.kv_heads,
            self.head_dim,
            self.dtype.bytes(),
        ])
    }

    /// Bytes of `pages` pages over all layers, K and V.
    pub fn bytes(&self, pages: usize) -> usize {
        product(&[2, self.layers, pages, self.page_bytes()])
    }
}

/// `usize::MAX`, which no machine has, stands for all that is larger.
fn product(factors: &[usize]) -> usize {
    factors.iter().fold(1, |n, &f| n.saturating_mul(f))
}

/// Memory of K or V of one layer.
#[derive(Debug)]
enum Half {
    Host(HostMemory),
    Gpu(DeviceRegion),
}

/// K and V of every layer: `[pages, PAGE_TOKENS, kv_heads, head_dim]` each.
#[derive(Debug)]
pub struct KvBuffers {
    shape: KvShape,
    pages: usize,
    layers: Vec<(Half, Half)>,
    gpu: Option<Gpu>,
}

impl KvBuffers {
    /// Allocates `pages` pages in host memory.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(shape: KvShape, pages: usize) -> Result<Self> {
        let bytes = pages * shape.page_bytes();
        let one = || HostMemory::zeroed(bytes, "the KV cache").map(Half::Host);
        let layers = (0..shape.layers)
            .map(|_| Ok((one()?, one()?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            pages,
            layers,
            gpu: None,
        })
    }

    /// Allocates `pages` pages on a GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] when its memory does not suffice.
    pub fn on_gpu(gpu: &Gpu, shape: KvShape, pages: usize) -> Result<Self> {
        let half = pages * shape.page_bytes();
        let bytes = shape.bytes(pages);
        let all = gpu.metered(GpuPart::Cache, || {
            DeviceRegion::zeroed(gpu.device(), bytes, "the KV cache").map_err(Error::Gpu)
        })?;
        let part = |i: usize| all.part(i * half, half).map(Half::Gpu).map_err(Error::Gpu);
        let layers = (0..shape.layers)
            .map(|l| Ok((part(2 * l)?, part(2 * l + 1)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            pages,
            layers,
            gpu: Some(gpu.clone()),
        })
    }

    /// The shape it was made with.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.shape.bytes(self.pages)
    }

    /// Tells one cache from another: launches that were made for one are of no use with the next.
    pub(crate) fn identity(&self) -> usize {
        self.layers.first().map_or(0, |(k, _)| match k {
            Half::Host(memory) => memory.mem(0, 0, DType::U8).as_ptr().addr(),
            Half::Gpu(region) => region.address() as usize,
        })
    }

    /// Copies one page in every layer (copy on write).
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// When a page id is out of range.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<()> {
        assert!(from.max(to) < self.pages, "pages {from} and {to}");
        let bytes = self.shape.page_bytes();
        for half in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            match half {
                Half::Host(memory) => memory.copy_within(from * bytes, to * bytes, bytes),
                Half::Gpu(region) if from != to => {
                    let gpu = self.gpu.as_ref().expect("the cache was made on a GPU");
                    let stream = gpu.device().stream();
                    stream
                        .copy((region, to * bytes), (region, from * bytes), bytes)
                        .map_err(Error::Gpu)?;
                }
                Half::Gpu(_) => {}
            }
        }
        Ok(())
    }

    /// K and V of a layer for reading.
    pub(crate) fn read(&self, layer: usize) -> (Mem<'_>, Mem<'_>) {
        let dtype = self.shape.dtype;
        let (k, v) = &self.layers[layer];
        (k.mem(dtype), v.mem(dtype))
    }

    /// K and V of a layer for writing.
    pub(crate) fn write(&mut self, layer: usize) -> (MemMut<'_>, MemMut<'_>) {
        let dtype = self.shape.dtype;
        let (k, v) = &self.layers[layer];
        // SAFETY: K and V do not overlap and `&mut self` excludes any other region.
        unsafe { (k.mem_mut(dtype), v.mem_mut(dtype)) }
    }
}

impl Half {
    fn mem(&self, dtype: DType) -> Mem<'_> {
        match self {
            Half::Host(memory) => memory.mem(0, memory.bytes(), dtype),
            Half::Gpu(region) => region
                .mem(0, region.bytes(), dtype)
                .expect("halves of the cache are aligned"),
        }
    }

    /// # Safety
    /// No other region of this memory may be in use.
    unsafe fn mem_mut(&self, dtype: DType) -> MemMut<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Half::Host(memory) => memory.mem_mut(0, memory.bytes(), dtype),
                Half::Gpu(region) => region
                    .mem_mut(0, region.bytes(), dtype)
                    .expect("halves of the cache are aligned"),
            }
        }
    }
}
