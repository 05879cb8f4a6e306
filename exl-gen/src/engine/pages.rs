//! Cache pages for jobs: who starts, who gets more, who has to give way.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use exl_cache::{
    Error as CacheError, PAGE_TOKENS, PageCopy, PageTable, least_window_pages, pages_for,
};

use super::queue::rank;
use super::step::without_pages;
use super::worker::{Worker, message};
use crate::job::{Job, Lane};
use crate::request::DoneReason;
use crate::schedule::{AGEING, Demand, Share};
use crate::{Backend, BackendError, Error, Result};

impl Worker {
    /// Starts waiting jobs while pages and the batch have room.
    pub(super) fn admit(&mut self) {
        while !self.queue.is_empty() {
            let (lanes, ahead) = (self.running_lanes(), self.growth());
            let (table, most) = (&self.table, self.max_lanes);
            let busy = !self.running.is_empty();
            let fits = |job: &Job| {
                lanes + job.lanes.len() <= most && has_pages(job, table, busy.then_some(ahead))
            };
            let Some(job) = self.queue.start(fits) else {
                if self.make_way() {
                    continue;
                }
                return;
            };
            self.leave_queue();
            self.start(job);
        }
    }

    fn start(&mut self, mut job: Job) {
        for lane in &mut job.lanes {
            match self.table.admit(&lane.prefix) {
                Ok(seq) => lane.seq = Some(seq),
                Err(error) => {
                    self.end(job, DoneReason::Error(error.to_string()));
                    return;
                }
            }
        }
        job.start();
        self.running.push(job);
    }

    fn running_lanes(&self) -> usize {
        self.running.iter().map(|job| job.lanes.len()).sum()
    }

    /// Pages that running jobs may ask for before any of them ends: one for each that has not all of
    /// its pages yet.
    fn growth(&self) -> usize {
        let grows = |job: &Job| {
            (0..job.lanes.len())
                .filter(|&lane| self.grows(job, lane))
                .count()
        };
        self.running.iter().map(grows).sum()
    }

    fn grows(&self, job: &Job, lane: usize) -> bool {
        let held = job.lanes[lane]
            .seq
            .and_then(|seq| self.table.block_table(seq).ok());
        held.is_some_and(|held| held.len() < pages_for(job.longest(lane)))
    }

    /// Sends less important jobs back into the queue if that lets the first one there start.
    fn make_way(&mut self) -> bool {
        let Some(first) = self.queue.first() else {
            return false;
        };
        let mut victims: Vec<&Job> = self
            .running
            .iter()
            .filter(|job| job.level() < first.priority())
            .collect();
        victims.sort_by_key(|job| Reverse(rank(job)));
        let need: usize = first
            .lanes
            .iter()
            .map(|lane| self.table.pages_needed(&lane.prefix))
            .sum();
        let most = self.max_lanes - first.lanes.len().min(self.max_lanes);
        let (mut lanes, mut free) = (self.running_lanes(), self.table.free_pages());
        let (mut others, mut ahead) = (self.running.len(), self.growth() + growing(first));
        let mut chosen = Vec::new();
        let fits = |lanes: usize, free: usize, ahead: usize| lanes <= most && need + ahead <= free;
        for job in victims {
            if fits(lanes, free, ahead) {
                break;
            }
            others -= 1;
            lanes -= job.lanes.len();
            let grows = (0..job.lanes.len()).filter(|&lane| self.grows(job, lane));
            ahead = if others > 0 { ahead - grows.count() } else { 0 };
            let own = |lane: &Lane| lane.seq.and_then(|seq| self.table.own_pages(seq).ok());
            free += job.lanes.iter().filter_map(own).sum::<usize>();
            chosen.push(job.id);
        }
        if chosen.is_empty() || !fits(lanes, free, ahead) {
            return false;
        }
        for id in chosen {
            if let Some(at) = self.running.iter().position(|job| job.id == id) {
                // Who was pushed aside often enough cannot be pushed aside again.
                self.running[at].skips += AGEING;
                self.preempt(at);
            }
        }
        true
    }

