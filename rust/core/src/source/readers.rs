//! Threads that read on while somebody else uses what was read: one buffer after another, without
//! a pause in between.

use std::collections::VecDeque;
use std::mem;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::ranges::{self, ByteRange, Chunk};
use super::{SourceError, SourceFile};
use crate::packed::magnitude::{Magnitudes, Pattern};
use crate::work::crew::{Begun, Crew, Lapse, Turn, Work};

/// Threads that read ranges of files into buffers, in the order in which that was asked for.
///
/// Dropped, they finish the reads they are in, and begin no more.
#[derive(Debug)]
pub struct Readers {
    crew: Crew<Buffer>,
}

/// A buffer that is being filled.
///
/// Dropped, it begins no more reads, and waits until no thread writes to the buffer any more.
#[derive(Debug)]
pub struct Reading {
    begun: Begun<Buffer>,
}

/// One buffer that is being filled.
#[derive(Debug)]
struct Buffer {
    path: PathBuf,
    measured: Option<Magnitudes>,
    /// The pattern of the largest magnitude so far.
    largest: AtomicU32,
}

/// Not only in what all chunks share: the file is closed as soon as nothing reads it.
type OwnChunk = (Chunk<'static>, Arc<SourceFile>);

impl Readers {
    /// Starts up to `threads` threads; where the system gives none, reading happens when asked for.
    pub fn new(threads: NonZeroUsize) -> Self {
        Self {
            crew: Crew::start("qwenlora-read", threads),
        }
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
        let chunks = source.cut(ranges, dest)?;
        if let Some(magnitudes) = measured {
            let checked = ranges::check_values(ranges, magnitudes);
            checked.map_err(|fault| source.fault(fault))?;
        }
        let buffer = Buffer {
            path: source.path().to_owned(),
            measured,
            largest: AtomicU32::default(),
        };
        let chunks = chunks.into_iter().map(|chunk| (chunk, Arc::clone(source)));
        Ok(Reading {
            begun: self.crew.begin(buffer, chunks.collect()),
        })
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.crew.give_up();
    }
}

impl Reading {
    /// Waits for at most this long; whether the buffer is filled.
    ///
    /// An error is told once; from then on, and where the readers were dropped before they had
    /// filled it, [`SourceError::Stopped`] is.
    pub fn wait(&self, timeout: Duration) -> Result<bool, SourceError> {
        let path = || self.begun.work().path.clone();
        let outcome = |lapse: &mut Option<Lapse<SourceError>>| match lapse {
            None => Ok(true),
            Some(lapse) => Err(match mem::replace(lapse, Lapse::GivenUp) {
                Lapse::Failed(error) => error,
                Lapse::Panicked => SourceError::Panicked { path: path() },
                Lapse::GivenUp => SourceError::Stopped { path: path() },
            }),
        };
        self.begun.wait(timeout, outcome).unwrap_or(Ok(false))
    }

    /// The largest magnitude in a buffer that is filled; NaN where there is one. None where it is not
    /// filled, and where nobody asked for it.
    pub fn peak(&self) -> Option<f64> {
        let is_filled = self.begun.wait(Duration::ZERO, |lapse| lapse.is_none());
        let Buffer {
            measured, largest, ..
        } = self.begun.work();
        let magnitudes = measured.filter(|_| is_filled == Some(true))?;
        Some(magnitudes.value(Pattern(largest.load(Ordering::Relaxed))))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.begun.give_up();
        self.begun.settle();
    }
}

impl Work for Buffer {
    type Tasks = VecDeque<OwnChunk>;
    type Fault = SourceError;
    const TURN: Turn = Turn::WhenTaken;

    fn carry_out(&self, (chunk, source): OwnChunk) -> Result<(), SourceError> {
        let read_exact = |dest: &mut [u8], begin| source.read_exact(dest, begin);
        let Some(magnitudes) = self.measured else {
            return chunk.read(read_exact);
        };
        let Pattern(largest) = chunk.measure(magnitudes, read_exact)?;
        // Seen by whoever sees that the chunk is done.
        self.largest.fetch_max(largest, Ordering::Relaxed);
        Ok(())
    }
}
