//! Window pages: what layers keep that see a window of each text only.

use std::collections::BTreeMap;
use std::ops::Range;

use super::pool::{Label, Pool};
use super::{PageId, PageTable, SeqId, out_of_range, pages_for};
use crate::{Error, PAGE_TOKENS, Prefix, Result};

/// A window page belongs to a page, and holds the same tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct WindowPage {
    /// Sequences that need it.
    pub(super) refs: u32,
    /// The page it belongs to, unless it is blank.
    pub(super) page: Option<u32>,
    /// When it was last needed; its key in the order of eviction.
    serial: u64,
}

/// All window pages of a cache.
///
/// A window page is needed (`refs > 0`), or kept for its content (`kept`), or `blank`.
#[derive(Debug)]
pub(super) struct Windows {
    /// Tokens that a row sees, its own included.
    pub(super) tokens: usize,
    pub(super) pages: Vec<WindowPage>,
    /// Those that belong to no page, the next to be taken last.
    pub(super) blank: Vec<u32>,
    /// Those that nobody needs, the least recently needed first.
    pub(super) kept: BTreeMap<u64, u32>,
    clock: u64,
}

impl Windows {
    pub(super) fn new(tokens: usize, pages: usize) -> Self {
        let page = WindowPage {
            refs: 0,
            page: None,
            serial: 0,
        };
        Self {
            tokens,
            pages: vec![page; pages],
            blank: (0..pages as u32).rev().collect(),
            kept: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Window pages nobody needs.
    pub(super) fn free(&self) -> usize {
        self.blank.len() + self.kept.len()
    }

    /// Places of the pages that a sequence with so many tokens needs: those that its next token sees, and
    /// the one it goes into when that has begun.
    pub(super) fn reach(&self, tokens: usize) -> Range<usize> {
        let first = (tokens + 1).saturating_sub(self.tokens) / PAGE_TOKENS;
        first..pages_for(tokens).max(first)
    }

    fn page(&mut self, id: u32) -> &mut WindowPage {
        &mut self.pages[id as usize]
    }
}

impl Pool {
    /// Whether all layers hold what a page holds.
    pub(super) fn is_whole(&self, id: u32) -> bool {
        self.windows.is_none() || self.page(id).window.is_some()
    }

    /// One more sequence needs a page's window page, if it has one.
    pub(super) fn need(&mut self, id: u32) {
        if let (Some(window), Some(windows)) = (self.page(id).window, &mut self.windows) {
            let page = windows.page(window);
            page.refs += 1;
            if page.refs == 1 {
                let serial = page.serial;
                windows.kept.remove(&serial);
            }
        }
    }

    /// One sequence less. After the last one the window page is kept as long as there is room.
    pub(super) fn spare(&mut self, id: u32) {
        if let (Some(window), Some(windows)) = (self.page(id).window, &mut self.windows) {
            windows.clock += 1;
            let serial = windows.clock;
            let page = windows.page(window);
            page.refs -= 1;
            if page.refs == 0 {
                page.serial = serial;
                windows.kept.insert(serial, window);
            }
        }
    }

    /// Gives a page that has none a window page, which one sequence needs: a blank one, else the one that
    /// was not needed longest, which its page loses. False when all are needed.
    pub(super) fn attach(&mut self, id: u32) -> bool {
        let Some(windows) = &mut self.windows else {
            return true;
        };
        let taken = windows.blank.pop();
        let Some(window) = taken.or_else(|| windows.kept.pop_first().map(|(_, window)| window))
        else {
            return false;
        };
        let page = windows.page(window);
        page.refs = 1;
        if let Some(loser) = page.page.replace(id) {
            self.pages[loser as usize].window = None;
        }
        self.pages[id as usize].window = Some(window);
        true
    }

    /// Takes a page's window page away, unless somebody needs it.
    pub(super) fn detach(&mut self, id: u32) {
        let (Some(window), Some(windows)) = (self.page(id).window, &mut self.windows) else {
            return;
        };
        let page = windows.page(window);
        if page.refs == 0 {
            page.page = None;
            let serial = page.serial;
            windows.kept.remove(&serial);
            windows.blank.push(window);
            self.pages[id as usize].window = None;
        }
    }

    /// Gives a page that has none the window page of another one that holds the same tokens.
    pub(super) fn hand_over(&mut self, from: u32, to: u32) {
        if let (Some(window), Some(windows)) = (self.page(from).window, &mut self.windows)
            && self.pages[to as usize].window.is_none()
        {
            windows.page(window).page = Some(to);
            self.pages[to as usize].window = Some(window);
            self.pages[from as usize].window = None;
        }
    }
}

impl PageTable {
    /// A table for a cache in which some layers see the last `window` tokens only, a row's own included,
    /// and have `pages` window pages for them.
    ///
    /// A page can have a window page, which holds the same tokens for those layers. A sequence needs those
    /// of the pages that its next token sees, and of the pages it writes to
    /// ([`Self::reserve_window`]). What nobody needs can be found again with its page until room is
    /// needed, the least recently needed first; a text is found as far as the window before its end is
    /// there.
    ///
    /// # Errors
    /// [`Error::PoolSize`] for no page or more than [`Self::MAX_PAGES`].
    pub fn with_window(mut self, window: usize, pages: usize) -> Result<Self> {
        let max = Self::MAX_PAGES;
        if !(1..=max).contains(&pages) {
            return Err(Error::PoolSize { pages, max });
        }
        self.pool.windows = Some(Windows::new(window.max(1), pages));
        Ok(self)
    }

    /// Whether there are window pages.
    pub fn has_window(&self) -> bool {
        self.pool.windows.is_some()
    }

    /// Window pages, and how many of them nobody needs.
    pub fn window_pages(&self) -> (usize, usize) {
        let windows = self.pool.windows.as_ref();
        windows.map_or((0, 0), |w| (w.pages.len(), w.free()))
    }

    /// The window page of a page.
    pub fn window_of(&self, page: PageId) -> Option<PageId> {
        let page = self.pool.pages.get(page.0 as usize)?;
        page.window.map(PageId)
    }

    /// Window pages of a sequence in the places of its pages, as a step block wants them: 0 where it needs
    /// none. Empty without window pages.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn window_table(&self, seq: SeqId) -> Result<Vec<u32>> {
        let sequence = self.sequence(seq)?;
        if !self.has_window() {
            return Ok(Vec::new());
        }
        let one = |(place, &page): (usize, &u32)| match sequence.held.contains(&place) {
            true => self.pool.page(page).window.unwrap_or(0),
            false => 0,
        };
        Ok(sequence.pages.iter().enumerate().map(one).collect())
    }

    /// Sees to it that a sequence has window pages for its next tokens up to position `end`, which the
    /// coming step writes; [`Self::prepare_write`] comes before.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OutOfRange`] beyond its pages, [`Error::OutOfPages`] when
    /// other sequences need the window pages, [`Error::Unprepared`] for a page that holds something.
    pub fn reserve_window(&mut self, seq: SeqId, end: usize) -> Result<()> {
        let sequence = self.sequence(seq)?;
        if end > sequence.pages.len() * PAGE_TOKENS {
            return Err(out_of_range(seq, &sequence.pages, end - 1));
        }
        let Some(windows) = &self.pool.windows else {
            return Ok(());
        };
        let held = sequence.held.clone();
        let places = held.end..pages_for(end).max(held.end);
        let pages = sequence.pages[places.clone()].to_vec();
        let (mut needed, mut spared) = (0, 0);
        for (place, &page) in places.clone().zip(&pages) {
            match self.pool.page(page).window {
                Some(window) => spared += usize::from(windows.pages[window as usize].refs == 0),
                None if self.pool.page(page).tokens.is_empty() => needed += 1,
                None => {
                    let position = place * PAGE_TOKENS;
                    return Err(Error::Unprepared { seq, position });
                }
            }
        }
        let free = windows.free() - spared;
        if needed > free {
            return Err(Error::OutOfPages { needed, free });
        }
        // First those that are there, so that making room for the others does not take them.
        let (there, missing): (Vec<u32>, Vec<u32>) = pages
            .into_iter()
            .partition(|&page| self.pool.page(page).window.is_some());
        there.into_iter().for_each(|page| self.pool.need(page));
        for page in missing {
            let attached = self.pool.attach(page);
            debug_assert!(attached, "their number was checked");
        }
        self.sequence_mut(seq)?.held.end = places.end;
        Ok(())
    }

    /// Spares window pages of a sequence that its next token does not see.
    /// Until this, or [`Self::prepare_write`], those that wait for pages it has filled can
    /// [catch up](Self::catch_up) with it in any case; [`Self::reserve_window`] of the last step stays.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn move_window(&mut self, seq: SeqId) -> Result<()> {
        self.hold(seq, true)
    }