    /// Sends a running job back into the queue. What it has in the cache can be found again when it
    /// comes back, unless others needed the pages.
    fn preempt(&mut self, at: usize) {
        let mut job = self.running.remove(at);
        for lane in &mut job.lanes {
            self.release(lane, false);
            lane.leave();
        }
        self.forget_draft(job.id);
        job.preemptions += 1;
        self.shared.stats().preemptions += 1;
        self.enter_queue();
        self.queue.push(job);
    }

    /// Gives a lane's pages back; `spoiled` ones are not to be found again.
    pub(super) fn release(&mut self, lane: &mut Lane, spoiled: bool) {
        let Some(seq) = lane.seq.take() else {
            return;
        };
        let released = match spoiled {
            true => self.table.discard(seq),
            false => self.table.release(seq),
        };
        if let Err(error) = released {
            tracing::error!(%error, "a sequence was released twice");
        }
    }

    /// Sees to it that every running job has pages to write its next tokens to, the most important
    /// first; where there are none, the least important gives way.
    pub(super) fn grow(&mut self) {
        self.running.sort_by_key(rank);
        let mut at = 0;
        while at < self.running.len() {
            match self.make_room(at) {
                Ok(()) => at += 1,
                Err(Trouble::OutOfPages) => {
                    let last = self.running.len() - 1;
                    self.preempt(last);
                }
                Err(Trouble::Failed(why)) => {
                    let job = self.running.remove(at);
                    self.end(job, DoneReason::Error(why));
                }
            }
        }
    }

    fn make_room(&mut self, at: usize) -> Result<(), Trouble> {
        for lane in 0..self.running[at].lanes.len() {
            let one = &self.running[at].lanes[lane];
            let Some(seq) = one.seq else {
                return Err(Trouble::Failed("the job runs without pages".to_owned()));
            };
            let (cached, len) = (one.cached, one.tokens.len());
            self.table.extend(seq, len)?;
            // A draft is written to the page of the last token, too. Pages of a prompt are written by
            // all who want them, but for those that are there without their window pages.
            if len - cached == 1 || self.table.has_window() {
                let end = len.min(cached + self.limits.rows);
                for copy in self.table.prepare_write(seq, cached, end)? {
                    self.copy(copy)?;
                }
            }
        }
        Ok(())
    }

    /// Window pages for the tokens of a step.
    pub(super) fn reserve_windows(&mut self, shares: &[Share]) -> Result<(), BackendError> {
        for one in shares {
            let job = &self.running[one.job];
            let lane = &job.lanes[one.lane];
            let seq = lane.seq.ok_or_else(|| without_pages(job))?;
            let reserved = self.table.reserve_window(seq, lane.cached + one.rows);
            reserved.map_err(BackendError::of)?;
        }
        Ok(())
    }

    /// Counts what is in the cache already for jobs whose prompts are being worked through, and takes
    /// over pages that begin as theirs go on.
    pub(super) fn reuse(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            match self.find(at) {
                Ok(()) => at += 1,
                Err(Trouble::OutOfPages) => at += 1,
                Err(Trouble::Failed(why)) => {
                    let job = self.running.remove(at);
                    self.end(job, DoneReason::Error(why));
                }
            }
        }
    }

    fn find(&mut self, at: usize) -> Result<(), Trouble> {
        for lane in 0..self.running[at].lanes.len() {
            let one = &self.running[at].lanes[lane];
            let (Some(seq), true) = (one.seq, one.pending() > 1) else {
                continue;
            };
            let mut cached = self.table.catch_up(seq)?;
            if let Some(disk) = &self.disk {
                cached = disk.fetch(&mut self.table, self.backend.as_mut(), seq)?;
            }
            let one = &self.running[at].lanes[lane];
            let next = &one.tokens[cached..one.findable().max(cached)];
            if let Some(found) = self.table.find_match(seq, next)? {
                if let Some(copy) = found.copy() {
                    self.copy(copy)?;
                }
                self.table.adopt(seq, found)?;
                cached = self.table.catch_up(seq)?;
            }
            let gained = self.running[at].find(lane, cached);
            self.shared.stats().cached_tokens += gained as u64;
        }
        Ok(())
    }

    fn copy(&mut self, copy: PageCopy) -> Result<(), Trouble> {
        let backend = self.backend.as_mut();
        let copied = catch_unwind(AssertUnwindSafe(|| copy_pages(backend, copy)));
        match copied {
            Ok(Ok(())) => Ok(()),
            Ok(Err(BackendError(error))) => Err(Trouble::Failed(format!(
                "copying a page of the cache failed: {error}"
            ))),
            Err(panic) => Err(Trouble::Failed(format!(
                "copying a page of the cache panicked: {}",
                message(&*panic)
            ))),
        }
    }

    /// What each running job can do in the next step. A page that several prompts share is filled by
    /// the first of them; the others wait for it.
    pub(super) fn demands(&self) -> Vec<Demand> {
        let mut writing = HashSet::new();
        let demand = |job: &Job| match job.demand() {
            Demand::Prefill(mut wanted) => {
                for (rows, lane) in wanted.iter_mut().zip(&job.lanes) {
                    let pages = lane.seq.and_then(|seq| self.table.block_table(seq).ok());
                    *rows = claim(pages, lane.cached, *rows, &mut writing);
                }
                match wanted.iter().all(|&rows| rows == 0) {
                    true => Demand::Nothing,
                    false => Demand::Prefill(wanted),
                }
            }
            other => other,
        };
        self.running.iter().map(demand).collect()
    }
}

