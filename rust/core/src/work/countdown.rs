//! A count of the tasks that are left of some work, and its outcome.

use std::time::Duration;

use crate::work::sync::{Condvar, Mutex, lock, wait_while, wait_while_within};

/// Work in tasks, and its outcome. Threads count down the tasks that they do; others wait.
///
/// A thread that sees a task counted as done also sees all that was written before it counted.
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

impl<T> Counted<T> {
    fn is_unfinished(&mut self) -> bool {
        self.left > 0
    }
}

impl<T> Countdown<T> {
    /// So many tasks, none of which is done.
    pub(crate) fn new(tasks: usize, outcome: T) -> Self {
        let left = tasks;
        Self {
            counted: Mutex::new(Counted { left, outcome }),
            done: Condvar::new(),
        }
    }

    /// So many tasks, at least one, are done with, as `note` says; whether they were the last.
    pub(crate) fn finish(&self, tasks: usize, note: impl FnOnce(&mut T)) -> bool {
        let mut counted = lock(&self.counted);
        debug_assert!((1..=counted.left).contains(&tasks), "tasks count once");
        counted.left = counted.left.saturating_sub(tasks);
        note(&mut counted.outcome);
        let last = counted.left == 0;
        if last {
            self.done.notify_all();
        }
        last
    }

    /// Whether all tasks are done with.
    pub(crate) fn is_done(&self) -> bool {
        lock(&self.counted).left == 0
    }

    /// Waits for them for at most this long; what `look` says of the outcome, None where some are left.
    pub(crate) fn wait<R>(&self, timeout: Duration, look: impl FnOnce(&mut T) -> R) -> Option<R> {
        let unfinished = Counted::is_unfinished;
        let mut counted = wait_while_within(&self.done, &self.counted, timeout, unfinished);
        (counted.left == 0).then(|| look(&mut counted.outcome))
    }

    /// Waits for them.
    pub(crate) fn settle(&self) {
        drop(wait_while(
            &self.done,
            &self.counted,
            Counted::is_unfinished,
        ));
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::Countdown;

    #[test]
    fn a_countdown_tells_its_outcome_when_all_tasks_are_done() {
        let countdown = Countdown::new(4, Vec::new());
        assert!(!countdown.finish(2, |done| done.push(1)));
        assert_eq!(countdown.wait(Duration::ZERO, |done| done.clone()), None);
        assert!(!countdown.is_done());
        thread::scope(|scope| {
            let waiting = [(); 2].map(|()| scope.spawn(|| countdown.settle()));
            assert!(!countdown.finish(1, |done| done.push(2)));
            assert!(countdown.finish(1, |done| done.push(3)));
            for thread in waiting {
                thread.join().unwrap();
            }
        });
        let known = countdown.wait(Duration::ZERO, |done| done.clone());
        assert_eq!(known, Some(vec![1, 2, 3]));
        assert!(countdown.is_done());
        assert!(Countdown::new(0, ()).is_done());
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_models {
    use std::time::Duration;

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::thread;

    use super::Countdown;
    use crate::work::model_checking::check;

    /// Memory that two threads fill, and the countdown that says when it is filled.
    struct Shared {
        memory: [AtomicUsize; 2],
        countdown: Countdown<usize>,
    }

    impl Shared {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                memory: [0, 0].map(AtomicUsize::new),
                countdown: Countdown::new(2, 0),
            })
        }

        /// Fills one place; whether it was the last.
        fn fill(&self, place: usize) -> bool {
            self.memory[place].store(1, Relaxed);
            self.countdown.finish(1, |noted| *noted += 1)
        }

        fn assert_filled(&self) {
            assert!(self.memory.iter().all(|place| place.load(Relaxed) == 1));
        }
    }

    fn spawn<T: 'static>(
        shared: &Arc<Shared>,
        act: impl FnOnce(&Shared) -> T + 'static,
    ) -> thread::JoinHandle<T> {
        let own = Arc::clone(shared);
        thread::spawn(move || act(&own))
    }

    #[test]
    fn two_that_wait_see_all_that_was_done_and_one_was_the_last() {
        check(|| {
            let shared = Shared::new();
            let filling = [0, 1].map(|place| spawn(&shared, move |own| own.fill(place)));
            let waiting = spawn(&shared, |own| {
                own.countdown.settle();
                own.assert_filled();
            });
            assert_eq!(
                shared.countdown.wait(Duration::MAX, |noted| *noted),
                Some(2)
            );
            shared.assert_filled();
            waiting.join().unwrap();
            let last = filling.map(|thread| thread.join().unwrap());
            assert_eq!(last.iter().filter(|&&last| last).count(), 1);
        });
    }

    #[test]
    fn a_wait_that_ends_early_tells_so() {
        check(|| {
            let shared = Shared::new();
            let filling = [0, 1].map(|place| spawn(&shared, move |own| own.fill(place)));
            if shared.countdown.is_done() {
                shared.assert_filled();
            }
            match shared.countdown.wait(Duration::ZERO, |noted| *noted) {
                Some(noted) => {
                    assert_eq!(noted, 2);
                    shared.assert_filled();
                }
                None => assert_eq!(
                    shared.countdown.wait(Duration::MAX, |noted| *noted),
                    Some(2)
                ),
            }
            shared.assert_filled();
            for thread in filling {
                thread.join().unwrap();
            }
        });
    }
}
