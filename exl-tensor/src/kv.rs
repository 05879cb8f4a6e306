//! Storage of the paged KV cache; which page belongs to whom is decided elsewhere.

use exl_kernels::cuda::DeviceRegion;
use exl_kernels::{DType, KvType, Mem, MemMut};

use crate::{Error, Gpu, GpuPart, HostMemory, Result};

mod centers;
mod transfer;
mod window;

pub use window::{KvPages, SlidingLayers, least_window_pages};

/// Shape of a model's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Attention layers. In the cache those that see everything come first.
    pub layers: usize,
    /// Those that see a window only, the last ones.
    pub sliding: SlidingLayers,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Storage of keys and values.
    pub kv: KvType,
}

impl KvShape {
    /// Bytes of one page of K and of V in one layer.
    pub fn page_bytes(&self) -> (usize, usize) {
        let (heads, dim) = (self.kv_heads, self.head_dim);
        let k = self.kv.k.key_page_bytes(heads, dim);
        (k, self.kv.v.page_bytes(heads, dim))
    }

    /// Bytes of these pages over all layers, K and V, and of the centers that keys of Q4 are appended with.
    pub fn bytes(&self, pages: impl Into<KvPages>) -> usize {
        let pages = pages.into();
        let full = self.layer_bytes(self.full_layers(), pages.all);
        full.saturating_add(self.layer_bytes(self.sliding.layers, pages.of_sliding()))
            .saturating_add(self.centers(pages.all).unwrap_or(0))
    }

    /// Bytes of `pages` pages of so many layers, K and V.
    fn layer_bytes(&self, layers: usize, pages: usize) -> usize {
        let (k, v) = self.page_bytes();
        product(&[layers, pages, k.saturating_add(v)])
    }

    /// Bytes one token takes over all layers, as long as all of them keep it; without centers of keys.
    pub fn token_bytes(&self) -> usize {
        product(&[
            self.layers,
            self.kv.token_bytes(self.kv_heads, self.head_dim),
        ])
    }

    /// That heads of this size can be stored so.
    fn check(&self) -> Result<()> {
        if self.kv.is_sound()
            && [self.kv.k, self.kv.v]
                .iter()
                .all(|f| f.takes(self.head_dim))
        {
            return Ok(());
        }
        Err(Error::Step(format!(
            "a cache of {} does not take heads of {} values",
            self.kv, self.head_dim
        )))
    }
}

/// `usize::MAX`, which no machine has, stands for all that is larger.
fn product(factors: &[usize]) -> usize {
    factors.iter().fold(1, |n, &f| n.saturating_mul(f))
}

/// Memory of K or V of one layer, or of all centers.
#[derive(Debug)]
enum Half {
    Host(HostMemory),
    Gpu(DeviceRegion),
}

/// K and V of every layer: `[pages, PAGE_TOKENS, kv_heads, head_dim]` each, or pages of as many
/// codes and scales, and of keys the centers of a page. Sliding layers may have pages of their own ([`KvPages::window`]).
#[derive(Debug)]
pub struct KvBuffers {
    shape: KvShape,
    pages: KvPages,
    layers: Vec<(Half, Half)>,
    /// Of all layers: `[layers, pages, kv_heads, head_dim]`.
    centers: Option<Half>,
    gpu: Option<Gpu>,
}

impl KvBuffers {
    /// Allocates pages in host memory; a number stands for as many pages of every layer.
    ///
    /// # Errors
    /// Out of memory; [`Error::Step`] when heads of this size cannot be stored so.
    pub fn new(shape: KvShape, pages: impl Into<KvPages>) -> Result<Self> {
        let pages = pages.into();
        shape.check()?;
        let (k, v) = shape.page_bytes();
        let one = |layer: usize, page: usize| {
            let bytes = product(&[pages.of_layer(&shape, layer), page]);
            HostMemory::zeroed(bytes, "the KV cache").map(Half::Host)
        };
        let layers = (0..shape.layers)
            .map(|l| Ok((one(l, k)?, one(l, v)?)))
            .collect::<Result<_>>()?;
        let centers = shape.centers(pages.all);
        let centers = centers.map(|bytes| HostMemory::zeroed(bytes, "centers of the KV cache"));
        Ok(Self {
            shape,
            pages,
            layers,
            centers: centers.transpose()?.map(Half::Host),
            gpu: None,
        })
    }

    /// Allocates pages on a GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] when its memory does not suffice, and as [`KvBuffers::new`].
    pub fn on_gpu(gpu: &Gpu, shape: KvShape, pages: impl Into<KvPages>) -> Result<Self> {
        let pages = pages.into();
        shape.check()?;
        let (k, v) = shape.page_bytes();
        let bytes = shape.bytes(pages);
        let all = gpu.metered(GpuPart::Cache, || {
            DeviceRegion::zeroed(gpu.device(), bytes, "the KV cache").map_err(Error::Gpu)
        })?;
        let mut at = 0;
        let mut part = |bytes: usize| {
            at += bytes;
            all.part(at - bytes, bytes)
                .map(Half::Gpu)
                .map_err(Error::Gpu)
        };
        let layers = (0..shape.layers)
            .map(|l| {
                let pages = pages.of_layer(&shape, l);
                Ok((part(pages * k)?, part(pages * v)?))
            })
            .collect::<Result<_>>()?;
        let centers = shape.centers(pages.all);
        let centers = centers.map(&mut part).transpose()?;
        Ok(Self {
            shape,
            pages,
            layers,
            centers,
            gpu: Some(gpu.clone()),
        })
    }

