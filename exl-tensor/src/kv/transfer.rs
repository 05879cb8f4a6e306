//! Pages of the cache to and from plain bytes.

use super::{Half, KvBuffers};
use crate::{Error, Result};

impl KvBuffers {
    /// Bytes of one page over all layers, K and V: what [`KvBuffers::read_page`] gives.
    pub fn page_bytes(&self) -> usize {
        self.shape.bytes(1)
    }

    /// Copies a page to `content`: layer by layer, K before V,
    /// which may differ in size.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// When the page is out of range or `content` has not [`KvBuffers::page_bytes`].
    pub fn read_page(&self, page: usize, content: &mut [u8]) -> Result<()> {
        self.assert_page(page, content.len());
        let (k_bytes, v_bytes) = self.shape.page_bytes();
        let halves = self.layers.iter();
        let halves = halves.flat_map(|(k, v)| [(k, k_bytes), (v, v_bytes)]);
        let mut rest = content;
        for (half, bytes) in halves {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(bytes);
            rest = after;
            match half {
                Half::Host(memory) => memory.read(page * bytes, part),
                Half::Gpu(region) => {
                    let gpu = self.gpu.as_ref().expect("the cache was made on a GPU");
                    let stream = gpu.device().stream();
                    stream
                        .copy_out(region, page * bytes, part)
                        .map_err(Error::Gpu)?;
                }
            }
        }
        Ok(())
    }

    /// Copies a page from `content`, which [`KvBuffers::read_page`] of a cache of the same shape gave.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// As [`KvBuffers::read_page`].
    pub fn write_page(&mut self, page: usize, content: &[u8]) -> Result<()> {
        self.assert_page(page, content.len());
        let (k_bytes, v_bytes) = self.shape.page_bytes();
        let halves = self.layers.iter_mut();
        let halves = halves.flat_map(|(k, v)| [(k, k_bytes), (v, v_bytes)]);
        let mut rest = content;
        for (half, bytes) in halves {
            let (part, after) = rest.split_at(bytes);
            rest = after;
            match half {
                Half::Host(memory) => memory.write(page * bytes, part),
                Half::Gpu(region) => {
                    let gpu = self.gpu.as_ref().expect("the cache was made on a GPU");
                    let stream = gpu.device().stream();
                    stream
                        .copy_in(region, page * bytes, part)
                        .map_err(Error::Gpu)?;
                }
            }
        }
        Ok(())
    }

    fn assert_page(&self, page: usize, bytes: usize) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        assert_eq!(bytes, self.page_bytes(), "bytes of a page");
    }
}