    /// Whether a text of so many tokens in these pages can be gone on with: the window before its end is
    /// there.
    pub(super) fn is_backed(&self, pages: &[u32], tokens: usize) -> bool {
        let Some(windows) = &self.pool.windows else {
            return true;
        };
        let mut places = windows.reach(tokens);
        places.all(|place| {
            let page = pages.get(place);
            page.is_some_and(|&page| self.pool.page(page).window.is_some())
        })
    }

    /// The longest beginning of so many tokens in these pages that can be gone on with.
    pub(super) fn backed(&self, pages: &[u32], tokens: usize) -> usize {
        let whole = (0..=tokens / PAGE_TOKENS).rev().map(|n| n * PAGE_TOKENS);
        let mut lengths = std::iter::once(tokens).chain(whole);
        lengths.find(|&n| self.is_backed(pages, n)).unwrap_or(0)
    }

    /// Makes the places of a sequence whose window pages it needs those of its tokens, and more behind
    /// them if it `keeps` what it has reserved. They are backed.
    pub(super) fn hold(&mut self, seq: SeqId, keeps: bool) -> Result<()> {
        let sequence = self.sequence(seq)?;
        let Some(windows) = &self.pool.windows else {
            return Ok(());
        };
        let (old, mut new) = (sequence.held.clone(), windows.reach(sequence.filled));
        if keeps {
            new.end = new.end.max(old.end);
        }
        let pages = sequence.pages.clone();
        for place in new.clone().filter(|place| !old.contains(place)) {
            self.pool.need(pages[place]);
        }
        // The end of a text is given up before its beginning.
        for place in old.rev().filter(|place| !new.contains(place)) {
            self.pool.spare(pages[place]);
        }
        self.sequence_mut(seq)?.held = new;
        Ok(())
    }

