//! Threads that read on while somebody else uses what was read: one buffer after another, without
//! a pause in between.

use std::collections::VecDeque;
use std::mem;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::ranges::{self, ByteRange, Piece};
use super::{SourceError, SourceFile};
use crate::magnitude::{Magnitudes, Pattern};
use crate::queue::{Countdown, Crew, lock};

/// Threads that read ranges of files into buffers, in the order in which that was asked for.
///
/// Dropped, they finish the reads they are in, and begin no more.
#[derive(Debug)]
pub struct Readers {
    queue: Arc<Queue>,
    threads: Crew,
}

/// A buffer that is being filled.
///
/// Dropped, it waits until no thread writes to the buffer any more.
#[derive(Debug)]
pub struct Reading {
    job: Arc<Job>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    tasks: VecDeque<Task>,
    closed: bool,
}

#[derive(Debug)]
struct Task {
    piece: Piece<'static>,
    // Not of the job: the file is closed as soon as nothing reads it.
    source: Arc<SourceFile>,
    job: Arc<Job>,
}

/// What is known of one buffer.
#[derive(Debug)]
struct Job {
    path: PathBuf,
    measured: Option<Magnitudes>,
    /// The pattern of the largest magnitude so far.
    largest: AtomicU32,
    /// Of pieces.
    progress: Countdown<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    cancelled: bool,
    failure: Option<SourceError>,
}

impl Readers {
    /// Starts up to `threads` threads; where the system gives none, reading happens when asked for.
    pub fn new(threads: NonZeroUsize) -> Self {
        let queue = Arc::new(Queue::default());
        let own = Arc::clone(&queue);
        let threads = Crew::start("qwenlora-read", threads, move |_| own.work());
        Self { queue, threads }
    }

    /// Begins to fill parts of `dest` with parts of a file.
    ///
    /// All ranges are checked before, as [`SourceFile::read_ranges`] does. `dest` must not be used
    /// until [`Reading::wait`] has returned, or the reading is dropped.
    ///
    /// # Arguments
    /// `measured`: What all ranges hold, where the largest magnitude is wanted, too: it costs least
    /// while values are in the cache of the core that read them.
    pub fn read(
        &self,
        source: &Arc<SourceFile>,
        ranges: &[ByteRange],
        dest: &'static mut [u8],
        measured: Option<Magnitudes>,
    ) -> Result<Reading, SourceError> {
        let pieces = source.cut(ranges, dest)?;
        if let Some(magnitudes) = measured {
            let checked = ranges::check_values(ranges, magnitudes);
            checked.map_err(|fault| source.fault(fault))?;
        }
        let path = source.path().to_owned();
        let job = Arc::new(Job::new(path, measured, pieces.len()));
        let tasks = pieces.into_iter().map(|piece| Task {
            piece,
            source: Arc::clone(source),
            job: Arc::clone(&job),
        });
        if self.threads.is_empty() {
            tasks.for_each(Task::run);
        } else {
            lock(&self.queue.waiting).tasks.extend(tasks);
            self.queue.more.notify_all();
        }
        Ok(Reading { job })
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut waiting = lock(&self.queue.waiting);
        waiting.closed = true;
        for Task { piece, source, job } in waiting.tasks.drain(..) {
            drop((piece, source));
            job.finish(End::Cancelled);
        }
        drop(waiting);
        self.queue.more.notify_all();
        self.threads.join();
    }
}

impl Reading {
    /// Waits for at most this long; whether the buffer is filled.
    ///
    /// An error is told once; from then on, and where the readers were dropped before they had
    /// filled it, [`SourceError::Stopped`] is.
    pub fn wait(&self, timeout: Duration) -> Result<bool, SourceError> {
        let outcome = |progress: &mut Progress| match progress.failure.take() {
            Some(error) => {
                progress.cancelled = true;
                Err(error)
            }
            None if progress.cancelled => Err(SourceError::Stopped {
                path: self.job.path.clone(),
            }),
            None => Ok(true),
        };
        let waited = self.job.progress.wait(timeout, outcome);
        waited.unwrap_or(Ok(false))
    }

    /// The largest magnitude in a buffer that is filled; NaN where there is one. None where nobody
    /// asked for it.
    pub fn peak(&self) -> Option<f64> {
        self.job.peak()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.job.cancel();
        self.job.progress.settle();
    }
}

impl Queue {
    fn work(&self) {
        while let Some(task) = self.next() {
            task.run();
        }
    }

    fn next(&self) -> Option<Task> {
        let waiting = lock(&self.waiting);
        let idle = |waiting: &mut Waiting| waiting.tasks.is_empty() && !waiting.closed;
        let waited = self.more.wait_while(waiting, idle);
        waited
            .unwrap_or_else(PoisonError::into_inner)
            .tasks
            .pop_front()
    }
}

impl Task {
    fn run(self) {
        let Self { piece, source, job } = self;
        let mut step = Step {
            job: &job,
            end: End::Cancelled,
        };
        // A piece that is not read is let go of before it counts as done.
        let piece = job.goes_on().then_some(piece);
        if let Some(piece) = piece {
            step.end = match job.read(piece, &source) {
                Ok(()) => End::Read,
                Err(error) => End::Failed(error),
            };
        }
        // Before the piece counts as done.
        drop(source);
    }
}

/// How a piece ended.
#[derive(Debug)]
enum End {
    Read,
    Cancelled,
    Failed(SourceError),
}

/// A piece in work: counted when it is done, even by a panic.
struct Step<'j> {
    job: &'j Job,
    end: End,
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.job.finish(mem::replace(&mut self.end, End::Cancelled));
    }
}

impl Job {
    fn new(path: PathBuf, measured: Option<Magnitudes>, pieces: usize) -> Self {
        Self {
            path,
            measured,
            largest: AtomicU32::default(),
            progress: Countdown::new(pieces, Progress::default()),
        }
    }

    fn read(&self, piece: Piece<'_>, source: &SourceFile) -> Result<(), SourceError> {
        let read_exact = |dest: &mut [u8], begin| source.read_exact(dest, begin);
        let Some(magnitudes) = self.measured else {
            return piece.read(read_exact);
        };
        let Pattern(largest) = piece.measure(magnitudes, read_exact)?;
        // Seen by whoever sees that the piece is done.
        self.largest.fetch_max(largest, Ordering::Relaxed);
        Ok(())
    }

    fn peak(&self) -> Option<f64> {
        let largest = Pattern(self.largest.load(Ordering::Relaxed));
        self.measured.map(|magnitudes| magnitudes.value(largest))
    }

    fn goes_on(&self) -> bool {
        self.progress
            .known(|progress| !progress.cancelled && progress.failure.is_none())
    }

    fn cancel(&self) {
        self.progress.known(|progress| progress.cancelled = true);
    }

    fn finish(&self, end: End) {
        self.progress.finish(|progress| match end {
            End::Read => {}
            End::Cancelled => progress.cancelled = true,
            End::Failed(error) => {
                // Told once; the buffer never counts as filled.
                progress.cancelled = true;
                progress.failure.get_or_insert(error);
            }
        });
    }
}
