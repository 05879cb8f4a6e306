//! Pages of the cache that are kept on disk.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use exl_cache::{CacheEvent, DiskPage, DiskTier, PAGE_TOKENS, PageHash, PageId, PageTable, SeqId};

use crate::{Backend, BackendError, Error, Result};

/// Pages on their way to the disk; beyond that the cache waits with more.
const IN_FLIGHT: usize = 4;
/// Pages read for one sequence between two steps, so that others do not wait long.
const READS: usize = 8;

/// Where an engine keeps prefixes beyond its own life.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The folder; several models and engines may share it.
    pub folder: PathBuf,
    /// What the content of the cache depends on: the weights, and how they compute.
    pub model: String,
    /// Most bytes of the model's files; those used least recently go.
    pub limit: u64,
}

/// The disk tier of a worker. Pages are written by a thread of their own.
pub(super) struct Disk {
    tier: Arc<DiskTier>,
    /// Bytes of a page, and of its window page behind it.
    page_bytes: [usize; 2],
    /// Full pages that are not on disk yet, oldest first.
    unsaved: VecDeque<PageHash>,
    writer: Option<(SyncSender<DiskPage>, JoinHandle<()>)>,
}

impl Disk {
    pub(super) fn open(options: &DiskOptions, backend: &dyn Backend) -> Result<Self> {
        let refuse = |reason: String| Error::Backend { reason };
        let window = backend.window().map(|window| window.page_bytes);
        let page_bytes = [backend.page_bytes(), window.unwrap_or(0)];
        let all: usize = page_bytes.iter().sum();
        if all == 0 || window == Some(0) {
            let why = "its cache cannot be read, so it cannot be kept on disk";
            return Err(refuse(why.to_owned()));
        }
        let model = format!("{}\n{all} bytes a page", options.model);
        let tier =
            DiskTier::open(&options.folder, &model, options.limit).map_err(|source| Error::Io {
                path: options.folder.clone(),
                source,
            })?;
        let tier = Arc::new(tier);
        let (sender, receiver) = sync_channel::<DiskPage>(IN_FLIGHT);
        let store = Arc::clone(&tier);
        let thread = std::thread::Builder::new()
            .name("exl-disk".to_owned())
            .spawn(move || {
                for page in receiver {
                    if let Err(error) = store.store(&page) {
                        tracing::warn!(%error, "a page of the cache could not be kept on disk");
                    }
                }
            });
        let thread = thread.map_err(|error| refuse(error.to_string()))?;
        Ok(Self {
            tier,
            page_bytes,
            unsaved: VecDeque::new(),
            writer: Some((sender, thread)),
        })
    }

    /// Notes what is new in the cache, and what is gone from it.
    pub(super) fn note(&mut self, events: &[CacheEvent]) {
        for event in events {
            match event {
                CacheEvent::Stored { hash, .. } if !self.tier.contains(hash) => {
                    self.unsaved.push_back(*hash);
                }
                CacheEvent::Cleared => self.unsaved.clear(),
                _ => {}
            }
        }
    }

    /// Hands pages to the writer: as many as it takes now, or all of them.
    pub(super) fn save(&mut self, table: &PageTable, backend: &mut dyn Backend, all: bool) {
        let Some((writer, _)) = &self.writer else {
            return;
        };
        while let Some(hash) = self.unsaved.pop_front() {
            // Pages that had to make room before their turn are lost, as are those without their
            // window pages.
            let Some((page, parent, tokens)) = table.full_page(&hash) else {
                continue;
            };
            let window = table.window_of(page);
            if table.has_window() && window.is_none() {
                continue;
            }
            let mut content = vec![0; self.bytes()];
            let read = || self.read((page, window), &mut content, backend);
            let read = catch_unwind(AssertUnwindSafe(read));
            if !matches!(read, Ok(Ok(()))) {
                tracing::warn!("a page of the cache could not be read, so it is not kept on disk");
                continue;
            }
            let page = DiskPage {
                parent,
                tokens: tokens.to_vec(),
                content,
            };
            let full = match all {
                true => writer.send(page).is_err(),
                false => match writer.try_send(page) {
                    Ok(()) => false,
                    Err(TrySendError::Full(_)) => {
                        self.unsaved.push_front(hash);
                        true
                    }
                    Err(TrySendError::Disconnected(_)) => true,
                },
            };
            if full {
                return;
            }
        }
    }

    /// Reads pages that a sequence wants next and nobody has; gives its tokens in the cache.
    pub(super) fn fetch(
        &self,
        table: &mut PageTable,
        backend: &mut dyn Backend,
        seq: SeqId,
    ) -> exl_cache::Result<usize> {
        for _ in 0..READS {
            let Some((hash, page)) = table.wanted(seq)? else {
                break;
            };
            let found = match self.tier.load(&hash, self.bytes()) {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "a page of the cache could not be read from disk");
                    break;
                }
            };
            let end = table.filled(seq)? + PAGE_TOKENS;
            if table.reserve_window(seq, end).is_err() {
                break;
            }
            let window = table.window_of(page);
            let write = || self.write((page, window), &found.content, backend);
            if !matches!(catch_unwind(AssertUnwindSafe(write)), Ok(Ok(()))) {
                tracing::warn!("a page of the cache could not be restored from disk");
                break;
            }
            table.commit(seq, &found.tokens)?;
            table.catch_up(seq)?;
            table.move_window(seq)?;
        }
        table.filled(seq)
    }

    /// Of a page with its window page.
    fn bytes(&self) -> usize {
        self.page_bytes.iter().sum()
    }

    fn read(
        &self,
        (page, window): (PageId, Option<PageId>),
        content: &mut [u8],
        backend: &mut dyn Backend,
    ) -> Result<(), BackendError> {
        let (all, rest) = content.split_at_mut(self.page_bytes[0]);
        if !all.is_empty() {
            backend.read_page(page.0, all)?;
        }
        match window {
            Some(window) => backend.read_window_page(window.0, rest),
            None => Ok(()),
        }
    }

    fn write(
        &self,
        (page, window): (PageId, Option<PageId>),
        content: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<(), BackendError> {
        let (all, rest) = content.split_at(self.page_bytes[0]);
        if !all.is_empty() {
            backend.write_page(page.0, all)?;
        }
        match window {
            Some(window) => backend.write_window_page(window.0, rest),
            None => Ok(()),
        }
    }

    /// Waits until all pages are on disk that were handed over.
    pub(super) fn close(&mut self) {
        if let Some((writer, thread)) = self.writer.take() {
            drop(writer);
            if thread.join().is_err() {
                tracing::error!("the thread that keeps pages on disk panicked");
            }
        }
    }
}