/// A table for the pages of a backend that runs up to `seqs` sequences.
pub(super) fn table(backend: &dyn Backend, seqs: usize, reuse: bool) -> Result<PageTable> {
    let table = PageTable::new(backend.pages())?.with_reuse(reuse);
    let Some(window) = backend.window() else {
        return Ok(table);
    };
    let least = least_window_pages(window.tokens, (seqs, backend.max_rows()));
    if window.pages < least {
        let pages = window.pages;
        return Err(Error::Backend {
            reason: format!("{pages} window pages, steps of {seqs} sequences take {least}"),
        });
    }
    Ok(table.with_window(window.tokens, window.pages)?)
}

/// Copies a page with its window page.
pub(super) fn copy_pages(backend: &mut dyn Backend, copy: PageCopy) -> Result<(), BackendError> {
    backend.copy_page(copy.from.0, copy.to.0)?;
    match copy.window {
        Some((from, to)) => backend.copy_window_page(from.0, to.0),
        None => Ok(()),
    }
}

/// Rows of a sequence with `cached` tokens in the cache that can be written before a page which another
/// one writes.
pub(super) fn claim(
    pages: Option<&[u32]>,
    cached: usize,
    rows: usize,
    writing: &mut HashSet<u32>,
) -> usize {
    let (Some(pages), true) = (pages, rows > 0) else {
        return 0;
    };
    let first = cached / PAGE_TOKENS;
    for (place, page) in pages.iter().enumerate().skip(first) {
        let start = (place * PAGE_TOKENS).max(cached);
        if start >= cached + rows {
            break;
        }
        if !writing.insert(*page) {
            return start - cached;
        }
    }
    rows
}

/// Whether there are pages for a job's text, and beside other jobs for what all may need next.
fn has_pages(job: &Job, table: &PageTable, ahead: Option<usize>) -> bool {
    let prefixes = || job.lanes.iter().map(|lane| &lane.prefix);
    // What can never fit is taken out as well, to fail.
    if prefixes().any(|prefix| table.fits_now(prefix).is_err()) {
        return true;
    }
    let need: usize = prefixes().map(|prefix| table.pages_needed(prefix)).sum();
    need + ahead.map_or(0, |ahead| ahead + growing(job)) <= table.free_pages()
}

/// Lanes of a waiting job that will need more pages than its text so far.
fn growing(job: &Job) -> usize {
    let grows =
        |&lane: &usize| pages_for(job.longest(lane)) > pages_for(job.lanes[lane].tokens.len());
    (0..job.lanes.len()).filter(grows).count()
}

/// Why a job cannot go on now.
enum Trouble {
    OutOfPages,
    Failed(String),
}

impl From<CacheError> for Trouble {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::OutOfPages { .. } => Self::OutOfPages,
            error => Self::Failed(error.to_string()),
        }
    }
}
