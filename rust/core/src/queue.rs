//! Work shared among threads: pieces of one list, each taken by whoever is free.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

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

/// The same, with a run of neighbours for each thread; one that is done helps at the far end of the
/// longest.
///
/// So threads write far apart: of several that touch a new page at a time, each has the system clear
/// one of its own, and all but one are thrown away.
pub(crate) fn drain_apart<T: Send, E: Send>(
    items: Vec<T>,
    threads: NonZeroUsize,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let workers = threads.get().min(items.len());
    let longest = items.len().div_ceil(threads.get());
    let mut items = items.into_iter();
    let runs = (0..workers).map(|_| items.by_ref().take(longest).collect());
    let runs: Mutex<Vec<VecDeque<T>>> = Mutex::new(runs.collect());
    let take = |worker: usize| {
        let mut runs = lock(&runs);
        runs[worker].pop_front().or_else(|| {
            let longest = runs.iter_mut().max_by_key(|run| run.len());
            longest.and_then(VecDeque::pop_back)
        })
    };
    employ(workers, take, work)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::Mutex;

    use super::{drain, drain_apart};

    type Drain = fn(
        Vec<usize>,
        NonZeroUsize,
        &(dyn Fn(usize) -> Result<(), usize> + Sync),
    ) -> Result<(), usize>;

    const BOTH: [Drain; 2] = [
        |items, threads, work| drain(items, threads, work),
        |items, threads, work| drain_apart(items, threads, work),
    ];

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).expect("tests employ somebody")
    }

    #[test]
    fn every_item_is_taken_once() {
        for drain in BOTH {
            for (items, workers) in [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (100, 7), (10, 1)] {
                let taken = Mutex::new(Vec::new());
                let take = |item| {
                    taken.lock().unwrap().push(item);
                    Ok(())
                };
                assert_eq!(drain((0..items).collect(), threads(workers), &take), Ok(()));
                let mut taken = taken.into_inner().unwrap();
                taken.sort_unstable();
                assert_eq!(taken, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        for drain in BOTH {
            let fail = |item| if item == 2 { Err(item) } else { Ok(()) };
            assert_eq!(drain((0..9).collect(), threads(2), &fail), Err(2));
        }
    }

    #[test]
    fn one_worker_keeps_the_order() {
        for drain in BOTH {
            let taken = Mutex::new(Vec::new());
            let take = |item| {
                taken.lock().unwrap().push(item);
                Ok(())
            };
            drain(vec![3, 1, 2], threads(1), &take).unwrap();
            assert_eq!(taken.into_inner().unwrap(), [3, 1, 2]);
        }
    }
}
