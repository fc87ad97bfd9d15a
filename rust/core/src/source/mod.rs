//! An open LoRA file: who it is, what it holds, and its bytes, read in parallel.
//!
//! Reached through [`SourceFile::open`]. The file may be on a network drive, may be replaced or cut
//! short at any moment: everything is read through one handle at given positions (a mapped file that
//! shrinks would kill the process), and [`SourceFile::verify_unchanged`] says afterwards whether the
//! bytes belong together.

mod archive;
mod error;
mod identity;
mod ranges;
mod readers;

use std::fs::{self, File};
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

pub use error::SourceError;
pub use identity::FileIdentity;
pub use ranges::{ByteRange, RangeFault};
pub use readers::{Readers, Reading};

use crate::dtype::{Dtype, scalar};
use crate::header::{Header, HeaderError, Quoted, TensorInfo, foreign};
use ranges::Chunk;

/// Scalars at most this far apart are read together.
const NEAR_BYTES: u64 = 512;
/// Most scalars that are read together: a bound of the memory that takes.
const MAX_RUN: usize = 256;

/// A tensor whose bytes lie in a file.
pub trait Stored {
    /// Its name in the file.
    fn name(&self) -> &str;
    /// The type of its elements.
    fn dtype(&self) -> Dtype;
    /// Its dimensions.
    fn shape(&self) -> &[u64];
    /// Number of its elements.
    fn elements(&self) -> u64;
    /// Its first byte in the file.
    fn offset_bytes(&self) -> u64;
    /// How many there are.
    fn len_bytes(&self) -> u64;
}

impl Stored for TensorInfo {
    fn name(&self) -> &str {
        self.name()
    }

    fn dtype(&self) -> Dtype {
        self.dtype()
    }

    fn shape(&self) -> &[u64] {
        self.shape()
    }

    fn elements(&self) -> u64 {
        self.elements()
    }

    fn offset_bytes(&self) -> u64 {
        self.offset_bytes()
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes()
    }
}

/// A file open for reading, with the identity it had when it was opened.
#[derive(Debug)]
pub struct SourceFile {
    file: File,
    path: PathBuf,
    identity: FileIdentity,
}

impl SourceFile {
    /// Opens a regular file, or a link to one.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, SourceError> {
        let path = path.into();
        match open(&path) {
            Ok(Some((file, identity))) => Ok(Self {
                file,
                path,
                identity,
            }),
            Ok(None) if path.is_dir() => Err(SourceError::Directory { path }),
            Ok(None) => Err(SourceError::NotAFile { path }),
            Err(source) => Err(SourceError::Io { path, source }),
        }
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who the file was when it was opened.
    pub fn identity(&self) -> &FileIdentity {
        &self.identity
    }

    /// Reads the header and checks it against the length of the file.
    pub fn read_header(&self) -> Result<Header, SourceError> {
        let mut reader = Positional {
            file: &self.file,
            offset_bytes: 0,
        };
        Header::read(&mut reader, self.identity.size_bytes()).map_err(|source| {
            SourceError::Header {
                path: self.path.clone(),
                source: match source {
                    // Its directory says more than its first member.
                    HeaderError::Zip { .. } => self.zip().unwrap_or(source),
                    source => source,
                },
            }
        })
    }

    /// The kind of a zip archive, by the names in its directory.
    fn zip(&self) -> Option<HeaderError> {
        let members = archive::members(self.identity.size_bytes(), |offset_bytes, len_bytes| {
            let reader = Positional {
                file: &self.file,
                offset_bytes,
            };
            let mut bytes = Vec::new();
            // The buffer grows with what there is, not with what a record promises.
            reader.take(len_bytes).read_to_end(&mut bytes).ok()?;
            Some(bytes)
        });
        (!members.is_empty()).then(|| foreign::zip(&members))
    }

    /// Reads the value of a tensor of one element, whatever its shape's rank.
    ///
    /// Exact, except that 64-bit integers beyond 2^53 are rounded to the nearest `f64`.
    pub fn read_scalar(&self, tensor: &impl Stored) -> Result<f64, SourceError> {
        let name = || Quoted::new(tensor.name());
        if tensor.elements() != 1 {
            let shape = tensor.shape().into();
            return Err(SourceError::NotAScalar {
                path: self.path.clone(),
                tensor: name(),
                shape,
            });
        }
        let mut bytes = [0; 8];
        let len = usize::try_from(tensor.len_bytes()).unwrap_or(usize::MAX);
        let value = match bytes.get_mut(..len) {
            Some(bytes) => {
                self.read_exact(bytes, tensor.offset_bytes())?;
                scalar::decode(tensor.dtype(), bytes)
            }
            None => None,
        };
        value.ok_or_else(|| SourceError::NoNumber {
            path: self.path.clone(),
            tensor: name(),
            dtype: tensor.dtype(),
        })
    }

    /// Reads the values of tensors of one element, as [`Self::read_scalar`] does; those that lie
    /// close together with one access.
    pub fn read_scalars(&self, tensors: &[&impl Stored]) -> Result<Vec<f64>, SourceError> {
        let ahead = self.read_ahead(tensors);
        let pairs = tensors.iter().zip(ahead);
        let values = pairs.map(|(tensor, bytes)| {
            let len = usize::try_from(tensor.len_bytes()).ok();
            let own = bytes.as_ref().and_then(|bytes| bytes.get(..len?));
            match own.and_then(|own| scalar::decode(tensor.dtype(), own)) {
                Some(value) => Ok(value),
                // One by one: it says what is wrong.
                None => self.read_scalar(*tensor),
            }
        });
        values.collect()
    }

