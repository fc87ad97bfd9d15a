//! Parallel positional reads: ranges of a file into disjoint parts of one buffer.

use std::num::NonZeroUsize;

use thiserror::Error;

use crate::dtype::Dtype;
use crate::packed::magnitude::{Magnitudes, Pattern};
use crate::work::drain;

/// Most bytes of one read: enough to keep a disk busy, few enough to share the work evenly.
const CHUNK_BYTES: usize = 8 * 1024 * 1024;
/// Most bytes that are measured at a time: what was read a moment ago is in the core's own cache.
const MEASURED_BYTES: usize = 256 * 1024;

/// A part of a file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// Its first byte in the file.
    pub offset_bytes: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Index of its first byte in the destination.
    pub dest_offset: usize,
}

/// Why ranges cannot be read as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RangeFault {
    /// A range ends after the file does.
    #[error(
        "a range ends beyond the file: {} bytes from byte {} on, in a file of {file_len_bytes} \
         bytes",
        .range.len_bytes, .range.offset_bytes
    )]
    BeyondFile {
        /// The range.
        range: ByteRange,
        /// Length of the file.
        file_len_bytes: u64,
    },
    /// A range ends after the destination does.
    #[error(
        "a range ends beyond the destination: {} bytes to byte {} on, in a buffer of {dest_len} \
         bytes",
        .range.len_bytes, .range.dest_offset
    )]
    BeyondDest {
        /// The range.
        range: ByteRange,
        /// Length of the destination.
        dest_len: usize,
    },
    /// Two ranges share bytes of the destination.
    #[error(
        "two ranges overlap in the destination: from byte {}, and {} bytes from byte {} on",
        .later.dest_offset, .earlier.len_bytes, .earlier.dest_offset
    )]
    Overlap {
        /// The range that begins first.
        earlier: ByteRange,
        /// The range that begins within it.
        later: ByteRange,
    },
    /// A range that is measured ends within a value.
    #[error("{} bytes from byte {} on are no whole values of {dtype}", .range.len_bytes, .range.offset_bytes)]
    PartialValue {
        /// The range.
        range: ByteRange,
        /// Type of the values.
        dtype: Dtype,
    },
}

/// A part of the destination with the place in the file that fills it.
#[derive(Debug)]
pub(super) struct Chunk<'a> {
    offset_bytes: u64,
    dest: &'a mut [u8],
}

impl Chunk<'_> {
    /// Reads its bytes.
    pub(super) fn read<E>(
        self,
        read_exact: impl FnOnce(&mut [u8], u64) -> Result<(), E>,
    ) -> Result<(), E> {
        read_exact(self.dest, self.offset_bytes)
    }

    /// Reads its bytes and finds the largest magnitude among their values.
    pub(super) fn measure<E>(
        self,
        magnitudes: Magnitudes,
        read_exact: impl Fn(&mut [u8], u64) -> Result<(), E>,
    ) -> Result<Pattern, E> {
        let mut largest = Pattern::default();
        let mut offset_bytes = self.offset_bytes;
        for part in self.dest.chunks_mut(MEASURED_BYTES) {
            read_exact(part, offset_bytes)?;
            largest = largest.max(magnitudes.largest(part));
            offset_bytes += part.len() as u64;
        }
        Ok(largest)
    }
}

/// A checked range: its end in the file and in the destination fit their types.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset_bytes: u64,
    dest_begin: usize,
    dest_end: usize,
}

/// Checks the ranges and cuts `dest` into chunks, in the order of the file.
pub(super) fn cut<'a>(
    ranges: &[ByteRange],
    file_len_bytes: u64,
    dest: &'a mut [u8],
) -> Result<Vec<Chunk<'a>>, RangeFault> {
    let mut chunks = Vec::new();
    let mut rest = dest;
    let mut rest_begin = 0;
    for span in check(ranges, file_len_bytes, rest.len())? {
        let (_, from_begin) = rest.split_at_mut(span.dest_begin - rest_begin);
        let (part, after) = from_begin.split_at_mut(span.dest_end - span.dest_begin);
        let mut offset_bytes = span.offset_bytes;
        for dest in part.chunks_mut(CHUNK_BYTES) {
            let len_bytes = dest.len() as u64;
            chunks.push(Chunk { offset_bytes, dest });
            offset_bytes += len_bytes;
        }
        (rest, rest_begin) = (after, span.dest_end);
    }
    chunks.sort_by_key(|chunk| chunk.offset_bytes);
    Ok(chunks)
}

/// Checks that every range holds whole values, and so does every chunk of them.
pub(super) fn check_values(ranges: &[ByteRange], magnitudes: Magnitudes) -> Result<(), RangeFault> {
    let value_bytes = magnitudes.value_bytes() as u64;
    let dtype = magnitudes.dtype();
    let partial = |range: &&ByteRange| !range.len_bytes.is_multiple_of(value_bytes);
    match ranges.iter().find(partial) {
        Some(&range) => Err(RangeFault::PartialValue { range, dtype }),
        None => Ok(()),
    }
}

/// Checks the ranges; returns them sorted by destination, joined where both sides continue.
fn check(
    ranges: &[ByteRange],
    file_len_bytes: u64,
    dest_len: usize,
) -> Result<Vec<Span>, RangeFault> {
    let mut sorted: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for &range in ranges {
        let end_bytes = range.offset_bytes.checked_add(range.len_bytes);
        if end_bytes.is_none_or(|end_bytes| end_bytes > file_len_bytes) {
            return Err(RangeFault::BeyondFile {
                range,
                file_len_bytes,
            });
        }
        if dest_end(range).is_none_or(|end| end > dest_len) {
            return Err(RangeFault::BeyondDest { range, dest_len });
        }
        if range.len_bytes > 0 {
            sorted.push(range);
        }
    }
    sorted.sort_by_key(|range| range.dest_offset);
    for pair in sorted.windows(2) {
        if let &[earlier, later] = pair
            && dest_end(earlier).is_none_or(|end| end > later.dest_offset)
        {
            return Err(RangeFault::Overlap { earlier, later });
        }
    }
    Ok(join(&sorted))
}

/// Joins ranges that follow each other in the file and in the destination alike.
fn join(sorted: &[ByteRange]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for range in sorted {
        let dest_begin = range.dest_offset;
        let Some(dest_end) = dest_end(*range) else {
            continue;
        };
        match spans.last_mut() {
            Some(last)
                if last.dest_end == dest_begin
                    && last.offset_bytes + (last.dest_end - last.dest_begin) as u64
                        == range.offset_bytes =>
            {
                last.dest_end = dest_end;
            }
            _ => spans.push(Span {
                offset_bytes: range.offset_bytes,
                dest_begin,
                dest_end,
            }),
        }
    }
    spans
}

/// One past the last destination byte, if memory has such a place.
fn dest_end(range: ByteRange) -> Option<usize> {
    range
        .dest_offset
        .checked_add(usize::try_from(range.len_bytes).ok()?)
}

/// Reads all chunks; the first error stops every reader.
pub(super) fn read<E: Send>(
    chunks: Vec<Chunk<'_>>,
    threads: NonZeroUsize,
    read_exact: impl Fn(&mut [u8], u64) -> Result<(), E> + Sync,
) -> Result<(), E> {
    drain::drain(chunks, threads, |chunk| chunk.read(&read_exact))
}
