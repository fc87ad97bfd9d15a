//! Work shared among threads: pieces of one list, each taken by whoever is free.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// About the size of a band: many per factor, so that threads end together, yet long runs of memory.
const BAND_BYTES: usize = 512 * 1024;

/// Cuts memory of units of one size into bands, each with the number of its first unit.
///
/// All bands but the last hold a multiple of `together` units; there is at least one unit of at least
/// one byte, or no memory.
pub(crate) fn bands(
    memory: &mut [u8],
    unit_bytes: usize,
    together: usize,
) -> impl Iterator<Item = (usize, &mut [u8])> {
    let units = (BAND_BYTES / unit_bytes.max(1)).max(1);
    let units = units.next_multiple_of(together);
    let bands = memory.chunks_mut(units * unit_bytes.max(1));
    (0..).step_by(units).zip(bands)
}

/// Does all the work in the order of the list, with up to `threads` threads, this one among them;
/// the first error stops every worker.
pub(crate) fn drain<T: Send, E: Send>(
    items: Vec<T>,
    threads: NonZeroUsize,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let workers = threads.get().min(items.len());
    let queue = Mutex::new(items.into_iter());
    employ(workers, |_| lock(&queue).next(), work)
}

/// Does work that cannot fail, with a run of neighbours for each thread; one that is done helps at the
/// far end of the longest.
///
/// So threads write far apart: of several that touch a new page at a time, each has the system clear
/// one of its own, and all but one are thrown away.
pub(crate) fn drain_apart<T: Send>(items: Vec<T>, threads: NonZeroUsize, work: impl Fn(T) + Sync) {
    let workers = threads.get().min(items.len());
    let items = Apart::new(items, threads);
    let take = |worker| items.take(worker);
    let Ok(()) = employ(workers, take, |item| {
        work(item);
        Ok::<(), Infallible>(())
    });
}

/// A list of which each worker has a run of neighbours.
#[derive(Debug)]
pub(crate) struct Apart<T> {
    runs: Mutex<Vec<VecDeque<T>>>,
}

impl<T> Apart<T> {
    /// Shares a list among so many workers.
    pub(crate) fn new(items: Vec<T>, workers: NonZeroUsize) -> Self {
        let longest = items.len().div_ceil(workers.get());
        let mut items = items.into_iter();
        let runs = (0..workers.get()).map(|_| items.by_ref().take(longest).collect());
        Self {
            runs: Mutex::new(runs.collect()),
        }
    }

    /// The next of a worker's own items, else the last of the longest run; None when all are taken.
    pub(crate) fn take(&self, worker: usize) -> Option<T> {
        let mut runs = lock(&self.runs);
        let own = runs.get_mut(worker).and_then(VecDeque::pop_front);
        own.or_else(|| {
            let longest = runs.iter_mut().max_by_key(|run| run.len());
            longest.and_then(VecDeque::pop_back)
        })
    }
}

/// Work in pieces, and what became of it: counted down by whoever does them, waited for by others.
#[derive(Debug)]
pub(crate) struct Countdown<T> {
    counted: Mutex<Counted<T>>,
    done: Condvar,
}

#[derive(Debug)]
struct Counted<T> {
    left: usize,
    outcome: T,
}

impl<T> Countdown<T> {
    /// So many pieces, none of which is done.
    pub(crate) fn new(pieces: usize, outcome: T) -> Self {
        Self {
            counted: Mutex::new(Counted {
                left: pieces,
                outcome,
            }),
            done: Condvar::new(),
        }
    }

    /// Looks at, or changes, what is known so far.
    pub(crate) fn known<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut lock(&self.counted).outcome)
    }

    /// One piece is done with, as `note` says; whether it was the last.
    pub(crate) fn finish(&self, note: impl FnOnce(&mut T)) -> bool {
        let mut counted = lock(&self.counted);
        counted.left = counted.left.saturating_sub(1);
        note(&mut counted.outcome);
        let last = counted.left == 0;
        if last {
            self.done.notify_all();
        }
        last
    }

    /// Whether all pieces are done with.
    pub(crate) fn is_done(&self) -> bool {
        lock(&self.counted).left == 0
    }

    /// Waits for them for at most this long; what `look` says of the outcome, None where some are left.
    pub(crate) fn wait<R>(&self, timeout: Duration, look: impl FnOnce(&mut T) -> R) -> Option<R> {
        let counted = lock(&self.counted);
        let unfinished = |counted: &mut Counted<T>| counted.left > 0;
        let waited = self.done.wait_timeout_while(counted, timeout, unfinished);
        let (mut counted, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (counted.left == 0).then(|| look(&mut counted.outcome))
    }

    /// Waits for them.
    pub(crate) fn settle(&self) {
        let unfinished = |counted: &mut Counted<T>| counted.left > 0;
        drop(self.done.wait_while(lock(&self.counted), unfinished));
    }
}

