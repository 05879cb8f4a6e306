//! Jobs that wait for a place.

use std::cmp::Reverse;
use std::collections::VecDeque;

use crate::job::Job;
use crate::request::JobId;
use crate::schedule::next_start;

/// Waiting jobs that are looked at for one that fits, so that thousands of them cost nothing.
const LOOK: usize = 16;

/// Waiting jobs in the order they are to start: the most urgent first, then the oldest.
#[derive(Default)]
pub(super) struct Queue {
    jobs: VecDeque<Job>,
}

/// Where a job stands among others; the least comes first.
pub(super) fn rank(job: &Job) -> (Reverse<i64>, JobId) {
    (Reverse(job.level()), job.id)
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(super) fn push(&mut self, job: Job) {
        let at = self.jobs.partition_point(|other| rank(other) < rank(&job));
        self.jobs.insert(at, job);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.jobs.iter()
    }

    pub(super) fn first(&self) -> Option<&Job> {
        self.jobs.front()
    }

    pub(super) fn take(&mut self, id: JobId) -> Option<Job> {
        let at = self.jobs.iter().position(|job| job.id == id)?;
        self.jobs.remove(at)
    }

    /// Takes out the next job that `fits`, if one may start. All that it overtakes are a little more
    /// urgent from then on.
    pub(super) fn start(&mut self, fits: impl Fn(&Job) -> bool) -> Option<Job> {
        let skips = self.jobs.iter().take(LOOK).map(|job| job.skips);
        let at = next_start(skips, |at| fits(&self.jobs[at]))?;
        let job = self.jobs.remove(at)?;
        let mut moved = false;
        for (place, other) in self.jobs.iter_mut().enumerate() {
            if place < at || other.id < job.id {
                let level = other.level();
                other.skips += 1;
                moved |= other.level() != level;
            }
        }
        if moved {
            self.jobs.make_contiguous().sort_by_key(rank);
        }
        Some(job)
    }
}
