//! Storage of the paged KV cache; which page belongs to whom is decided elsewhere.

use exl_kernels::ops::PAGE_TOKENS;
use exl_kernels::{DType, Mem, MemMut};

use crate::{HostMemory, Result};

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

/// K and V of every layer: `[pages, PAGE_TOKENS, kv_heads, head_dim]` each. Page 0 takes the
/// writes of pad rows.
#[derive(Debug)]
pub struct KvBuffers {
    shape: KvShape,
    pages: usize,
    layers: Vec<(HostMemory, HostMemory)>,
}

impl KvBuffers {
    /// Allocates `pages` pages, the reserved page 0 included.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(shape: KvShape, pages: usize) -> Result<Self> {
        let bytes = pages.saturating_mul(shape.page_bytes());
        let one = || HostMemory::zeroed(bytes, "the KV cache");
        let layers = (0..shape.layers)
            .map(|_| Ok((one()?, one()?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            pages,
            layers,
        })
    }

    /// The shape it was made with.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Pages, the reserved one included.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.shape.bytes(self.pages)
    }

    /// Copies one page in every layer (copy on write).
    ///
    /// # Panics
    /// When a page id is out of range.
    pub fn copy_page(&mut self, from: usize, to: usize) {
        let bytes = self.shape.page_bytes();
        for (k, v) in &mut self.layers {
            k.copy_within(from * bytes, to * bytes, bytes);
            v.copy_within(from * bytes, to * bytes, bytes);
        }
    }

    /// K and V of a layer for reading.
    pub(crate) fn read(&self, layer: usize) -> (Mem<'_>, Mem<'_>) {
        let (k, v) = &self.layers[layer];
        (
            k.mem(0, k.bytes(), self.shape.dtype),
            v.mem(0, v.bytes(), self.shape.dtype),
        )
    }

    /// K and V of a layer for writing.
    pub(crate) fn write(&mut self, layer: usize) -> (MemMut<'_>, MemMut<'_>) {
        let dtype = self.shape.dtype;
        let (k, v) = &mut self.layers[layer];
        // SAFETY: K and V are separate allocations and `&mut self` excludes any other region.
        unsafe {
            (
                k.mem_mut(0, k.bytes(), dtype),
                v.mem_mut(0, v.bytes(), dtype),
            )
        }
    }
}
