//! Work shared among the threads of one call: tasks of a list, each taken by a thread that is free.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::thread;

use crate::work::sync::{AtomicBool, Mutex, lock};
use crate::work::tasks::{Apart, Tasks};

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
    employ(workers, &Shift::new(VecDeque::from(items)), work)
}

/// Does work that cannot fail, with a run of neighbours for each thread; one that is done helps at the
/// far end of the longest.
///
/// So threads write far apart: of several that touch a new page at a time, each has the system clear
/// one of its own, and all but one are thrown away.
pub(crate) fn drain_apart<T: Send>(items: Vec<T>, threads: NonZeroUsize, work: impl Fn(T) + Sync) {
    let workers = threads.get().min(items.len());
    let Ok(()) = employ(workers, &Shift::new(Apart::new(items, threads)), |item| {
        work(item);
        Ok::<(), Infallible>(())
    });
}

/// Work that is under way, and what has gone wrong with it.
struct Shift<P, E> {
    tasks: Mutex<P>,
    stop: AtomicBool,
    failure: Mutex<Option<E>>,
}

impl<P: Tasks, E> Shift<P, E> {
    fn new(tasks: P) -> Self {
        Self {
            tasks: Mutex::new(tasks),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Takes one task after the other until there is none, or one has failed.
    fn work(&self, worker: usize, work: impl Fn(P::Task) -> Result<(), E>) {
        while !self.stop.load(Ordering::Relaxed) {
            let Some(task) = lock(&self.tasks).take(worker) else {
                return;
            };
            if let Err(error) = work(task) {
                self.stop.store(true, Ordering::Relaxed);
                lock(&self.failure).get_or_insert(error);
            }
        }
    }

    /// The first error; for when all have ended.
    fn outcome(&self) -> Result<(), E> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }
}

/// Lets so many workers do all of it.
fn employ<P: Tasks + Send, E: Send>(
    workers: usize,
    shift: &Shift<P, E>,
    work: impl Fn(P::Task) -> Result<(), E> + Sync,
) -> Result<(), E> {
    if workers > 0 {
        let work = &work;
        thread::scope(|scope| {
            for worker in 1..workers {
                let run = move || shift.work(worker, work);
                let helper = thread::Builder::new().spawn_scoped(scope, run);
                // This thread works, too: where the system gives no more threads, fewer do it all.
                if helper.is_err() {
                    break;
                }
            }
            shift.work(0, work);
        });
    }
    shift.outcome()
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::Mutex;

    use super::{BAND_BYTES, bands, drain, drain_apart};

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).expect("tests employ somebody")
    }

    /// The items in the order in which they are taken, by either way of sharing.
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

#[cfg(test)]
#[cfg(loom)]
mod loom_models {
    use std::collections::VecDeque;

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::thread;

    use super::Shift;
    use crate::work::model_checking::check;

    const TASKS: usize = 3;

    /// Two threads that work until one has failed with a task of `failing`; how often each task was
    /// done, and the outcome.
    fn worked(failing: &'static [usize]) -> ([usize; TASKS], Result<(), usize>) {
        let shift = Arc::new(Shift::new((0..TASKS).collect::<VecDeque<_>>()));
        let done = Arc::new([0; TASKS].map(AtomicUsize::new));
        let run = |worker| {
            let (shift, done) = (Arc::clone(&shift), Arc::clone(&done));
            move || {
                shift.work(worker, |task| {
                    done[task].fetch_add(1, Relaxed);
                    if failing.contains(&task) {
                        Err(task)
                    } else {
                        Ok(())
                    }
                });
            }
        };
        let helper = thread::spawn(run(1));
        run(0)();
        helper.join().unwrap();
        let done = std::array::from_fn(|task| done[task].load(Relaxed));
        (done, shift.outcome())
    }

    #[test]
    fn every_task_is_done_once() {
        check(|| assert_eq!(worked(&[]), ([1; TASKS], Ok(()))));
    }

    #[test]
    fn an_error_is_told_and_ends_the_work() {
        check(|| {
            let (done, outcome) = worked(&[0]);
            assert_eq!(outcome, Err(0));
            // One task may have been begun before the error.
            assert!(matches!(done, [1, 0 | 1, 0 | 1]));
        });
    }

    #[test]
    fn one_of_two_errors_is_told() {
        check(|| {
            let (done, outcome) = worked(&[0, 1]);
            assert!(matches!(
                (done, outcome),
                ([1, 1, 0], Err(0 | 1)) | ([1, 0, 0], Err(0))
            ));
        });
    }
}
