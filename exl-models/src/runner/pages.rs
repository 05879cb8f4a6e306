//! Which pages a step uses: those that there are, and those it writes must have one user.

use exl_tensor::{KvPages, PAGE_TOKENS};

use super::{SeqSlice, pages_needed};
use crate::{Error, Result};

/// Why the pages of a slice cannot be, if so.
pub(super) fn check(slice: &SeqSlice<'_>, there: KvPages) -> Result<(), String> {
    let window = slice.extras.window_pages;
    match there.window {
        Some(count) => check_list("window page", pages_needed(slice), window, count)?,
        None if window.is_empty() => {}
        None => return Err("window pages, all layers have the same pages".to_owned()),
    }
    check_list("page", pages_needed(slice), slice.pages, there.all)
}

fn check_list(what: &str, needed: usize, pages: &[u32], there: usize) -> Result<(), String> {
    let Some(pages) = pages.get(..needed) else {
        return Err(format!("needs {needed} {what}s, has {}", pages.len()));
    };
    match pages.iter().find(|&&page| page as usize >= there) {
        Some(page) => {
            let last = there.saturating_sub(1);
            Err(format!("{what} {page}, the cache has 0 to {last}"))
        }
        None => Ok(()),
    }
}

/// How often a step names each page of the cache.
#[derive(Debug)]
pub(super) struct PageUses {
    all: Vec<u32>,
    /// Window pages.
    window: Vec<u32>,
    /// Tokens of the window.
    reach: usize,
}

impl PageUses {
    /// For a cache whose widest window has `reach` tokens.
    pub(super) fn new(pages: KvPages, reach: usize) -> Self {
        Self {
            all: vec![0; pages.all],
            window: vec![0; pages.window.unwrap_or(0)],
            reach,
        }
    }

    /// Refuses a page that is written and named twice: two rows would write one place, or a
    /// sequence would read what another has just written. The pages are in range.
    pub(super) fn check(&mut self, slices: &[SeqSlice<'_>]) -> Result<()> {
        check_uses(&mut self.all, slices, |slice| {
            (&slice.pages[..pages_needed(slice)], 0)
        })?;
        if self.window.is_empty() {
            return Ok(());
        }
        let reach = self.reach;
        check_uses(&mut self.window, slices, |slice| {
            // What stands before the window names no page.
            let first = (slice.start + 1).saturating_sub(reach) / PAGE_TOKENS;
            (&slice.extras.window_pages[..pages_needed(slice)], first)
        })
    }
}

/// `pages` gives all pages of a slice, and the first of them that counts.
fn check_uses<'a>(
    uses: &mut [u32],
    slices: &'a [SeqSlice<'_>],
    pages: impl Fn(&'a SeqSlice<'_>) -> (&'a [u32], usize),
) -> Result<()> {
    uses.fill(0);
    for slice in slices {
        let (pages, first) = pages(slice);
        for page in &pages[first..] {
            uses[*page as usize] += 1;
        }
    }
    for (i, slice) in slices.iter().enumerate() {
        let written = &pages(slice).0[slice.start / PAGE_TOKENS..];
        if let Some(page) = written.iter().find(|page| uses[**page as usize] > 1) {
            return Err(Error::Step(format!(
                "sequence {i}: page {page} is written and used a second time; copy it first"
            )));
        }
    }
    Ok(())
}