/// Threads that work until their queue tells them that it is closed.
#[derive(Debug)]
pub(crate) struct Crew {
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts up to `threads` threads, each with its number; fewer where the system gives no more.
    pub(crate) fn start(
        name: &str,
        threads: NonZeroUsize,
        work: impl Fn(usize) + Clone + Send + 'static,
    ) -> Self {
        let start = |worker| {
            let work = work.clone();
            let named = thread::Builder::new().name(name.to_owned());
            named.spawn(move || work(worker)).ok()
        };
        Self {
            threads: (0..threads.get()).map_while(start).collect(),
        }
    }

    /// Whether the system gave none.
    pub(crate) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Waits until all have ended.
    pub(crate) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // One that panicked has told so; what it had to do does not count as done.
            let _ = thread.join();
        }
    }
}

/// Lets every worker, by its number, take one item after the other until there is none.
fn employ<T, E: Send>(
    workers: usize,
    take: impl Fn(usize) -> Option<T> + Sync,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let failure = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let run = |worker: usize| {
        while !stop.load(Ordering::Relaxed) {
            let Some(item) = take(worker) else { return };
            if let Err(error) = work(item) {
                stop.store(true, Ordering::Relaxed);
                lock(&failure).get_or_insert(error);
            }
        }
    };
    if workers > 0 {
        let run = &run;
        thread::scope(|scope| {
            for worker in 1..workers {
                let helper = thread::Builder::new().spawn_scoped(scope, move || run(worker));
                // This thread works, too: where the system gives no more threads, fewer do it all.
                if helper.is_err() {
                    break;
                }
            }
            run(0);
        });
    }
    failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// Locks, whoever panicked before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::Mutex;
    use std::thread;
    use std::time::Duration;

    use super::{BAND_BYTES, Countdown, bands, drain, drain_apart};

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).expect("tests employ somebody")
    }

    /// What is taken, in order, by either way of sharing.
    fn taken(items: usize, workers: usize) -> [Vec<usize>; 2] {
        let (one, other) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        let done = drain((0..items).collect(), threads(workers), |item| {
            one.lock().unwrap().push(item);
            Ok::<(), ()>(())
        });
        assert_eq!(done, Ok(()));
        drain_apart((0..items).collect(), threads(workers), |item| {
            other.lock().unwrap().push(item);
        });
        [one, other].map(|taken| taken.into_inner().unwrap())
    }

    #[test]
    fn every_item_is_taken_once() {
        for (items, workers) in [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (100, 7), (10, 1)] {
            for mut taken in taken(items, workers) {
                taken.sort_unstable();
                assert_eq!(taken, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn one_worker_keeps_the_order() {
        for taken in taken(10, 1) {
            assert_eq!(taken, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        let work = |item| if item == 2 { Err(item) } else { Ok(()) };
        assert_eq!(drain((0..9).collect(), threads(2), work), Err(2));
    }

    #[test]
    fn a_countdown_tells_its_outcome_when_all_pieces_are_done() {
        let countdown = Countdown::new(3, Vec::new());
        assert!(!countdown.finish(|done| done.push(1)));
        assert_eq!(countdown.wait(Duration::ZERO, |done| done.clone()), None);
        assert!(!countdown.is_done());
        thread::scope(|scope| {
            let waiting = [(); 2].map(|()| scope.spawn(|| countdown.settle()));
            assert!(!countdown.finish(|done| done.push(2)));
            assert!(countdown.finish(|done| done.push(3)));
            for thread in waiting {
                thread.join().unwrap();
            }
        });
        let known = countdown.wait(Duration::ZERO, |done| done.clone());
        assert_eq!(known, Some(vec![1, 2, 3]));
        assert!(countdown.is_done());
        assert!(Countdown::new(0, ()).is_done());
    }

    #[test]
    fn bands_are_whole_and_leave_nothing_out() {
        for (unit_bytes, together, units) in [(1000, 32, 2000), (BAND_BYTES * 2, 1, 3), (7, 1, 1)] {
            let mut memory = vec![0_u8; unit_bytes * units];
            let mut next = 0;
            for (first, band) in bands(&mut memory, unit_bytes, together) {
                assert_eq!(first, next);
                assert_eq!(first % together, 0);
                assert_eq!(band.len() % unit_bytes, 0);
                next += band.len() / unit_bytes;
            }
            assert_eq!(next, units);
        }
        assert_eq!(bands(&mut [], 0, 1).count(), 0);
    }
}
