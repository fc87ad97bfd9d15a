//! Faults of an open file; every message begins with its path.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::ranges::RangeFault;
use crate::dtype::Dtype;
use crate::header::{HeaderError, Quoted};

/// Why a file, or a part of it, could not be read.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The system refused; the kind in `source` tells "not found" from the rest.
    #[error("{}: cannot read the file: {source}", Quoted::path(.path))]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is a folder.
    #[error("{}: is a folder, not a file", Quoted::path(.path))]
    Directory {
        /// The folder.
        path: PathBuf,
    },
    /// The path is a pipe, a device, or the like.
    #[error("{}: is not a regular file", Quoted::path(.path))]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The header cannot be trusted.
    #[error("{}: {source}", Quoted::path(.path))]
    Header {
        /// The file.
        path: PathBuf,
        /// Its fault.
        source: HeaderError,
    },
    /// The file ended before its size when it was opened.
    #[error(
        "{}: the file ended at byte {offset_bytes} while it was read\n\
         hint: it was changed at the same time; try again once it is complete",
        Quoted::path(.path)
    )]
    Ended {
        /// The file.
        path: PathBuf,
        /// The first byte that was missing.
        offset_bytes: u64,
    },
    /// The file is no longer what was opened.
    #[error(
        "{}: the file changed while it was read: {changes}\n\
         hint: try again once it is complete",
        Quoted::path(.path)
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Which parts of its identity, from what to what.
        changes: String,
    },
    /// Whoever read it was told to stop.
    #[error("{}: reading was stopped", Quoted::path(.path))]
    Stopped {
        /// The file.
        path: PathBuf,
    },
    /// A thread panicked while it read, and has told so.
    #[error("{}: reading failed: a thread panicked", Quoted::path(.path))]
    Panicked {
        /// The file.
        path: PathBuf,
    },
    /// A value was asked of a tensor that does not have one element.
    #[error("{}: tensor {tensor} is not a single value: shape {shape:?}", Quoted::path(.path))]
    NotAScalar {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: Quoted,
        /// Its shape.
        shape: Box<[u64]>,
    },
    /// A value was asked of a tensor whose elements are no real numbers.
    #[error("{}: tensor {tensor} does not hold a real number: {dtype}", Quoted::path(.path))]
    NoNumber {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: Quoted,
        /// Its dtype.
        dtype: Dtype,
    },
    /// The ranges to be read do not fit the file or the destination.
    #[error("{}: {source}", Quoted::path(.path))]
    Range {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: RangeFault,
    },
}
