//! Threads that carry out requests, one after another, while the caller does something else.
//!
//! A request is made of tasks. A task *waits*, is *in work*, and then *counts as done*, once. It
//! counts because it was carried out, because it failed, because the thread panicked, or because it
//! was given up before a thread began it. It is dropped before it counts, with all that it uses. A
//! request is done when all its tasks are. Its outcome is told from then on.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use crate::work::countdown::Countdown;
use crate::work::sync::thread::{self, JoinHandle};
use crate::work::sync::{Condvar, Mutex, lock, wait_while};
use crate::work::tasks::Tasks;

/// One request: the common part of its tasks, and the way to carry one out.
pub(crate) trait Work: Send + Sync + 'static {
    /// The tasks that nobody has begun.
    type Tasks: Tasks<Task: Send> + Default + Send;
    /// The fault that a task may meet.
    type Fault: Send;
    /// When the next request's tasks may be begun.
    const TURN: Turn;

    /// Carries out one task; whatever it uses is let go of.
    fn carry_out(&self, task: TaskOf<Self>) -> Result<(), Self::Fault>;
}

/// A task of some work.
pub(crate) type TaskOf<W> = <<W as Work>::Tasks as Tasks>::Task;

/// When the next request's tasks may be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// When all tasks of those before it are begun.
    WhenTaken,
    /// When all tasks of those before it are done.
    WhenDone,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lapse<E> {
    /// A task came upon this; those that nobody had begun were given up.
    Failed(E),
    /// A thread panicked, and has told so; the same.
    Panicked,
    /// It was given up before all tasks were begun.
    GivenUp,
}

/// Threads that carry out requests in the order in which they come.
///
/// Dropped, they first do all that was begun.
pub(crate) struct Crew<W: Work> {
    shared: Arc<Shared<W>>,
    threads: Vec<JoinHandle<()>>,
    /// Held by whoever carries out a request where there are no threads.
    alone: Mutex<()>,
}

/// A request that is being carried out, or waits for it.
pub(crate) struct Begun<W: Work> {
    shared: Arc<Shared<W>>,
    job: Arc<Job<W>>,
}

struct Job<W: Work> {
    work: W,
    /// The tasks that are left, and the lapse if one fails.
    progress: Countdown<Option<Lapse<W::Fault>>>,
}

/// A request that is not done.
struct Request<W: Work> {
    job: Arc<Job<W>>,
    tasks: W::Tasks,
}

struct Shared<W: Work> {
    waiting: Mutex<Waiting<W>>,
    /// There may be a task to take, or never one again.
    more: Condvar,
}

struct Waiting<W: Work> {
    requests: VecDeque<Request<W>>,
    closed: bool,
}

impl<W: Work> Crew<W> {
    /// Starts up to `threads` threads; where the system gives none, whoever asks does the work.
    pub(crate) fn start(name: &str, threads: NonZeroUsize) -> Self {
        let shared = Arc::new(Shared::new());
        let start = |worker| {
            let own = Arc::clone(&shared);
            let named = thread::Builder::new().name(name.to_owned());
            named.spawn(move || own.work(worker)).ok()
        };
        let threads = (0..threads.get()).map_while(start).collect();
        Self::of(shared, threads)
    }

    fn of(shared: Arc<Shared<W>>, threads: Vec<JoinHandle<()>>) -> Self {
        Self {
            shared,
            threads,
            alone: Mutex::new(()),
        }
    }

    /// Begins a request. One without tasks is done when its turn would come.
    pub(crate) fn begin(&self, work: W, tasks: W::Tasks) -> Begun<W> {
        let alone = self.threads.is_empty().then(|| lock(&self.alone));
        let job = self.shared.admit(work, tasks);
        if alone.is_some() {
            // All that waits is this: whoever else asks waits, too.
            while let Some((job, task)) = self.shared.take(0) {
                self.shared.carry_out(&job, task);
            }
        }
        let shared = Arc::clone(&self.shared);
        Begun { shared, job }
    }

    /// Gives up whatever nobody has begun.
    pub(crate) fn give_up(&self) {
        self.shared.give_up(|_| true);
    }
}

impl<W: Work> Drop for Crew<W> {
    fn drop(&mut self) {
        lock(&self.shared.waiting).closed = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // None panics: what it carries out may, and that is caught.
            let _ = thread.join();
        }
    }
}

impl<W: Work> Begun<W> {
    /// The common part of the tasks.
    pub(crate) fn work(&self) -> &W {
        &self.job.work
    }

    /// Waits for at most this long; what `look` says of why it was not carried out, None where it is not
    /// done.
    pub(crate) fn wait<R>(
        &self,
        timeout: Duration,
        look: impl FnOnce(&mut Option<Lapse<W::Fault>>) -> R,
    ) -> Option<R> {
        self.job.progress.wait(timeout, look)
    }

    /// Whether it is done, whatever became of it.
    pub(crate) fn is_done(&self) -> bool {
        self.job.progress.is_done()
    }

    /// Waits until it is.
    pub(crate) fn settle(&self) {
        self.job.progress.settle();
    }

