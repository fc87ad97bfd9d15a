//! Tasks of work that nobody has begun: one line for all workers, or a run for each.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

/// Tasks of work that nobody has begun.
pub(crate) trait Tasks {
    /// One of them.
    type Task;

    /// How many there are.
    fn count(&self) -> usize;

    /// The next one for a worker, by its number; None when all are taken.
    fn take(&mut self, worker: usize) -> Option<Self::Task>;
}

/// In order, whoever takes them.
impl<T> Tasks for VecDeque<T> {
    type Task = T;

    fn count(&self) -> usize {
        self.len()
    }

    fn take(&mut self, _worker: usize) -> Option<T> {
        self.pop_front()
    }
}

/// A list of which each worker has a run of neighbours.
#[derive(Debug)]
pub(crate) struct Apart<T> {
    runs: Vec<VecDeque<T>>,
}

impl<T> Apart<T> {
    /// Shares a list among so many workers.
    pub(crate) fn new(items: Vec<T>, workers: NonZeroUsize) -> Self {
        let longest = items.len().div_ceil(workers.get());
        let mut items = items.into_iter();
        let runs = (0..workers.get()).map(|_| items.by_ref().take(longest).collect());
        Self {
            runs: runs.collect(),
        }
    }
}

impl<T> Default for Apart<T> {
    fn default() -> Self {
        Self { runs: Vec::new() }
    }
}

/// A worker's own first, then the last of the longest run.
impl<T> Tasks for Apart<T> {
    type Task = T;

    fn count(&self) -> usize {
        self.runs.iter().map(VecDeque::len).sum()
    }

    fn take(&mut self, worker: usize) -> Option<T> {
        let own = self.runs.get_mut(worker).and_then(VecDeque::pop_front);
        own.or_else(|| {
            let longest = self.runs.iter_mut().max_by_key(|run| run.len());
            longest.and_then(VecDeque::pop_back)
        })
    }
}
