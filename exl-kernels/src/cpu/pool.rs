//! A small thread pool: workers spin briefly between parallel regions, then sleep.
//!
//! A region never waits for a worker that has not begun: on a busy machine the caller does the
//! work of threads that get no processor, and they miss the region.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Spins before a waiting thread sleeps: about 50 microseconds, longer than the serial gap between
/// two ops of a decode step, far shorter than a scheduler slice.
const SPINS: u32 = 4000;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The work of a region. The pointer is valid while a thread is counted in the region's gate.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

// SAFETY: the task behind the pointer is `Sync`, and `Pool::run` outlives every use of it.
unsafe impl Send for Job {}

/// Bit of the gate that lets workers in; the bits below count workers inside, the bits above
/// count regions.
const OPEN: u64 = 1 << 16;
const REGION: u64 = 2 * OPEN;

struct Shared {
    gate: AtomicU64,
    next: AtomicUsize,
    stop: AtomicBool,
    job: Mutex<Option<Job>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    done: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Worker threads that run parallel regions together with the caller.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time; callers from several threads take turns.
    region: Mutex<()>,
    spins: u32,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller included; 0 means every core this process may use.
    pub fn new(threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores } else { threads };
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            panic: Mutex::new(None),
        });
        // More threads than cores would spin against each other.
        let spins = if threads <= cores { SPINS } else { 0 };
        let workers = (1..threads.min(OPEN as usize))
            .filter_map(|thread| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("exl-cpu-{thread}"))
                    .spawn(move || worker(&shared, thread, spins))
                    .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            region: Mutex::new(()),
            spins,
        }
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(index, thread)` once for every index below `tasks`, on all threads; returns
    /// when all calls did. `thread` is below [`Pool::threads`] and unique among concurrent calls.
    /// A task must not call this function of the same pool.
    ///
    /// # Panics
    /// Passes on the first panic of a task, after every thread has left the region.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|i| task(i, 0));
            return;
        }
        let _region = lock(&self.region);
        let shared = &*self.shared;
        let pointer: *const Task<'_> = task;
        // SAFETY: only the lifetime changes; workers stop using the pointer before `run` returns.
        let pointer: *const Task<'static> = unsafe { std::mem::transmute(pointer) };
        let job = Job {
            task: pointer,
            tasks,
        };
        *lock(&shared.job) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        // The gate is closed and nobody is inside: this opens the next region.
        shared.gate.fetch_add(REGION | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&shared.lock);
            shared.wake.notify_all();
        }
        claim(shared, job, 0);
        shared.gate.fetch_and(!OPEN, Ordering::SeqCst);
        self.wait_for_workers();
        if let Some(payload) = lock(&shared.panic).take() {
            resume_unwind(payload);
        }
    }

    fn wait_for_workers(&self) {
        let shared = &*self.shared;
        let inside = || shared.gate.load(Ordering::SeqCst) & (OPEN - 1) != 0;
        for _ in 0..self.spins {
            if !inside() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&shared.lock);
        while inside() {
            guard = wait(&shared.done, guard);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.gate.fetch_add(REGION, Ordering::SeqCst);
        {
            let _guard = lock(&self.shared.lock);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker never unwinds: its panics are caught and handed to the caller.
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a>(condition: &Condvar, guard: MutexGuard<'a, ()>) -> MutexGuard<'a, ()> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

fn claim(shared: &Shared, job: Job, thread: usize) {
    // SAFETY: `Pool::run` keeps the task alive until every thread has left this function.
    let task = unsafe { &*job.task };
    let work = AssertUnwindSafe(|| {
        loop {
            let index = shared.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.tasks {
                break;
            }
            task(index, thread);
        }
    });
    if let Err(payload) = catch_unwind(work) {
        shared.next.store(job.tasks, Ordering::Relaxed);
        lock(&shared.panic).get_or_insert(payload);
    }
}

fn worker(shared: &Shared, thread: usize, spins: u32) {
    let mut seen = 0;
    loop {
        let gate = wait_for_region(shared, seen, spins);
        seen = gate / REGION;
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if !enter(shared, gate) {
            continue;
        }
        let job = *lock(&shared.job);
        if let Some(job) = job {
            claim(shared, job, thread);
        }
        // The last one to leave a closed region wakes the caller if it sleeps.
        if shared.gate.fetch_sub(1, Ordering::SeqCst) & (OPEN | (OPEN - 1)) == 1 {
            let _guard = lock(&shared.lock);
            shared.done.notify_all();
        }
    }
}

/// Counts the thread in, unless the region that it saw has been closed.
fn enter(shared: &Shared, mut gate: u64) -> bool {
    let region = gate / REGION;
    while gate & OPEN != 0 && gate / REGION == region {
        match shared
            .gate
            .compare_exchange_weak(gate, gate + 1, Ordering::SeqCst, Ordering::SeqCst)
        {
            Ok(_) => return true,
            Err(now) => gate = now,
        }
    }
    false
}

/// The gate, once it belongs to another region than `seen`.
fn wait_for_region(shared: &Shared, seen: u64, spins: u32) -> u64 {
    for _ in 0..spins {
        let gate = shared.gate.load(Ordering::SeqCst);
        if gate / REGION != seen {
            return gate;
        }
        std::hint::spin_loop();
    }
    let mut guard = lock(&shared.lock);
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    loop {
        let gate = shared.gate.load(Ordering::SeqCst);
        if gate / REGION != seen {
            shared.sleepers.fetch_sub(1, Ordering::SeqCst);
            return gate;
        }
        guard = wait(&shared.wake, guard);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, &|i, thread| {
                        assert!(thread < threads);
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|i, _| assert_ne!(i, 57, "task 57"));
        }));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(10, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, &|i, _| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 500 * 3);
    }
}
