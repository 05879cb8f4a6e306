//! Centers of the keys of quantized caches that have them: what appending takes away from keys
//! (`exl_kernels::KvFormat::has_centers`).

use exl_kernels::{DType, Mem};
use half::f16;

use super::{Half, KvBuffers, KvShape, product};
use crate::{Error, Result};

impl KvShape {
    /// Centers of one layer and page, `[kv_heads, head_dim]`; 0 where keys have none.
    fn center_values(&self) -> usize {
        match self.kv.k.has_centers() {
            true => product(&[self.kv_heads, self.head_dim]),
            false => 0,
        }
    }

    /// Bytes of the centers that a cache of `pages` pages appends with: one sequence may have them all.
    /// `None` where there are none.
    pub(super) fn centers(&self, pages: usize) -> Option<usize> {
        let bytes = product(&[self.layers, pages, self.center_values(), size_of::<f16>()]);
        Some(bytes).filter(|&bytes| bytes > 0)
    }
}

impl KvBuffers {
    /// Says what is taken away from a layer's keys that are appended from now on: `[pages, kv_heads,
    /// head_dim]` rotated values, by the page of a sequence that a position lies in. Until then it is
    /// nothing. What is in the cache already stays what it is.
    ///
    /// # Errors
    /// [`Error::Step`] when a layer's centers have another number or the cache has none, [`Error::Gpu`].
    pub fn set_centers(&mut self, layer: usize, centers: &[f16]) -> Result<()> {
        let values = self.pages.all * self.shape.center_values();
        let Some(memory) = &mut self.centers else {
            return Err(Error::Step(format!(
                "keys of a {} cache have no centers",
                self.shape.kv
            )));
        };
        if layer >= self.shape.layers || centers.len() != values {
            return Err(Error::Step(format!(
                "{} centers of keys for layer {layer}, {} layers have {values} each",
                centers.len(),
                self.shape.layers
            )));
        }
        let (at, bytes) = (
            layer * values * size_of::<f16>(),
            bytemuck::cast_slice(centers),
        );
        match memory {
            Half::Host(memory) => memory.write(at, bytes),
            Half::Gpu(region) => {
                let gpu = self.gpu.as_ref().expect("the cache was made on a GPU");
                let stream = gpu.device().stream();
                stream.copy_in(region, at, bytes).map_err(Error::Gpu)?;
            }
        }
        Ok(())
    }

    /// Centers of a layer, none where there are none.
    pub(super) fn centers(&self, layer: usize) -> Mem<'_> {
        let bytes = self.pages.all * self.shape.center_values() * size_of::<f16>();
        match &self.centers {
            None => Mem::host::<f16>(&[]),
            Some(memory) => memory.part(layer * bytes, bytes, DType::F16),
        }
    }
}