    /// Gives up the tasks that nobody has begun.
    pub(crate) fn give_up(&self) {
        self.shared.give_up(|job| Arc::ptr_eq(job, &self.job));
    }
}

impl<W: Work> Shared<W> {
    fn new() -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                requests: VecDeque::new(),
                closed: false,
            }),
            more: Condvar::new(),
        }
    }

    /// Puts a request behind the others.
    fn admit(&self, work: W, tasks: W::Tasks) -> Arc<Job<W>> {
        let count = tasks.count();
        let progress = Countdown::new(count, None);
        let job = Arc::new(Job { work, progress });
        let mut waiting = lock(&self.waiting);
        if count == 0 {
            // Nothing to do is done when all before it is, where requests wait for each other.
            let last = waiting.requests.back();
            let last = last.filter(|_| W::TURN == Turn::WhenDone);
            return last.map_or(job, |last| Arc::clone(&last.job));
        }
        let request = Arc::clone(&job);
        waiting.requests.push_back(Request {
            job: request,
            tasks,
        });
        drop(waiting);
        self.more.notify_all();
        job
    }

    /// Works until the crew is closed and all is begun.
    fn work(&self, worker: usize) {
        while let Some((job, task)) = self.next(worker) {
            self.carry_out(&job, task);
        }
    }

    /// Waits for a task; None when there will be none.
    fn next(&self, worker: usize) -> Option<(Arc<Job<W>>, TaskOf<W>)> {
        let mut taken = None;
        let idle = |waiting: &mut Waiting<W>| {
            taken = waiting.take(worker);
            taken.is_none() && !waiting.is_over()
        };
        drop(wait_while(&self.more, &self.waiting, idle));
        taken
    }

    fn take(&self, worker: usize) -> Option<(Arc<Job<W>>, TaskOf<W>)> {
        lock(&self.waiting).take(worker)
    }

    fn carry_out(&self, job: &Arc<Job<W>>, task: TaskOf<W>) {
        // A task that panics is one that failed: the thread goes on.
        let work = AssertUnwindSafe(|| job.work.carry_out(task));
        let lapse = match panic::catch_unwind(work) {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(Lapse::Failed(fault)),
            Err(_) => Some(Lapse::Panicked),
        };
        if lapse.is_some() {
            self.give_up(|other| Arc::ptr_eq(other, job));
        }
        self.count(job, 1, lapse);
    }

    fn give_up(&self, is_meant: impl Fn(&Arc<Job<W>>) -> bool) {
        let given_up = lock(&self.waiting).withdraw(is_meant);
        for (job, tasks) in given_up {
            let count = tasks.count();
            // Let go of before they count.
            drop(tasks);
            if count > 0 {
                self.count(&job, count, Some(Lapse::GivenUp));
            }
        }
    }

    /// So many tasks of a job are done with.
    fn count(&self, job: &Arc<Job<W>>, tasks: usize, lapse: Option<Lapse<W::Fault>>) {
        let note = |known: &mut Option<_>| {
            // The first counts; that tasks were given up is what follows from others.
            if let (None | Some(Lapse::GivenUp), Some(_)) = (&known, &lapse) {
                *known = lapse;
            }
        };
        if job.progress.finish(tasks, note) {
            lock(&self.waiting).remove(job);
            self.more.notify_all();
        }
    }
}

impl<W: Work> Waiting<W> {
    /// The first task whose turn it is.
    fn take(&mut self, worker: usize) -> Option<(Arc<Job<W>>, TaskOf<W>)> {
        let reach = match W::TURN {
            Turn::WhenTaken => self.requests.len(),
            Turn::WhenDone => 1,
        };
        let mut requests = self.requests.iter_mut().take(reach);
        requests.find_map(|request| {
            let task = request.tasks.take(worker)?;
            Some((Arc::clone(&request.job), task))
        })
    }

    /// Whether nothing is left to be begun, nor ever will be.
    fn is_over(&self) -> bool {
        let is_begun = |request: &Request<W>| request.tasks.count() == 0;
        self.closed && self.requests.iter().all(is_begun)
    }

    /// Takes out the tasks that wait of some requests.
    fn withdraw(
        &mut self,
        is_meant: impl Fn(&Arc<Job<W>>) -> bool,
    ) -> Vec<(Arc<Job<W>>, W::Tasks)> {
        let requests = self.requests.iter_mut();
        let meant = requests.filter(|request| is_meant(&request.job));
        meant
            .map(|request| (Arc::clone(&request.job), std::mem::take(&mut request.tasks)))
            .collect()
    }

    /// Forgets a request that is done.
    fn remove(&mut self, job: &Arc<Job<W>>) {
        self.requests
            .retain(|request| !Arc::ptr_eq(&request.job, job));
    }
}

impl<W: Work> Clone for Begun<W> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            job: Arc::clone(&self.job),
        }
    }
}

impl<W: Work> fmt::Debug for Crew<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").finish_non_exhaustive()
    }
}

impl<W: Work> fmt::Debug for Begun<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Begun").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_models;