    /// The bytes of tensors that lie close to others, as far as they can be read.
    fn read_ahead(&self, tensors: &[&impl Stored]) -> Vec<Option<[u8; 8]>> {
        let mut found = vec![None; tensors.len()];
        let mut order: Vec<(u64, u64, usize)> = tensors
            .iter()
            .enumerate()
            .filter(|(_, tensor)| tensor.elements() == 1 && tensor.len_bytes() <= 8)
            .map(|(at, tensor)| (tensor.offset_bytes(), tensor.len_bytes(), at))
            .collect();
        order.sort_unstable();
        let mut buffer = Vec::new();
        // Tensors do not overlap: a run grows by what lies between its neighbours.
        for run in order.chunk_by(|a, b| b.0.saturating_sub(a.0) <= NEAR_BYTES) {
            for part in run.chunks(MAX_RUN) {
                let [(begin, ..), .., (last, len, _)] = *part else {
                    continue;
                };
                let bytes = last.saturating_add(len).saturating_sub(begin);
                buffer.resize(usize::try_from(bytes).unwrap_or_default(), 0);
                if self.read_exact(&mut buffer, begin).is_err() {
                    continue;
                }
                for &(offset, len, at) in part {
                    let from = usize::try_from(offset.saturating_sub(begin)).unwrap_or(usize::MAX);
                    let own = buffer
                        .get(from..)
                        .and_then(|rest| rest.get(..usize::try_from(len).ok()?));
                    if let (Some(own), Some(slot)) = (own, found.get_mut(at)) {
                        let mut bytes = [0; 8];
                        for (to, byte) in bytes.iter_mut().zip(own) {
                            *to = *byte;
                        }
                        *slot = Some(bytes);
                    }
                }
            }
        }
        found
    }

    /// Whether two tensors agree in their first bytes, up to `limit_bytes` of them.
    pub fn begin_alike(
        &self,
        a: &impl Stored,
        b: &impl Stored,
        limit_bytes: usize,
    ) -> Result<bool, SourceError> {
        let start = |offset_bytes: u64, len_bytes: u64| {
            let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
            let mut bytes = vec![0; len.min(limit_bytes)];
            self.read_exact(&mut bytes, offset_bytes)?;
            Ok(bytes)
        };
        Ok(start(a.offset_bytes(), a.len_bytes())? == start(b.offset_bytes(), b.len_bytes())?)
    }

    /// Fills parts of `dest` with parts of the file, by up to `threads` parallel readers.
    ///
    /// All ranges are checked before the first byte is read: each lies within the file and within
    /// `dest`, and no two share a byte of `dest`. Bytes of `dest` outside every range stay as they
    /// are; after an error its content is unspecified.
    pub fn read_ranges(
        &self,
        ranges: &[ByteRange],
        dest: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), SourceError> {
        ranges::read(self.cut(ranges, dest)?, threads, |chunk, offset_bytes| {
            self.read_exact(chunk, offset_bytes)
        })
    }

    fn cut<'a>(
        &self,
        ranges: &[ByteRange],
        dest: &'a mut [u8],
    ) -> Result<Vec<Chunk<'a>>, SourceError> {
        ranges::cut(ranges, self.identity.size_bytes(), dest).map_err(|fault| self.fault(fault))
    }

    fn fault(&self, source: RangeFault) -> SourceError {
        SourceError::Range {
            path: self.path.clone(),
            source,
        }
    }

    /// Checks that the open file is still what it was when it was opened.
    ///
    /// A file renamed over the path does not count: the handle keeps reading the old one.
    pub fn verify_unchanged(&self) -> Result<(), SourceError> {
        let now = FileIdentity::of(&self.file).map_err(|source| SourceError::Io {
            path: self.path.clone(),
            source,
        })?;
        if now == self.identity {
            return Ok(());
        }
        let changes = now.changes_since(&self.identity);
        Err(SourceError::Changed {
            path: self.path.clone(),
            changes,
        })
    }

    fn read_exact(&self, mut dest: &mut [u8], mut offset_bytes: u64) -> Result<(), SourceError> {
        while !dest.is_empty() {
            match read_at(&self.file, dest, offset_bytes) {
                Ok(0) => {
                    return Err(SourceError::Ended {
                        path: self.path.clone(),
                        offset_bytes,
                    });
                }
                Ok(count) => {
                    dest = dest.get_mut(count..).unwrap_or_default();
                    offset_bytes = offset_bytes.saturating_add(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(SourceError::Io {
                        path: self.path.clone(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Opens `path` if it is a regular file.
fn open(path: &Path) -> io::Result<Option<(File, FileIdentity)>> {
    // Asked before opening: to open a named pipe waits for its writer, and Windows opens no folder.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let identity = FileIdentity::of(&file)?;
    Ok(Some((file, identity)))
}

/// A reader with a position of its own: the handle's position is shared by all threads, and on
/// Windows moved by positional reads, too.
struct Positional<'a> {
    file: &'a File,
    offset_bytes: u64,
}

impl Read for Positional<'_> {
    fn read(&mut self, dest: &mut [u8]) -> io::Result<usize> {
        let count = read_at(self.file, dest, self.offset_bytes)?;
        self.offset_bytes = self.offset_bytes.saturating_add(count as u64);
        Ok(count)
    }
}

#[cfg(unix)]
fn read_at(file: &File, dest: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, dest, offset_bytes)
}

#[cfg(windows)]
fn read_at(file: &File, dest: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, dest, offset_bytes)
}
