//! Bounded reader of a safetensors header: bytes 0 to 8 + N of a file become a [`Header`].
//!
//! Reached through [`Header::read`]. The file is taken for hostile: each number from it is checked
//! before it is used, nothing is allocated by such a number alone, and a fault names the tensor and
//! the value. What is accepted here, the safetensors crate accepts, too; in return a few things
//! that the crate lets pass are refused: equal names, white space before the header, entries
//! spelled as arrays, a `__metadata__` of `null`, and sizes over the limits below.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod error;
pub(crate) mod foreign;
mod json;
mod plain;
mod quoted;
mod repeats;
mod tensor;

use std::collections::HashSet;
use std::io::Read;

pub use error::{HeaderError, TensorFault};
pub use quoted::{Quoted, is_deceptive};
use repeats::repeats;
use tensor::Data;
pub use tensor::{MAX_NAME_BYTES, MAX_RANK, TensorInfo};

/// Longest header that is read. Those of real LoRA files stay under 1 MiB.
pub const MAX_HEADER_BYTES: u64 = 32 * 1024 * 1024;
/// Most tensors, and most metadata entries, in a file.
pub const MAX_TENSORS: usize = 65_536;

/// The header's length field, before the header itself.
const LENGTH_BYTES: u64 = 8;
const METADATA: &str = "__metadata__";

/// The header of a safetensors file: its tensors fill the file from [`Header::data_start`] to its
/// end, without overlap and without gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    tensors: Vec<TensorInfo>,
    metadata: Vec<(String, String)>,
    data_start: u64,
}

impl Header {
    /// Reads the header of a file of `file_len_bytes` from `reader`, which stands at its start.
    pub fn read(reader: &mut impl Read, file_len_bytes: u64) -> Result<Self, HeaderError> {
        let bytes = read_bytes(reader, file_len_bytes)?;
        let data_start = LENGTH_BYTES.saturating_add(to_u64(bytes.len()));
        let text = text_of(&bytes)?;
        let data = Data {
            start_bytes: data_start,
            len_bytes: file_len_bytes.saturating_sub(data_start),
        };
        // Where names repeat, the careful reading says which.
        let plain = plain::read(text, data)
            .filter(|plain| !repeats(&plain.tensors, TensorInfo::name))
            .filter(|plain| {
                !repeats(plain.metadata.as_deref().unwrap_or_default(), |(key, _)| {
                    key
                })
            });
        let (tensors, metadata) = match plain {
            Some(plain) => (plain.tensors, plain.metadata.unwrap_or_default()),
            None => Self::parse(text, data)?,
        };
        check_layout(&tensors, data)?;
        Ok(Self {
            tensors,
            metadata,
            data_start,
        })
    }

    /// The tensors in the order of the header's text.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The entries of `__metadata__` in the order of the header's text; empty without it.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// The tensors and the metadata, to be kept without the header.
    pub(crate) fn into_parts(self) -> (Vec<TensorInfo>, Vec<(String, String)>) {
        (self.tensors, self.metadata)
    }

    /// The first byte of the tensors' data, counted from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Reads the text level by level, and says what is wrong with it.
    fn parse(text: &str, data: Data) -> Result<Content, HeaderError> {
        json::check(text).map_err(|error| json_error(text, &error))?;
        // One more than the tensors, for the metadata.
        let max = MAX_TENSORS.saturating_add(1);
        let Some(entries) = json::members(text, max) else {
            return Err(HeaderError::NotAnObject {
                found: Quoted::new(text),
            });
        };
        let has_metadata = entries.kept.iter().any(|(name, _)| name == METADATA);
        let count = entries.count.saturating_sub(usize::from(has_metadata));
        if count > MAX_TENSORS {
            return Err(HeaderError::TooManyTensors {
                count,
                max: MAX_TENSORS,
            });
        }
        match first_repeated(&entries.kept) {
            Some(METADATA) => return Err(HeaderError::DuplicateMetadata),
            Some(name) => {
                return Err(HeaderError::DuplicateTensor {
                    tensor: Quoted::new(name),
                });
            }
            None => {}
        }
        let mut metadata = Vec::new();
        let mut tensors = Vec::with_capacity(entries.kept.len());
        for (name, entry) in entries.kept {
            if name == METADATA {
                metadata = parse_metadata(entry)?;
            } else {
                tensors.push(TensorInfo::parse(name, entry, data)?);
            }
        }
        Ok((tensors, metadata))
    }
}

/// Tensors and metadata.
type Content = (Vec<TensorInfo>, Vec<(String, String)>);

/// Reads the header's bytes, after its length has been found possible.
fn read_bytes(reader: &mut impl Read, file_len_bytes: u64) -> Result<Vec<u8>, HeaderError> {
    if file_len_bytes == 0 {
        return Err(HeaderError::Empty);
    }
    let mut start = Vec::new();
    take(reader, LENGTH_BYTES, &mut start)?;
    let Some(after_length_bytes) = file_len_bytes.checked_sub(LENGTH_BYTES) else {
        let short = HeaderError::TooShort {
            len_bytes: file_len_bytes,
        };
        return Err(foreign::recognise(&start).unwrap_or(short));
    };
    let Ok(length) = <[u8; 8]>::try_from(start.as_slice()) else {
        return Err(HeaderError::Ended {
            offset_bytes: to_u64(start.len()),
        });
    };
    let len_bytes = u64::from_le_bytes(length);
    let impossible = if len_bytes > MAX_HEADER_BYTES {
        Some(HeaderError::HeaderTooLong {
            len_bytes,
            max_bytes: MAX_HEADER_BYTES,
        })
    } else if len_bytes > after_length_bytes {
        Some(HeaderError::HeaderBeyondFile {
            len_bytes,
            file_len_bytes,
        })
    } else {
        None
    };
    if let Some(impossible) = impossible {
        take(reader, foreign::SNIFF_BYTES, &mut start)?;
        // A header that was cut short begins as it should.
        let is_cut = start.get(8) == Some(&b'{') && len_bytes <= MAX_HEADER_BYTES;
        let other = foreign::recognise(&start).filter(|_| !is_cut);
        return Err(other.unwrap_or(impossible));
    }
    if len_bytes == 0 {
        return Err(HeaderError::HeaderEmpty);
    }
    let mut bytes = Vec::new();
    take(reader, len_bytes, &mut bytes)?;
    if to_u64(bytes.len()) < len_bytes {
        let offset_bytes = LENGTH_BYTES.saturating_add(to_u64(bytes.len()));
        return Err(HeaderError::Ended { offset_bytes });
    }
    Ok(bytes)
}

