//! The pages themselves: what they hold, who may take them.

use std::collections::{BTreeMap, HashMap};

use super::window::Windows;
use crate::{CacheEvent, PAGE_TOKENS, PageHash};

/// What a page is known as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Label {
    /// Not known to others.
    Private,
    /// Will hold this full page; all sequences that own it want just that.
    Promised(PageHash),
    /// Holds this full page.
    Full(PageHash),
}

/// A page and what its memory holds.
#[derive(Debug)]
pub(super) struct Page {
    /// Places in block tables that name it.
    pub(super) refs: u32,
    /// Name of the page before it; means something once there are tokens.
    pub(super) parent: Option<PageHash>,
    /// Tokens whose keys and values it holds, from its beginning.
    pub(super) tokens: Vec<u32>,
    pub(super) label: Label,
    /// The window page that holds the same tokens.
    pub(super) window: Option<u32>,
    /// When it was last given back; its key in the order of eviction.
    serial: u64,
}

/// All pages of a cache.
///
/// A page is in use (`refs > 0`), or kept for its content (`kept`), or `blank`.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) pages: Vec<Page>,
    /// Pages nobody uses and without content, the next to be taken last.
    pub(super) blank: Vec<u32>,
    /// Pages nobody uses whose content may be of use, the least recently used first.
    pub(super) kept: BTreeMap<u64, u32>,
    pub(super) full: HashMap<PageHash, u32>,
    pub(super) promised: HashMap<PageHash, u32>,
    /// Pages with content by the page before them.
    pub(super) children: HashMap<Option<PageHash>, Vec<u32>>,
    clock: u64,
    /// Window pages, where there are any.
    pub(super) windows: Option<Windows>,
    /// Events not fetched yet, if anybody wants them.
    pub(super) events: Option<Vec<CacheEvent>>,
}

impl Pool {
    pub(super) fn new(pages: usize) -> Self {
        let page = |_| Page {
            refs: 0,
            parent: None,
            tokens: Vec::new(),
            label: Label::Private,
            window: None,
            serial: 0,
        };
        Self {
            pages: (0..pages).map(page).collect(),
            blank: (0..pages as u32).rev().collect(),
            kept: BTreeMap::new(),
            full: HashMap::new(),
            promised: HashMap::new(),
            children: HashMap::new(),
            clock: 0,
            windows: None,
            events: None,
        }
    }

    /// Pages nobody uses.
    pub(super) fn free(&self) -> usize {
        self.blank.len() + self.kept.len()
    }

    pub(super) fn page(&self, id: u32) -> &Page {
        &self.pages[id as usize]
    }

    /// The page that holds or will hold `hash`.
    pub(super) fn find(&self, hash: &PageHash) -> Option<u32> {
        self.full
            .get(hash)
            .or_else(|| self.promised.get(hash))
            .copied()
    }

    /// A blank page with one user: one without content, else the one kept longest.
    pub(super) fn take(&mut self) -> Option<u32> {
        let id = match self.blank.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.kept.pop_first()?;
                self.wipe(id);
                id
            }
        };
        self.pages[id as usize].refs = 1;
        Some(id)
    }

    /// One more user.
    pub(super) fn retain(&mut self, id: u32) {
        let page = &mut self.pages[id as usize];
        page.refs += 1;
        if page.refs == 1 {
            self.kept.remove(&page.serial);
        }
    }

    /// One user less. The last one leaves the page to be found again, or blank when it holds nothing.
    pub(super) fn release(&mut self, id: u32) {
        let page = &mut self.pages[id as usize];
        page.refs -= 1;
        if page.refs > 0 {
            return;
        }
        if let Label::Promised(hash) = page.label {
            page.label = Label::Private;
            self.promised.remove(&hash);
        }
        if page.tokens.is_empty() {
            self.blank.push(id);
            self.detach(id);
        } else {
            self.clock += 1;
            page.serial = self.clock;
            self.kept.insert(self.clock, id);
        }
    }

    /// Says that a page in use will hold `hash`.
    pub(super) fn promise(&mut self, id: u32, hash: PageHash) {
        self.pages[id as usize].label = Label::Promised(hash);
        self.promised.insert(hash, id);
    }

    /// Adds tokens behind those that a page holds.
    pub(super) fn append(&mut self, id: u32, parent: Option<PageHash>, tokens: &[u32]) {
        let page = &mut self.pages[id as usize];
        if page.tokens.is_empty() && !tokens.is_empty() {
            page.parent = parent;
            self.children.entry(parent).or_default().push(id);
        }
        page.tokens.extend_from_slice(tokens);
    }

    /// Gives a page that holds all its tokens its name; nobody else has it.
    pub(super) fn publish(&mut self, id: u32, hash: PageHash) {
        let page = &mut self.pages[id as usize];
        debug_assert_eq!(page.tokens.len(), PAGE_TOKENS);
        if let Label::Promised(promised) = page.label {
            self.promised.remove(&promised);
        }
        page.label = Label::Full(hash);
        self.full.insert(hash, id);
        if let Some(events) = &mut self.events {
            events.push(CacheEvent::Stored {
                hash,
                parent: page.parent,
                tokens: page.tokens.clone(),
            });
        }
    }

    /// Takes a page's name away, whatever it is.
    pub(super) fn unname(&mut self, id: u32) {
        let page = &mut self.pages[id as usize];
        match std::mem::replace(&mut page.label, Label::Private) {
            Label::Private => {}
            Label::Promised(hash) => {
                self.promised.remove(&hash);
            }
            Label::Full(hash) => {
                self.full.remove(&hash);
                if let Some(events) = &mut self.events {
                    events.push(CacheEvent::Removed { hash });
                }
            }
        }
    }

    /// Forgets what a page holds from token `len` on, and its name with it.
    pub(super) fn cut(&mut self, id: u32, len: usize) {
        if self.page(id).tokens.len() <= len {
            return;
        }
        self.unname(id);
        let page = &mut self.pages[id as usize];
        page.tokens.truncate(len);
        if len == 0
            && let Some(children) = self.children.get_mut(&page.parent)
        {
            children.retain(|&child| child != id);
            if children.is_empty() {
                self.children.remove(&page.parent);
            }
        }
    }

    /// Forgets all that a page holds.
    pub(super) fn wipe(&mut self, id: u32) {
        self.cut(id, 0);
        self.unname(id);
        self.detach(id);
    }

    /// The page after `parent`, other than `except`, that holds most of the beginning of `tokens`, in its
    /// window page too, and how many tokens that are.
    pub(super) fn longest(
        &self,
        parent: Option<PageHash>,
        tokens: &[u32],
        except: u32,
    ) -> Option<(u32, usize)> {
        let common = |id: u32| {
            let held = &self.page(id).tokens;
            held.iter().zip(tokens).take_while(|(a, b)| a == b).count()
        };
        let children = self.children.get(&parent)?.iter();
        children
            .filter(|&&id| id != except && self.is_whole(id))
            .map(|&id| (id, common(id)))
            .max_by_key(|&(id, count)| (count, std::cmp::Reverse(id)))
    }
}
