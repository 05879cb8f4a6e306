//! Which page belongs to which sequence, and what pages that belong to nobody still hold.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use crate::{CacheEvent, Error, PAGE_TOKENS, PageHash, Prefix, Result};

mod content;
mod pool;
#[cfg(test)]
mod tests;
mod window;

pub use content::Match;
use pool::Pool;

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
    /// Their window pages, for the layers that have these.
    pub window: Option<(PageId, PageId)>,
}

/// Pages that hold `tokens` tokens.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// A text on its way through the cache.
#[derive(Debug)]
struct Sequence {
    /// Its pages in token order.
    pages: Vec<u32>,
    root: Option<PageHash>,
    /// Names of its first pages, as far as they are known.
    names: Vec<PageHash>,
    /// First pages that every owner wants to hold the same tokens.
    agreed: usize,
    /// Tokens in the cache.
    filled: usize,
    /// Places of the pages whose window pages it needs.
    held: Range<usize>,
}

/// Owner of all pages of a cache: block tables, reference counts, and what pages hold.
///
/// Sequences that begin with the same full pages share these, also while one of them still fills
/// them. A page that nobody owns any more keeps its content until room is needed, the least recently
/// used first and the end of a text before its beginning.
///
/// Pure bookkeeping: no page content is touched here. Every method either does all of its work or
/// returns an error and changes nothing.
#[derive(Debug)]
pub struct PageTable {
    pool: Pool,
    sequences: HashMap<SeqId, Sequence>,
    next: u64,
    reuse: bool,
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
            pool: Pool::new(pages),
            sequences: HashMap::new(),
            next: 0,
            reuse: true,
        })
    }

    /// Whether pages are shared by content and found again; on by default. [`Self::fork`] shares
    /// pages either way.
    #[must_use]
    pub fn with_reuse(mut self, reuse: bool) -> Self {
        self.reuse = reuse;
        self
    }

    /// Pages of the pool.
    pub fn capacity(&self) -> usize {
        self.pool.pages.len()
    }

    /// Pages nobody owns.
    pub fn free_pages(&self) -> usize {
        self.pool.free()
    }

    /// Pages nobody owns that hold tokens which may be found again.
    pub fn kept_pages(&self) -> usize {
        self.pool.kept.len()
    }

    /// Pages owned by at least one sequence.
    pub fn used_pages(&self) -> usize {
        self.capacity() - self.free_pages()
    }

    /// Sequences alive.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Sequences that own `page`; 0 for an unknown page.
    pub fn references(&self, page: PageId) -> u32 {
        self.pool.pages.get(page.0 as usize).map_or(0, |p| p.refs)
    }

    /// Pages that must be free now for a text to be admitted: those that no sequence owns already.
    pub fn pages_needed(&self, text: &Prefix) -> usize {
        let owned = |&&page: &&u32| self.pool.page(page).refs > 0;
        pages_for(text.tokens) - self.sharing(text).iter().flatten().filter(owned).count()
    }

    /// Starts a sequence with room for a text (an empty one owns nothing). It shares the full pages
    /// that are there or that others are about to fill, those only that it can go on behind where
    /// there are window pages; [`Self::filled`] says how many tokens need not be computed.
    ///
    /// # Errors
    /// [`Error::NeverFits`] beyond the whole pool, [`Error::OutOfPages`] when only later may do.
    pub fn admit(&mut self, text: &Prefix) -> Result<SeqId> {
        self.check(text.tokens, self.pages_needed(text))?;
        let found = self.sharing(text);
        let agreed = found.len();
        // First those that are there, so that making room for the others does not take them.
        for &page in found.iter().flatten() {
            self.pool.retain(page);
        }
        let mut pages = Vec::with_capacity(pages_for(text.tokens));
        for (hash, found) in text.hashes.iter().zip(found) {
            let page = found.unwrap_or_else(|| {
                let page = self.pool.take().expect("their number was checked");
                self.pool.promise(page, *hash);
                page
            });
            pages.push(page);
        }
        while pages.len() < pages_for(text.tokens) {
            pages.push(self.pool.take().expect("their number was checked"));
        }
        let seq = self.insert(Sequence {
            pages,
            root: text.root,
            agreed,
            names: text.hashes[..agreed].to_vec(),
            filled: 0,
            held: 0..0,
        });
        self.catch_up(seq)?;
        Ok(seq)
    }

    /// Grows a sequence until it has room for `tokens` tokens in all; never shrinks.
    ///
    /// # Errors
    /// As [`Self::admit`], and [`Error::UnknownSequence`].
    pub fn extend(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let held = self.sequence(seq)?.pages.len();
        let fresh = self.take(tokens, pages_for(tokens).saturating_sub(held))?;
        self.sequence_mut(seq)?.pages.extend(fresh);
        Ok(())
    }

    /// A new sequence that shares the pages of the first `tokens` tokens of `seq`. Takes no page;
    /// the first of the two to write into a shared page gets a copy, see [`Self::prepare_write`].
    /// [`Self::filled`] is less where window pages are gone that it would need.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`] when `seq` is shorter.
    pub fn fork(&mut self, seq: SeqId, tokens: usize) -> Result<SeqId> {
        let parent = self.sequence(seq)?;
        let Some(shared) = parent.pages.get(..pages_for(tokens)) else {
            return Err(out_of_range(seq, &parent.pages, tokens.saturating_sub(1)));
        };
        let full = tokens / PAGE_TOKENS;
        let child = Sequence {
            pages: shared.to_vec(),
            root: parent.root,
            names: parent.names.iter().copied().take(full).collect(),
            agreed: parent.agreed.min(full),
            filled: self.backed(shared, parent.filled.min(tokens)),
            held: 0..0,
        };
        for &page in &child.pages {
            self.pool.retain(page);
        }
        let child = self.insert(child);
        self.hold(child, false)?;
        Ok(child)
    }

    /// Makes the pages of positions `start..end` the sequence's own. Shared ones are replaced by
    /// fresh ones in its block table; the returned copies must be done before the write. Pages that
    /// all their owners want to fill with the same tokens stay shared. What the pages hold from
    /// `start` on is forgotten; window pages are needed up to there only.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`], [`Error::OutOfPages`].
    pub fn prepare_write(&mut self, seq: SeqId, start: usize, end: usize) -> Result<Vec<PageCopy>> {
        let held = self.sequence(seq)?;
        if end > held.pages.len() * PAGE_TOKENS {
            return Err(out_of_range(seq, &held.pages, end - 1));
        }
        if start >= end {
            return Ok(Vec::new());
        }
        let places = start / PAGE_TOKENS..pages_for(end);
        let foreign = |&place: &usize| self.is_foreign(held, place);
        let marked: Vec<usize> = places.clone().filter(foreign).collect();
        self.hold(seq, false)?;
        self.check_windows(seq, &marked)?;
        let fresh = self.take(end, marked.len())?;
        let mut copies = Vec::new();
        for (&place, to) in marked.iter().zip(fresh) {
            let copy = self.own(seq, place, to, start)?;
            // Of others nothing is kept.
            copies.extend((start > place * PAGE_TOKENS).then_some(copy));
        }
        for place in places {
            let sequence = self.sequence(seq)?;
            let (page, agreed) = (sequence.pages[place], place < sequence.agreed);
            self.forget_abandoned(page);
            if self.pool.page(page).refs == 1 {
                let keep = start.saturating_sub(place * PAGE_TOKENS).min(PAGE_TOKENS);
                self.pool.cut(page, keep);
                if !agreed {
                    // What others had promised, who are gone, or the sequence itself before it parted.
                    self.pool.unname(page);
                }
            }
        }
        Ok(copies)
    }

    /// Whether a page has other owners who want it to hold something else.
    fn is_foreign(&self, sequence: &Sequence, place: usize) -> bool {
        let page = self.pool.page(sequence.pages[place]);
        let agreed = place < sequence.agreed && matches!(page.label, pool::Label::Promised(_));
        page.refs > 1 && !agreed
    }

    /// Puts the page `to` in the place of a shared one; gives the copy that this takes.
    fn own(&mut self, seq: SeqId, place: usize, to: u32, start: usize) -> Result<PageCopy> {
        let sequence = self.sequence_mut(seq)?;
        let needs = sequence.held.contains(&place);
        let from = std::mem::replace(&mut sequence.pages[place], to);
        let window = needs.then(|| self.replace_window(from, to)).flatten();
        let page = self.pool.page(from);
        let keep = start.saturating_sub(place * PAGE_TOKENS);
        let tokens = page.tokens[..page.tokens.len().min(keep)].to_vec();
        let parent = page.parent;
        self.pool.append(to, parent, &tokens);
        self.pool.release(from);
        let (from, to) = (PageId(from), PageId(to));
        Ok(PageCopy { from, to, window })
    }

    /// Whether a write at `position` needs a copy first.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`].
    pub fn is_shared(&self, seq: SeqId, position: usize) -> Result<bool> {
        let sequence = self.sequence(seq)?;
        let place = position / PAGE_TOKENS;
        if place >= sequence.pages.len() {
            return Err(out_of_range(seq, &sequence.pages, position));
        }
        Ok(self.is_foreign(sequence, place))
    }

    /// Ends a sequence. Pages nobody else owns become free, and can be found again by what they
    /// hold; their number is returned.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for the second release of the same id.
    pub fn release(&mut self, seq: SeqId) -> Result<usize> {
        let pages = self.remove(seq)?;
        Ok(self.give_back(pages))
    }

    /// As [`Self::release`] for a sequence whose pages may not hold what they should: what it owns
    /// alone is forgotten.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn discard(&mut self, seq: SeqId) -> Result<usize> {
        let pages = self.remove(seq)?;
        for &page in &pages {
            let held = self.pool.page(page);
            if held.refs == 1 && !matches!(held.label, pool::Label::Full(_)) {
                self.pool.wipe(page);
            }
        }
        Ok(self.give_back(pages))
    }

    /// Ends a sequence; gives the pages it still owns.
    fn remove(&mut self, seq: SeqId) -> Result<Vec<u32>> {
        let sequence = self.sequences.remove(&seq);
        let sequence = sequence.ok_or(Error::UnknownSequence(seq))?;
        for place in sequence.held.rev() {
            self.pool.spare(sequence.pages[place]);
        }
        Ok(sequence.pages)
    }

    /// Gives back pages of an ended sequence; their number is returned.
    fn give_back(&mut self, pages: Vec<u32>) -> usize {
        let before = self.pool.free();
        // Reversed, so that the next sequence gets the same ascending run of pages, and that the end
        // of a text is given up before its beginning.
        for page in pages.into_iter().rev() {
            self.pool.release(page);
        }
        self.pool.free() - before
    }

    /// Page ids of a sequence in token order, as a step block wants them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_table(&self, seq: SeqId) -> Result<&[u32]> {
        Ok(&self.sequence(seq)?.pages)
    }

    /// Tokens the sequence's pages can hold.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn reserved_tokens(&self, seq: SeqId) -> Result<usize> {
        Ok(self.block_table(seq)?.len() * PAGE_TOKENS)
    }

    /// Pages that become free when the sequence ends.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn own_pages(&self, seq: SeqId) -> Result<usize> {
        let pages = self.block_table(seq)?.iter();
        Ok(pages
            .filter(|&&page| self.pool.page(page).refs == 1)
            .count())
    }

    /// Whether a text can be admitted at this moment.
    ///
    /// # Errors
    /// [`Error::NeverFits`] when it never can.
    pub fn fits_now(&self, text: &Prefix) -> Result<bool> {
        match self.check(text.tokens, self.pages_needed(text)) {
            Ok(()) => Ok(true),
            Err(Error::OutOfPages { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets what the pages hold that nobody owns.
    pub fn clear(&mut self) {
        while let Some((_, page)) = self.pool.kept.pop_first() {
            self.pool.wipe(page);
            self.pool.blank.push(page);
        }
        if self.pool.full.is_empty()
            && let Some(events) = &mut self.pool.events
        {
            events.clear();
            events.push(CacheEvent::Cleared);
        }
    }

    /// Notes every change from now on for [`Self::take_events`].
    pub fn record_events(&mut self) {
        self.pool.events.get_or_insert_default();
    }

    /// The changes since the last call, oldest first.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.pool
            .events
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
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
        let free = self.free_pages();
        if needed > free {
            return Err(Error::OutOfPages { needed, free });
        }
        Ok(())
    }

    /// Takes `count` free pages with one reference each, for a sequence of `tokens` tokens.
    fn take(&mut self, tokens: usize, count: usize) -> Result<Vec<u32>> {
        self.check(tokens, count)?;
        let take = |_| self.pool.take().expect("their number was checked");
        Ok((0..count).map(take).collect())
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let seq = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(seq, sequence);
        seq
    }

    fn sequence(&self, seq: SeqId) -> Result<&Sequence> {
        self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    fn sequence_mut(&mut self, seq: SeqId) -> Result<&mut Sequence> {
        self.sequences
            .get_mut(&seq)
            .ok_or(Error::UnknownSequence(seq))
    }
}

fn out_of_range(seq: SeqId, pages: &[u32], position: usize) -> Error {
    Error::OutOfRange {
        seq,
        reserved: pages.len() * PAGE_TOKENS,
        position,
    }
}