    /// Counts more tokens of a sequence, which are backed.
    pub(super) fn set_filled(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let sequence = self.sequence_mut(seq)?;
        if tokens > sequence.filled {
            sequence.filled = tokens;
            self.hold(seq, true)?;
        }
        Ok(())
    }

    /// Refuses tokens up to `end` that a sequence has no window pages for.
    pub(super) fn check_reserved(&self, seq: SeqId, end: usize) -> Result<()> {
        let held = &self.sequence(seq)?.held;
        if !self.has_window() || pages_for(end) <= held.end {
            return Ok(());
        }
        Err(Error::OutOfRange {
            seq,
            reserved: held.end * PAGE_TOKENS,
            position: end - 1,
        })
    }

    /// Sees to it that there are window pages for copies of those in `places` that a sequence needs.
    pub(super) fn check_windows(&self, seq: SeqId, places: &[usize]) -> Result<()> {
        let Some(windows) = &self.pool.windows else {
            return Ok(());
        };
        let held = &self.sequence(seq)?.held;
        let needed = places.iter().filter(|place| held.contains(place)).count();
        let free = windows.free();
        match needed <= free {
            true => Ok(()),
            false => Err(Error::OutOfPages { needed, free }),
        }
    }

    /// Gives a page that replaces another one in a sequence a window page for a copy; their number was
    /// checked.
    pub(super) fn replace_window(&mut self, from: u32, to: u32) -> Option<(PageId, PageId)> {
        let old = self.pool.page(from).window?;
        self.pool.attach(to);
        self.pool.spare(from);
        let new = self.pool.page(to).window?;
        Some((PageId(old), PageId(new)))
    }

    /// Forgets what a page holds of a promised one if its window page is gone: then nobody counts on it.
    pub(super) fn forget_abandoned(&mut self, page: u32) {
        if let Label::Promised(name) = self.pool.page(page).label
            && !self.pool.is_whole(page)
        {
            self.pool.wipe(page);
            self.pool.promise(page, name);
        }
    }

    /// The pages that a text shares, as far as they are there, in the places of its first pages; none for
    /// those that it is the first to want.
    ///
    /// With window pages it shares full ones only as far as it can go on behind them, and then those that
    /// others fill, also once more. Behind a page that it fills itself it shares none: window pages may be
    /// gone when it comes there.
    pub(super) fn sharing(&self, text: &Prefix) -> Vec<Option<u32>> {
        if !self.reuse {
            return Vec::new();
        }
        let names = text.hashes.iter();
        let mut found: Vec<Option<u32>> = names.map(|name| self.pool.find(name)).collect();
        if !self.has_window() {
            return found;
        }
        let there: Vec<u32> = found.iter().map_while(|&page| page).collect();
        let held = |&page: &u32| self.pool.page(page).tokens.len();
        let full = there.iter().take_while(|page| held(page) == PAGE_TOKENS);
        let full = full.count();
        let tokens = full * PAGE_TOKENS + there.get(full).map_or(0, held);
        let backed = self.backed(&there, tokens);
        let first = match backed < tokens {
            true => backed / PAGE_TOKENS,
            false => there.len(),
        };
        for (name, page) in text.hashes.iter().zip(&mut found).skip(first) {
            *page = self.pool.promised.get(name).copied();
        }
        let others = found[first..].iter().take_while(|page| page.is_some());
        let own = first + others.count();
        let fresh = found[own..].iter().take_while(|page| page.is_none());
        let named = own + fresh.count();
        found.truncate(named);
        found
    }
}