    /// A cache on a GPU that is not there, of which only sizes are asked.
    ///
    /// # Errors
    /// [`Error::Step`] when heads of this size cannot be stored so.
    ///
    /// # Safety
    /// Nothing may read or write it.
    pub(crate) unsafe fn unbacked(shape: KvShape, pages: KvPages) -> Result<Self> {
        shape.check()?;
        let (k, v) = shape.page_bytes();
        let half = |layer: usize, page: usize| {
            let bytes = product(&[pages.of_layer(&shape, layer), page]);
            // SAFETY: the caller's promise.
            unsafe { Half::Gpu(DeviceRegion::unbacked(bytes)) }
        };
        let layers = (0..shape.layers)
            .map(|l| (half(l, k), half(l, v)))
            .collect();
        let centers = shape.centers(pages.all);
        // SAFETY: the caller's promise.
        let centers = centers.map(|bytes| unsafe { Half::Gpu(DeviceRegion::unbacked(bytes)) });
        Ok(Self {
            shape,
            pages,
            layers,
            centers,
            gpu: None,
        })
    }

    /// The shape it was made with.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Pages.
    pub fn pages(&self) -> KvPages {
        self.pages
    }

    /// Whether a layer has pages of its own: the step's window pages.
    pub(crate) fn has_window_pages(&self, layer: usize) -> bool {
        self.pages.window.is_some() && layer >= self.shape.full_layers()
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

    /// K and V of a layer for reading.
    pub(crate) fn read(&self, layer: usize) -> (Mem<'_>, Mem<'_>) {
        let kv = self.shape.kv;
        let (k, v) = &self.layers[layer];
        (k.mem(kv.k.dtype()), v.mem(kv.v.dtype()))
    }

    /// K and V of a layer for writing, and the centers of its keys.
    pub(crate) fn write(&mut self, layer: usize) -> (MemMut<'_>, MemMut<'_>, Mem<'_>) {
        let kv = self.shape.kv;
        let (k, v) = &self.layers[layer];
        // SAFETY: none of the three overlap, and `&mut self` excludes any other region.
        let (k, v) = unsafe { (k.mem_mut(kv.k.dtype()), v.mem_mut(kv.v.dtype())) };
        (k, v, self.centers(layer))
    }
}

impl Half {
    fn mem(&self, dtype: DType) -> Mem<'_> {
        match self {
            Half::Host(memory) => self.part(0, memory.bytes(), dtype),
            Half::Gpu(region) => self.part(0, region.bytes(), dtype),
        }
    }

    fn part(&self, at: usize, bytes: usize, dtype: DType) -> Mem<'_> {
        match self {
            Half::Host(memory) => memory.mem(at, bytes, dtype),
            Half::Gpu(region) => region
                .mem(at, bytes, dtype)
                .expect("parts of the cache are aligned"),
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
                    .expect("parts of the cache are aligned"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use exl_kernels::KvFormat;
    use exl_kernels::ops::PAGE_TOKENS;

    use super::*;

    fn shape(kv: KvType, head_dim: usize) -> KvShape {
        KvShape {
            layers: 2,
            sliding: Default::default(),
            kv_heads: 3,
            head_dim,
            kv,
        }
    }

    #[test]
    fn bytes_are_those_of_the_formats() {
        let mixed = KvType {
            k: KvFormat::Q8,
            v: KvFormat::Q4,
        };
        for (kv, bits) in [
            (KvType::F32, 64.0),
            (KvType::F16, 32.0),
            (KvType::Q8, 17.0),
            (KvType::Q6, 13.0),
            (KvType::Q4, 9.0),
            (mixed, 13.0),
        ] {
            let shape = shape(kv, 128);
            let token = (2.0 * 3.0 * 128.0 * bits / 8.0) as usize;
            assert_eq!(shape.token_bytes(), token, "{kv}");
            // Centers in a page and of its number.
            let centers = if kv == KvType::Q4 {
                2 * 2 * 3 * 128 * 2
            } else {
                0
            };
            assert_eq!(shape.bytes(5), 5 * (PAGE_TOKENS * token + centers));
            assert_eq!(KvBuffers::new(shape, 5).unwrap().bytes(), shape.bytes(5));
        }
        assert!(KvBuffers::new(shape(KvType::Q4, 33), 1).is_err());
        let unsound = KvType {
            k: KvFormat::F16,
            v: KvFormat::Q4,
        };
        assert!(KvBuffers::new(shape(unsound, 64), 1).is_err());
    }

    #[test]
    fn pages_are_copied_whole_in_both_widths() {
        let kv = KvType {
            k: KvFormat::Q6,
            v: KvFormat::Q4,
        };
        let mut cache = KvBuffers::new(shape(kv, 80), 3).unwrap();
        let (k_page, v_page) = cache.shape().page_bytes();
        for layer in 0..2 {
            let (mut k, mut v, _) = cache.write(layer);
            for (half, page) in [(&mut k, k_page), (&mut v, v_page)] {
                for (i, byte) in half.slice_mut::<u8>().unwrap().iter_mut().enumerate() {
                    *byte = (i * 7 + i / page + layer) as u8;
                }
            }
        }
        let alike = |cache: &KvBuffers, page: usize| {
            (0..2).all(|layer| {
                let (k, v) = cache.read(layer);
                [(k, k_page), (v, v_page)].iter().all(|(half, bytes)| {
                    let all = half.slice::<u8>().unwrap();
                    assert_eq!(all.len(), 3 * bytes);
                    all[page * bytes..][..*bytes] == all[..*bytes]
                })
            })
        };
        assert!(!alike(&cache, 1) && !alike(&cache, 2));
        cache.copy_page(0, 2).unwrap();
        assert!(!alike(&cache, 1) && alike(&cache, 2));
        let mut content = vec![0; cache.page_bytes()];
        cache.read_page(2, &mut content).unwrap();
        cache.write_page(1, &content).unwrap();
        assert!(alike(&cache, 1) && alike(&cache, 2));
    }
}
