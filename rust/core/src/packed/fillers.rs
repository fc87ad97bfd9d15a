//! Threads that fill composed factors while somebody else does something else: one request after
//! another, without a pause in between.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::band::{self, Band};
use super::{PackError, Recipe, check_all};
use crate::queue::{Apart, Countdown, Crew, lock};

/// Threads that carry out recipes in the order in which they come.
///
/// Dropped, they first do all that was begun.
#[derive(Debug)]
pub struct Fillers {
    queue: Arc<Queue>,
    threads: Crew,
    wanted: NonZeroUsize,
}

/// Recipes that are being carried out, or wait for it.
#[derive(Debug, Clone)]
pub struct Filling {
    job: Arc<Job>,
}

/// A thread panicked while it filled, and has told so; what was to be filled is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("filling memory failed: a thread panicked")]
pub struct FillPanic;

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The first is being carried out.
    jobs: VecDeque<Arc<Job>>,
    closed: bool,
}

/// One request.
#[derive(Debug)]
struct Job {
    bands: Apart<Band<'static>>,
    /// Whether a thread has found no band left.
    taken: AtomicBool,
    /// Of bands; whether one panicked.
    progress: Countdown<bool>,
}

impl Fillers {
    /// Starts up to `threads` threads; where the system gives none, filling happens when asked for.
    pub fn new(threads: NonZeroUsize) -> Self {
        let queue = Arc::new(Queue::default());
        let own = Arc::clone(&queue);
        Self {
            threads: Crew::start("qwenlora-fill", threads, move |worker| own.work(worker)),
            queue,
            wanted: threads,
        }
    }

    /// Begins to carry out recipes, when all that was begun before is done.
    ///
    /// Every recipe is checked before. Their memory must not be used until [`Filling::wait`] says
    /// that it is filled.
    pub fn fill(&self, recipes: Vec<Recipe<'static>>) -> Result<Filling, PackError> {
        check_all(&recipes)?;
        let bands: Vec<_> = recipes.into_iter().flat_map(band::cut).collect();
        let is_empty = bands.is_empty();
        let job = Arc::new(Job::new(bands, self.wanted));
        let mut waiting = lock(&self.queue.waiting);
        if is_empty {
            // Nothing to do is done when all before it is.
            let job = waiting.jobs.back().map_or(job, Arc::clone);
            return Ok(Filling { job });
        }
        waiting.jobs.push_back(Arc::clone(&job));
        drop(waiting);
        if self.threads.is_empty() {
            self.queue.carry_out(&job, 0);
        } else {
            self.queue.more.notify_all();
        }
        Ok(Filling { job })
    }
}

impl Drop for Fillers {
    fn drop(&mut self) {
        lock(&self.queue.waiting).closed = true;
        self.queue.more.notify_all();
        self.threads.join();
    }
}

impl Filling {
    /// Waits for at most this long; whether all is filled.
    pub fn wait(&self, timeout: Duration) -> Result<bool, FillPanic> {
        match self.job.progress.wait(timeout, |panicked| *panicked) {
            None => Ok(false),
            Some(true) => Err(FillPanic),
            Some(false) => Ok(true),
        }
    }

    /// Whether nobody uses the recipes' memory any more.
    pub fn is_done(&self) -> bool {
        self.job.progress.is_done()
    }

    /// Waits until nobody does.
    pub fn settle(&self) {
        self.job.progress.settle();
    }
}

impl Queue {
    fn work(&self, worker: usize) {
        while let Some(job) = self.next() {
            self.carry_out(&job, worker);
        }
    }

    /// The first job, as long as it has work for anybody; None when there will be no more.
    fn next(&self) -> Option<Arc<Job>> {
        let idle = |waiting: &mut Waiting| match waiting.jobs.front() {
            Some(job) => job.taken.load(Ordering::Relaxed),
            None => !waiting.closed,
        };
        let waited = self.more.wait_while(lock(&self.waiting), idle);
        let waiting = waited.unwrap_or_else(PoisonError::into_inner);
        waiting.jobs.front().map(Arc::clone)
    }

    fn carry_out(&self, job: &Job, worker: usize) {
        while let Some(band) = job.bands.take(worker) {
            // A thread that panics leaves the next band to the others, and to itself.
            let filled = panic::catch_unwind(AssertUnwindSafe(|| band.fill()));
            if job.progress.finish(|panicked| *panicked |= filled.is_err()) {
                lock(&self.waiting).jobs.pop_front();
                self.more.notify_all();
            }
        }
        job.taken.store(true, Ordering::Relaxed);
    }
}

impl Job {
    fn new(bands: Vec<Band<'static>>, threads: NonZeroUsize) -> Self {
        Self {
            progress: Countdown::new(bands.len(), false),
            bands: Apart::new(bands, threads),
            taken: AtomicBool::new(false),
        }
    }
}
