//! Pages of the cache to and from plain bytes, and to other pages.

use std::ops::Range;

use super::{Half, KvBuffers};
use crate::{Error, Result};

/// Layers that a page is copied in, and how many pages there are.
type Pages = (Range<usize>, usize);

impl KvBuffers {
    /// Those of the sequences' pages: all layers, unless sliding ones have pages of their own.
    fn all(&self) -> Pages {
        let layers = match self.pages.window {
            Some(_) => self.shape.full_layers(),
            None => self.shape.layers,
        };
        (0..layers, self.pages.all)
    }

    /// Those of window pages.
    fn window(&self) -> Pages {
        (
            self.all().0.end..self.shape.layers,
            self.pages.window.unwrap_or(0),
        )
    }

    /// Bytes of one page, K and V: what [`KvBuffers::read_page`] gives. Over all layers, or, where
    /// sliding layers have pages of their own, over the others.
    pub fn page_bytes(&self) -> usize {
        self.shape.layer_bytes(self.all().0.len(), 1)
    }

    /// Bytes of one page of the sliding layers, 0 unless they have pages of their own. All layers' bytes
    /// are those of a page and then of a window page.
    pub fn window_page_bytes(&self) -> usize {
        self.shape.layer_bytes(self.window().0.len(), 1)
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
        self.read_from(self.all(), page, content)
    }

    /// As [`KvBuffers::read_page`] for a window page.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// When the page is out of range or `content` has not [`KvBuffers::window_page_bytes`].
    pub fn read_window_page(&self, page: usize, content: &mut [u8]) -> Result<()> {
        self.read_from(self.window(), page, content)
    }

    /// Copies a page from `content`, which [`KvBuffers::read_page`] of a cache of the same shape gave.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// As [`KvBuffers::read_page`].
    pub fn write_page(&mut self, page: usize, content: &[u8]) -> Result<()> {
        self.write_to(self.all(), page, content)
    }

    /// As [`KvBuffers::write_page`] for a window page.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// As [`KvBuffers::read_window_page`].
    pub fn write_window_page(&mut self, page: usize, content: &[u8]) -> Result<()> {
        self.write_to(self.window(), page, content)
    }

    /// Copies one page to another (copy on write).
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// When a page id is out of range.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<()> {
        self.copy_in(self.all(), from, to)
    }

    /// As [`KvBuffers::copy_page`] for window pages.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    ///
    /// # Panics
    /// When a page id is out of range.
    pub fn copy_window_page(&mut self, from: usize, to: usize) -> Result<()> {
        self.copy_in(self.window(), from, to)
    }

    /// K and V of these layers with the bytes of their pages.
    fn halves(&self, layers: &Range<usize>) -> impl Iterator<Item = (&Half, usize)> {
        let (k_bytes, v_bytes) = self.shape.page_bytes();
        let layers = self.layers[layers.clone()].iter();
        layers.flat_map(move |(k, v)| [(k, k_bytes), (v, v_bytes)])
    }

    fn halves_mut(&mut self, layers: &Range<usize>) -> impl Iterator<Item = (&mut Half, usize)> {
        let (k_bytes, v_bytes) = self.shape.page_bytes();
        let layers = self.layers[layers.clone()].iter_mut();
        layers.flat_map(move |(k, v)| [(k, k_bytes), (v, v_bytes)])
    }

    fn read_from(&self, (layers, pages): Pages, page: usize, content: &mut [u8]) -> Result<()> {
        self.assert_page((&layers, pages), page, content.len());
        let mut rest = content;
        for (half, bytes) in self.halves(&layers) {
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

    fn write_to(&mut self, (layers, pages): Pages, page: usize, content: &[u8]) -> Result<()> {
        self.assert_page((&layers, pages), page, content.len());
        let gpu = self.gpu.clone();
        let mut rest = content;
        for (half, bytes) in self.halves_mut(&layers) {
            let (part, after) = rest.split_at(bytes);
            rest = after;
            match half {
                Half::Host(memory) => memory.write(page * bytes, part),
                Half::Gpu(region) => {
                    let gpu = gpu.as_ref().expect("the cache was made on a GPU");
                    let stream = gpu.device().stream();
                    stream
                        .copy_in(region, page * bytes, part)
                        .map_err(Error::Gpu)?;
                }
            }
        }
        Ok(())
    }

    fn copy_in(&mut self, (layers, pages): Pages, from: usize, to: usize) -> Result<()> {
        assert!(from.max(to) < pages, "pages {from} and {to} of {pages}");
        let gpu = self.gpu.clone();
        for (half, bytes) in self.halves_mut(&layers) {
            match half {
                Half::Host(memory) => memory.copy_within(from * bytes, to * bytes, bytes),
                Half::Gpu(region) if from != to => {
                    let gpu = gpu.as_ref().expect("the cache was made on a GPU");
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

    fn assert_page(&self, (layers, pages): (&Range<usize>, usize), page: usize, bytes: usize) {
        assert!(page < pages, "page {page} of {pages}");
        let wanted = self.shape.layer_bytes(layers.len(), 1);
        assert_eq!(bytes, wanted, "bytes of a page");
    }
}