/// The header as text that begins as an object does.
fn text_of(bytes: &[u8]) -> Result<&str, HeaderError> {
    if bytes.first() != Some(&b'{') {
        // A format whose first bytes happen to be a possible length, as gzip's without a time.
        let mut start = to_u64(bytes.len()).to_le_bytes().to_vec();
        take(&mut &*bytes, foreign::SNIFF_BYTES, &mut start)?;
        if let Some(other) = foreign::recognise(&start) {
            return Err(other);
        }
    }
    let text = std::str::from_utf8(bytes).map_err(|error| HeaderError::NotUtf8 {
        offset_bytes: LENGTH_BYTES.saturating_add(to_u64(error.valid_up_to())),
    })?;
    if !text.starts_with('{') {
        return Err(HeaderError::NotAnObject {
            found: Quoted::new(text),
        });
    }
    Ok(text)
}

/// Appends up to `len_bytes` bytes; the buffer grows with what the reader really has.
fn take(reader: &mut impl Read, len_bytes: u64, into: &mut Vec<u8>) -> Result<(), HeaderError> {
    reader
        .by_ref()
        .take(len_bytes)
        .read_to_end(into)
        .map_err(HeaderError::Io)?;
    Ok(())
}

fn parse_metadata(entry: &str) -> Result<Vec<(String, String)>, HeaderError> {
    let Some(entries) = json::members(entry, MAX_TENSORS) else {
        return Err(HeaderError::MetadataNotObject {
            found: Quoted::new(entry),
        });
    };
    if entries.count > MAX_TENSORS {
        return Err(HeaderError::TooManyMetadata {
            count: entries.count,
            max: MAX_TENSORS,
        });
    }
    if let Some(key) = first_repeated(&entries.kept) {
        return Err(HeaderError::DuplicateMetadataKey {
            key: Quoted::new(key),
        });
    }
    let decode = |(key, value): (String, &str)| match json::string(value) {
        Some(value) => Ok((key, value)),
        None => Err(HeaderError::MetadataNotString {
            key: Quoted::new(&key),
            found: Quoted::new(value),
        }),
    };
    entries.kept.into_iter().map(decode).collect()
}

/// Checks that the tensors fill the data without overlap, gap and rest.
fn check_layout(tensors: &[TensorInfo], data: Data) -> Result<(), HeaderError> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    // Empty tensors stand before the one that has data at the same place.
    by_offset.sort_by_key(|tensor| (tensor.offset_bytes(), tensor.len_bytes()));
    let mut end = 0_u64;
    let mut last = None;
    for tensor in by_offset {
        let begin = tensor.offset_bytes().saturating_sub(data.start_bytes);
        if begin > end {
            return Err(HeaderError::Hole {
                tensor: Quoted::new(tensor.name()),
                begin,
                end,
            });
        }
        if let Some(other) = last.filter(|_| begin < end) {
            let (tensor, other) = (Quoted::new(tensor.name()), Quoted::new(other));
            return Err(HeaderError::Overlap {
                tensor,
                begin,
                other,
                end,
            });
        }
        end = begin.saturating_add(tensor.len_bytes());
        last = Some(tensor.name());
    }
    if end < data.len_bytes {
        return Err(HeaderError::Tail {
            end,
            data_len_bytes: data.len_bytes,
        });
    }
    Ok(())
}

/// The first name that stands a second time.
fn first_repeated<'a>(members: &'a [(String, &str)]) -> Option<&'a str> {
    let mut seen = HashSet::with_capacity(members.len());
    members
        .iter()
        .map(|(name, _)| name.as_str())
        .find(|name| !seen.insert(*name))
}

/// The parser's error with its place in the file and the text before it.
fn json_error(text: &str, error: &serde_json::Error) -> HeaderError {
    const NEAR_BYTES: usize = 64;
    let lines_before = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1));
    let line_start = lines_before.fold(0_usize, |sum, line| sum.saturating_add(line.len()));
    let offset = line_start
        .saturating_add(error.column().saturating_sub(1))
        .min(text.len());
    let near = offset.saturating_sub(NEAR_BYTES)..offset.saturating_add(1).min(text.len());
    let near = text.as_bytes().get(near).unwrap_or_default();
    let message = error.to_string();
    let reason = message.split(" at line ").next().unwrap_or_default();
    HeaderError::Json {
        offset_bytes: LENGTH_BYTES.saturating_add(to_u64(offset)),
        reason: reason.to_owned(),
        near: Quoted::new(&String::from_utf8_lossy(near)),
    }
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("no supported system has addresses of more than 64 bits")
}
