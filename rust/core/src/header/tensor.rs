//! One tensor of a header: from its name and the text of its entry to a [`TensorInfo`].

use super::{HeaderError, Quoted, TensorFault, json};
use crate::dtype::Dtype;

/// Longest name of a tensor.
pub const MAX_NAME_BYTES: usize = 1024;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 8;
/// Most fields of a tensor's entry, unknown ones included.
const MAX_FIELDS: usize = 64;

/// The part of the file after the header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub(super) start_bytes: u64,
    pub(super) len_bytes: u64,
}

/// One tensor of a file: its name, type, shape, and where its bytes are. Always consistent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    name: String,
    dtype: Dtype,
    shape: Box<[u64]>,
    offset_bytes: u64,
    len_bytes: u64,
    elements: u64,
}

impl TensorInfo {
    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The first byte of the data, counted from the start of the file.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Length of the data.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Number of elements: the product of the shape.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// The name and the shape, to be kept without the rest.
    pub(crate) fn into_name_and_shape(self) -> (String, Vec<u64>) {
        (self.name, self.shape.into_vec())
    }

    /// Checks the entry of tensor `name` in itself and against the length of the data.
    pub(super) fn parse(name: String, entry: &str, data: Data) -> Result<Self, HeaderError> {
        match Fields::parse(&name, entry) {
            Ok(fields) => Self::checked(name, fields, data),
            Err(fault) => Err(HeaderError::Tensor {
                tensor: Quoted::new(&name),
                fault,
            }),
        }
    }

    /// Checks the fields of tensor `name` against each other and the length of the data.
    pub(super) fn checked(name: String, fields: Fields, data: Data) -> Result<Self, HeaderError> {
        match fields.check(data) {
            Ok((fields, elements)) => Ok(Self {
                name,
                dtype: fields.dtype,
                shape: fields.shape,
                // Both lie within the file, so neither operation saturates.
                offset_bytes: data.start_bytes.saturating_add(fields.begin),
                len_bytes: fields.end.saturating_sub(fields.begin),
                elements,
            }),
            Err(fault) => Err(HeaderError::Tensor {
                tensor: Quoted::new(&name),
                fault,
            }),
        }
    }
}

/// A tensor's entry as written: each field has its type, but they need not fit each other.
#[derive(Debug)]
pub(super) struct Fields {
    pub(super) dtype: Dtype,
    pub(super) shape: Box<[u64]>,
    pub(super) begin: u64,
    pub(super) end: u64,
}

impl Fields {
    fn parse(name: &str, entry: &str) -> Result<Self, TensorFault> {
        if name.len() > MAX_NAME_BYTES {
            let max_bytes = MAX_NAME_BYTES;
            return Err(TensorFault::NameTooLong {
                len_bytes: name.len(),
                max_bytes,
            });
        }
        let Some(fields) = json::members(entry, MAX_FIELDS) else {
            return Err(TensorFault::NotAnObject {
                found: Quoted::new(entry),
            });
        };
        if fields.count > MAX_FIELDS {
            return Err(TensorFault::TooManyFields {
                count: fields.count,
                max: MAX_FIELDS,
            });
        }
        // Unknown fields are passed over, as the safetensors crate does.
        let field = |field: &'static str| {
            let mut values = fields.kept.iter().filter(|(name, _)| name == field);
            match (values.next(), values.next()) {
                (Some((_, value)), None) => Ok(*value),
                (None, _) => Err(TensorFault::FieldMissing { field }),
                (Some(_), Some(_)) => Err(TensorFault::FieldTwice { field }),
            }
        };
        let (dtype, shape, offsets) = (field("dtype")?, field("shape")?, field("data_offsets")?);
        let (begin, end) = parse_offsets(offsets)?;
        Ok(Self {
            dtype: parse_dtype(dtype)?,
            shape: parse_shape(shape)?,
            begin,
            end,
        })
    }

    /// Checks the fields against each other and the file; returns the number of elements, too.
    fn check(self, data: Data) -> Result<(Self, u64), TensorFault> {
        let Self {
            dtype, begin, end, ..
        } = self;
        let Some(len_bytes) = end.checked_sub(begin) else {
            return Err(TensorFault::OffsetsReversed { begin, end });
        };
        let elements = self
            .shape
            .iter()
            .try_fold(1_u64, |size, &side| size.checked_mul(side));
        let bits = elements.and_then(|elements| elements.checked_mul(dtype.bits()));
        let (Some(elements), Some(bits)) = (elements, bits) else {
            return Err(TensorFault::SizeOverflow {
                dtype,
                shape: self.shape,
            });
        };
        if !bits.is_multiple_of(8) {
            return Err(TensorFault::PartialByte {
                dtype,
                shape: self.shape,
                bits,
            });
        }
        let needed_bytes = bits / 8;
        if len_bytes != needed_bytes {
            let shape = self.shape;
            return Err(TensorFault::LengthMismatch {
                dtype,
                shape,
                len_bytes,
                needed_bytes,
            });
        }
        if end > data.len_bytes {
            return Err(TensorFault::BeyondFile {
                end,
                data_len_bytes: data.len_bytes,
            });
        }
        Ok((self, elements))
    }
}

fn parse_dtype(value: &str) -> Result<Dtype, TensorFault> {
    let Some(name) = json::string(value) else {
        return Err(TensorFault::DtypeNotString {
            found: Quoted::new(value),
        });
    };
    Dtype::parse(&name).ok_or_else(|| TensorFault::DtypeUnknown {
        found: Quoted::new(&name),
    })
}

fn parse_shape(value: &str) -> Result<Box<[u64]>, TensorFault> {
    let field = "shape";
    let Some(items) = json::items(value, MAX_RANK) else {
        return Err(TensorFault::NotAnArray {
            field,
            found: Quoted::new(value),
        });
    };
    if items.count > MAX_RANK {
        return Err(TensorFault::RankTooHigh {
            rank: items.count,
            max: MAX_RANK,
        });
    }
    items
        .kept
        .into_iter()
        .map(|item| parse_count(field, item))
        .collect()
}

fn parse_offsets(value: &str) -> Result<(u64, u64), TensorFault> {
    let field = "data_offsets";
    let Some(items) = json::items(value, 2) else {
        return Err(TensorFault::NotAnArray {
            field,
            found: Quoted::new(value),
        });
    };
    match items.kept.as_slice() {
        [begin, end] if items.count == 2 => {
            Ok((parse_count(field, begin)?, parse_count(field, end)?))
        }
        _ => Err(TensorFault::OffsetCount { count: items.count }),
    }
}

/// A dimension or an offset. `text` is valid JSON, so that `+1`, `01` and ` 1` cannot occur.
fn parse_count(field: &'static str, text: &str) -> Result<u64, TensorFault> {
    text.parse().map_err(|_| TensorFault::NotACount {
        field,
        found: Quoted::new(text),
    })
}
