//! What sequences have in the cache: noting it, sharing it, finding it, taking it back.

use super::pool::Label;
use super::{PageCopy, PageId, PageTable, SeqId, out_of_range, pages_for};
use crate::{PAGE_TOKENS, PageHash, Result};

/// Fewest tokens for which a page is copied rather than computed.
const LEAST_MATCH: usize = 16;

/// A page that begins with the tokens a sequence wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    page: u32,
    target: u32,
    /// Tokens of it that are of use.
    pub tokens: usize,
    /// The page itself can be had, because nobody owns it and all of it is of use.
    whole: bool,
    /// Window pages of the two.
    window: Option<(PageId, PageId)>,
}

impl Match {
    /// The copy to be done before [`PageTable::adopt`], if any.
    pub fn copy(&self) -> Option<PageCopy> {
        (!self.whole).then_some(PageCopy {
            from: PageId(self.page),
            to: PageId(self.target),
            window: self.window,
        })
    }
}

impl PageTable {
    /// Tokens of a sequence whose keys and values are in the cache.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn filled(&self, seq: SeqId) -> Result<usize> {
        Ok(self.sequence(seq)?.filled)
    }

    /// Counts what others have filled in pages that the sequence shares with them, as far as window
    /// pages are there that it needs then; gives [`Self::filled`].
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn catch_up(&mut self, seq: SeqId) -> Result<usize> {
        let agreed = self.sequence(seq)?.agreed;
        let mut filled = self.sequence(seq)?.filled;
        let mut backed = filled;
        while filled / PAGE_TOKENS < agreed {
            let place = filled / PAGE_TOKENS;
            if filled == backed {
                self.take_over(seq, place)?;
            }
            let pages = &self.sequence(seq)?.pages;
            let held = self.pool.page(pages[place]).tokens.len();
            filled = filled.max(place * PAGE_TOKENS + held);
            if self.is_backed(pages, filled) {
                backed = filled;
            }
            if held < PAGE_TOKENS {
                break;
            }
        }
        self.set_filled(seq, backed)?;
        Ok(backed)
    }

    /// Takes the full page that holds what a sequence and others are about to put into another one, if it
    /// has its window page: it had been there, behind pages without theirs.
    fn take_over(&mut self, seq: SeqId, place: usize) -> Result<()> {
        if !self.has_window() {
            return Ok(());
        }
        let sequence = self.sequence(seq)?;
        let page = sequence.pages[place];
        let name = sequence.names.get(place);
        let full = name.and_then(|name| self.pool.full.get(name)).copied();
        if let Some(full) = full.filter(|&full| full != page && self.pool.is_whole(full)) {
            self.merge(place, page, full);
        }
        Ok(())
    }

    /// The full page that a sequence wants next, if nobody has any of it: its name and its place.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn wanted(&self, seq: SeqId) -> Result<Option<(PageHash, PageId)>> {
        let sequence = self.sequence(seq)?;
        let place = sequence.filled / PAGE_TOKENS;
        if place >= sequence.agreed || !sequence.filled.is_multiple_of(PAGE_TOKENS) {
            return Ok(None);
        }
        let page = sequence.pages[place];
        let empty = self.pool.page(page).tokens.is_empty();
        Ok(empty.then(|| (sequence.names[place], PageId(page))))
    }

    /// Where a full page is, the name of the page before it and its tokens.
    pub fn full_page(&self, hash: &PageHash) -> Option<(PageId, Option<PageHash>, &[u32])> {
        let id = *self.pool.full.get(hash)?;
        let page = self.pool.page(id);
        Some((PageId(id), page.parent, &page.tokens))
    }

    /// Notes that keys and values of `tokens`, the next of the sequence, are in its pages now. A page
    /// that is full gets its name; where another page has that name already, the sequence takes that
    /// one and gives its own back.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`], [`crate::Error::OutOfRange`] beyond its pages, or beyond what
    /// [`Self::reserve_window`] was called for.
    pub fn commit(&mut self, seq: SeqId, tokens: &[u32]) -> Result<()> {
        let sequence = self.sequence(seq)?;
        let start = sequence.filled;
        let end = start + tokens.len();
        if end > sequence.pages.len() * PAGE_TOKENS {
            return Err(out_of_range(seq, &sequence.pages, end - 1));
        }
        self.check_reserved(seq, end)?;
        let mut at = start;
        while self.reuse && at < end {
            let next = end.min((at / PAGE_TOKENS + 1) * PAGE_TOKENS);
            self.note(seq, at, &tokens[at - start..next - start])?;
            at = next;
        }
        self.sequence_mut(seq)?.filled = end;
        Ok(())
    }

    /// Notes tokens of one page, of which others may have noted some.
    fn note(&mut self, seq: SeqId, start: usize, tokens: &[u32]) -> Result<()> {
        let (place, offset) = (start / PAGE_TOKENS, start % PAGE_TOKENS);
        let sequence = self.sequence(seq)?;
        let (page, parent) = (sequence.pages[place], sequence.parent(place));
        let known = self.pool.page(page).tokens.len().saturating_sub(offset);
        let Some(fresh) = tokens.get(known..).filter(|fresh| !fresh.is_empty()) else {
            return Ok(());
        };
        self.pool.append(page, parent, fresh);
        let held = &self.pool.page(page).tokens;
        if held.len() < PAGE_TOKENS {
            return Ok(());
        }
        let hash = PageHash::of(parent, held);
        let sequence = self.sequence_mut(seq)?;
        if sequence.names.get(place) != Some(&hash) {
            sequence.names.truncate(place);
            sequence.names.push(hash);
        }
        match self.pool.full.get(&hash).copied() {
            Some(other) => self.merge(place, page, other),
            None => {
                let promised = self.pool.promised.get(&hash).copied();
                self.pool.publish(page, hash);
                if let Some(other) = promised.filter(|&other| other != page) {
                    self.merge(place, other, page);
                }
            }
        }
        Ok(())
    }

    /// Replaces a page by another one that holds the same and more, for all its owners.
    fn merge(&mut self, place: usize, from: u32, to: u32) {
        self.pool.hand_over(from, to);
        for sequence in self.sequences.values_mut() {
            if sequence.pages.get(place) == Some(&from) {
                sequence.pages[place] = to;
                self.pool.retain(to);
                if sequence.held.contains(&place) && self.pool.page(from).window.is_some() {
                    self.pool.need(to);
                    self.pool.spare(from);
                }
                if self.pool.page(from).refs == 1 {
                    self.pool.wipe(from);
                }
                self.pool.release(from);
            }
        }
    }

    /// A page that begins with some of the tokens that `next` says the sequence wants, though not with a
    /// page full of them; only at the beginning of a page of its own that is still empty. That gets a
    /// window page if it is to be written to; none is found without.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn find_match(&mut self, seq: SeqId, next: &[u32]) -> Result<Option<Match>> {
        let sequence = self.sequence(seq)?;
        let place = sequence.filled / PAGE_TOKENS;
        let Some(&target) = sequence.pages.get(place) else {
            return Ok(None);
        };
        let empty = self.pool.page(target).tokens.is_empty();
        if !self.reuse || !empty || !sequence.filled.is_multiple_of(PAGE_TOKENS) {
            return Ok(None);
        }
        // A full page would have to get its name, by which it is found in any case.
        let next = &next[..next.len().min(PAGE_TOKENS - 1)];
        let found = self.pool.longest(sequence.parent(place), next, target);
        let Some((page, tokens)) = found.filter(|&(_, count)| count >= LEAST_MATCH) else {
            return Ok(None);
        };
        let source = self.pool.page(page);
        let whole = source.refs == 0
            && source.label == Label::Private
            && source.tokens.len() == tokens
            && self.pool.page(target).refs == 1;
        let mut found = Match {
            page,
            target,
            tokens,
            whole,
            window: None,
        };
        if !whole && self.has_window() {
            // The page stays what it is while the other one gets its window page.
            self.pool.need(page);
            let reserved = self.reserve_window(seq, (place + 1) * PAGE_TOKENS);
            self.pool.spare(page);
            if reserved.is_err() {
                return Ok(None);
            }
            let pair = self
                .window_of(PageId(page))
                .zip(self.window_of(PageId(target)));
            found.window = pair;
        }
        Ok(Some(found))
    }

    /// Gives a sequence what [`Self::find_match`] has just found for it, after the copy is done.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn adopt(&mut self, seq: SeqId, found: Match) -> Result<()> {
        let sequence = self.sequence(seq)?;
        let place = sequence.filled / PAGE_TOKENS;
        let parent = sequence.parent(place);
        let filled = sequence.filled + found.tokens;
        if found.whole {
            // What was reserved is not needed.
            self.hold(seq, false)?;
            let label = self.pool.page(found.target).label;
            self.pool.retain(found.page);
            self.pool.unname(found.target);
            self.pool.release(found.target);
            if let Label::Promised(hash) = label {
                self.pool.promise(found.page, hash);
            }
            self.sequence_mut(seq)?.pages[place] = found.page;
        } else {
            let tokens = self.pool.page(found.page).tokens[..found.tokens].to_vec();
            self.pool.append(found.target, parent, &tokens);
        }
        self.set_filled(seq, filled)
    }

    /// Takes back what a sequence has beyond its first `len` tokens; what it has is then at most
    /// that, and less where window pages are gone that it would need. Pages behind are given back and
    /// can be found again.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        let full = len / PAGE_TOKENS;
        let sequence = self.sequence(seq)?;
        let filled = self.backed(&sequence.pages, sequence.filled.min(len));
        self.sequence_mut(seq)?.filled = filled;
        self.hold(seq, false)?;
        let sequence = self.sequence_mut(seq)?;
        sequence.agreed = sequence.agreed.min(full);
        sequence.names.truncate(full);
        let keep = pages_for(len).min(sequence.pages.len());
        let dropped = sequence.pages.split_off(keep);
        let last = sequence.pages.get(full).copied();
        for page in dropped.into_iter().rev() {
            self.pool.release(page);
        }
        if let Some(page) = last.filter(|&page| self.pool.page(page).refs == 1) {
            self.pool.cut(page, len % PAGE_TOKENS);
        }
        Ok(())
    }
}

impl super::Sequence {
    /// What stands before the page in `place`; its name is known, for it is full.
    fn parent(&self, place: usize) -> Option<PageHash> {
        match place.checked_sub(1) {
            Some(before) => self.names.get(before).copied(),
            None => self.root,
        }
    }
}
