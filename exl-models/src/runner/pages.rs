//! Which pages a step uses: those it writes must have one user.

use exl_tensor::PAGE_TOKENS;

use super::{SeqSlice, pages_needed};
use crate::{Error, Result};

/// How often a step names each page of the cache.
#[derive(Debug)]
pub(super) struct PageUses(Vec<u32>);

impl PageUses {
    pub(super) fn new(pages: usize) -> Self {
        Self(vec![0; pages])
    }

    /// Refuses a page that is written and named twice: two rows would write one place, or a
    /// sequence would read what another has just written. The pages are in range.
    pub(super) fn check(&mut self, slices: &[SeqSlice<'_>]) -> Result<()> {
        self.0.fill(0);
        for page in slices.iter().flat_map(used) {
            self.0[*page as usize] += 1;
        }
        for (i, slice) in slices.iter().enumerate() {
            let written = &used(slice)[slice.start / PAGE_TOKENS..];
            if let Some(page) = written.iter().find(|page| self.0[**page as usize] > 1) {
                return Err(Error::Step(format!(
                    "sequence {i}: page {page} is written and used a second time; copy it first"
                )));
            }
        }
        Ok(())
    }
}

fn used<'a>(slice: &SeqSlice<'a>) -> &'a [u32] {
    &slice.pages[..pages_needed(slice)]
}
