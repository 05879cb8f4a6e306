//! Which page belongs to which sequence.

use std::collections::HashMap;
use std::fmt;

use crate::{Error, PAGE_TOKENS, Result};

#[cfg(test)]
mod tests;

/// A page of [`PAGE_TOKENS`] tokens in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

/// A sequence in a [`PageTable`]. Ids are never used again, so a stale one is an error and not
/// somebody else's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(u64);

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A page copy the caller must do in every layer before it writes to `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// Page that stays with the other sequences.
    pub from: PageId,
    /// Page the writing sequence owns alone.
    pub to: PageId,
}

/// Pages that hold `tokens` tokens.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// Owner of all pages of a cache: block tables, reference counts and the free list.
///
/// Pure bookkeeping: no page content is touched here. Every method either does all of its work or
/// returns an error and changes nothing.
#[derive(Debug)]
pub struct PageTable {
    /// References per page.
    refs: Vec<u32>,
    /// Free pages, the next to be used last.
    free: Vec<u32>,
    sequences: HashMap<SeqId, Vec<u32>>,
    next: u64,
}

impl PageTable {
    /// Most pages of a pool: slots (`page * 256 + offset`) are 32-bit signed on devices.
    pub const MAX_PAGES: usize = (i32::MAX as usize + 1) / PAGE_TOKENS;

    /// A table for a pool of `pages` pages.
    ///
    /// # Errors
    /// [`Error::PoolSize`] for no page or more than [`Self::MAX_PAGES`].
    pub fn new(pages: usize) -> Result<Self> {
        let max = Self::MAX_PAGES;
        if !(1..=max).contains(&pages) {
            return Err(Error::PoolSize { pages, max });
        }
        Ok(Self {
            refs: vec![0; pages],
            free: (0..pages as u32).rev().collect(),
            sequences: HashMap::new(),
            next: 0,
        })
    }

    /// Pages of the pool.
    pub fn capacity(&self) -> usize {
        self.refs.len()
    }

    /// Pages nobody owns.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages owned by at least one sequence.
    pub fn used_pages(&self) -> usize {
        self.capacity() - self.free.len()
    }

    /// Sequences alive.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Sequences that own `page`; 0 for an unknown page.
    pub fn references(&self, page: PageId) -> u32 {
        self.refs.get(page.0 as usize).copied().unwrap_or(0)
    }

    /// Starts a sequence with room for `tokens` tokens (0 is allowed and owns nothing).
    ///
    /// # Errors
    /// [`Error::NeverFits`] beyond the whole pool, [`Error::OutOfPages`] when only later may do.
    pub fn admit(&mut self, tokens: usize) -> Result<SeqId> {
        let pages = self.take(tokens, pages_for(tokens))?;
        Ok(self.insert(pages))
    }

    /// Grows a sequence until it has room for `tokens` tokens in all; never shrinks.
    ///
    /// # Errors
    /// As [`Self::admit`], and [`Error::UnknownSequence`].
    pub fn extend(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let held = self.block_table(seq)?.len();
        let pages = self.take(tokens, pages_for(tokens).saturating_sub(held))?;
        let table = self
            .sequences
            .get_mut(&seq)
            .ok_or(Error::UnknownSequence(seq))?;
        table.extend(pages);
        Ok(())
    }

    /// A new sequence that shares the pages of the first `tokens` tokens of `seq`. Takes no page;
    /// the first of the two to write into a shared page gets a copy, see [`Self::prepare_write`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`] when `seq` is shorter.
    pub fn fork(&mut self, seq: SeqId, tokens: usize) -> Result<SeqId> {
        let table = self.block_table(seq)?;
        let shared = table
            .get(..pages_for(tokens))
            .ok_or_else(|| Error::OutOfRange {
                seq,
                reserved: table.len() * PAGE_TOKENS,
                position: tokens.saturating_sub(1),
            })?
            .to_vec();
        for &page in &shared {
            self.refs[page as usize] += 1;
        }
        Ok(self.insert(shared))
    }

    /// Makes the pages of positions `start..end` the sequence's own. Shared ones are replaced by
    /// fresh ones in its block table; the returned copies must be done before the write.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`], [`Error::OutOfPages`].
    pub fn prepare_write(&mut self, seq: SeqId, start: usize, end: usize) -> Result<Vec<PageCopy>> {
        let table = self.block_table(seq)?;
        let reserved = table.len() * PAGE_TOKENS;
        if end > reserved {
            return Err(Error::OutOfRange {
                seq,
                reserved,
                position: end - 1,
            });
        }
        if start >= end {
            return Ok(Vec::new());
        }
        let first = start / PAGE_TOKENS;
        let marked: Vec<(usize, u32)> = table[first..pages_for(end)]
            .iter()
            .enumerate()
            .filter(|&(_, &page)| self.refs[page as usize] > 1)
            .map(|(index, &page)| (first + index, page))
            .collect();
        let fresh = self.take(end, marked.len())?;
        let table = self
            .sequences
            .get_mut(&seq)
            .ok_or(Error::UnknownSequence(seq))?;
        let mut copies = Vec::with_capacity(marked.len());
        for ((index, from), to) in marked.into_iter().zip(fresh) {
            table[index] = to;
            self.refs[from as usize] -= 1;
            copies.push(PageCopy {
                from: PageId(from),
                to: PageId(to),
            });
        }
        Ok(copies)
    }

    /// Whether a write at `position` needs a copy first.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`].
    pub fn is_shared(&self, seq: SeqId, position: usize) -> Result<bool> {
        let table = self.block_table(seq)?;
        match table.get(position / PAGE_TOKENS) {
            Some(&page) => Ok(self.refs[page as usize] > 1),
            None => Err(Error::OutOfRange {
                seq,
                reserved: table.len() * PAGE_TOKENS,
                position,
            }),
        }
    }

    /// Ends a sequence. Pages nobody else owns become free; their number is returned.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for the second release of the same id.
    pub fn release(&mut self, seq: SeqId) -> Result<usize> {
        let table = self
            .sequences
            .remove(&seq)
            .ok_or(Error::UnknownSequence(seq))?;
        let before = self.free.len();
        // Reversed, so that the next sequence gets the same ascending run of pages.
        for page in table.into_iter().rev() {
            let refs = &mut self.refs[page as usize];
            *refs -= 1;
            if *refs == 0 {
                self.free.push(page);
            }
        }
        Ok(self.free.len() - before)
    }

    /// Page ids of a sequence in token order, as a step block wants them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_table(&self, seq: SeqId) -> Result<&[u32]> {
        self.sequences
            .get(&seq)
            .map(Vec::as_slice)
            .ok_or(Error::UnknownSequence(seq))
    }

    /// Tokens the sequence's pages can hold.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn reserved_tokens(&self, seq: SeqId) -> Result<usize> {
        Ok(self.block_table(seq)?.len() * PAGE_TOKENS)
    }

    /// Whether a sequence of `tokens` tokens can be admitted at this moment.
    ///
    /// # Errors
    /// [`Error::NeverFits`] when it never can.
    pub fn fits_now(&self, tokens: usize) -> Result<bool> {
        match self.check(tokens, pages_for(tokens)) {
            Ok(()) => Ok(true),
            Err(Error::OutOfPages { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn check(&self, tokens: usize, needed: usize) -> Result<()> {
        let (total, capacity) = (pages_for(tokens), self.capacity());
        if total > capacity {
            return Err(Error::NeverFits {
                tokens,
                needed: total,
                capacity,
            });
        }
        let free = self.free.len();
        if needed > free {
            return Err(Error::OutOfPages { needed, free });
        }
        Ok(())
    }

    /// Takes `count` free pages with one reference each, for a sequence of `tokens` tokens.
    fn take(&mut self, tokens: usize, count: usize) -> Result<Vec<u32>> {
        self.check(tokens, count)?;
        let pages: Vec<u32> = self.free.drain(self.free.len() - count..).rev().collect();
        for &page in &pages {
            self.refs[page as usize] = 1;
        }
        Ok(pages)
    }

    fn insert(&mut self, pages: Vec<u32>) -> SeqId {
        let seq = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(seq, pages);
        seq
    }
}
