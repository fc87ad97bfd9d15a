//! Whole files, as far as their header: safe spans, one answer, and the safetensors crate as judge.

use std::collections::HashMap;
use std::io::{self, Read};

use qwenlora_core::header::{Header, HeaderError, TensorFault};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use crate::assert_speakable;

/// Checks the header of a file with these bytes.
pub fn check(file: &[u8]) {
    let header = read(file);
    match (&header, &read(file)) {
        (Ok(first), Ok(second)) => assert_eq!(first, second),
        (Err(first), Err(second)) => assert_eq!(first.to_string(), second.to_string()),
        _ => panic!("the same bytes are taken and refused"),
    }
    let theirs = SafeTensors::read_metadata(file);
    match (header, theirs) {
        (Ok(header), Ok((len, metadata))) => {
            assert_spans(&header, file.len() as u64);
            assert_same(&header, len, &metadata);
        }
        (Ok(_), Err(error)) => panic!("only we accept it: {error}"),
        (Err(error), theirs) => {
            assert_speakable(&error.to_string());
            let deliberate = theirs.is_err() || is_deliberate(&error);
            assert!(deliberate, "only the crate accepts it: {error}");
        }
    }
}

/// A reader that notes how much is asked of it.
struct Counted<'a> {
    rest: &'a [u8],
    served_bytes: usize,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Requests grow with what has arrived, never with what a length field promises.
        assert!(buffer.len() <= 64 * 1024 + self.served_bytes);
        let count = self.rest.read(buffer)?;
        self.served_bytes += count;
        Ok(count)
    }
}

fn read(file: &[u8]) -> Result<Header, HeaderError> {
    let mut reader = Counted {
        rest: file,
        served_bytes: 0,
    };
    let header = Header::read(&mut reader, file.len() as u64);
    if let Ok(header) = &header {
        assert_eq!(
            reader.served_bytes as u64,
            header.data_start(),
            "tensor data was read"
        );
    }
    header
}

/// The tensors fill the file after the header: none reaches beyond it, no two share a byte.
fn assert_spans(header: &Header, file_len_bytes: u64) {
    let mut spans: Vec<(u64, u64)> = header
        .tensors()
        .iter()
        .map(|t| (t.offset_bytes(), t.offset_bytes() + t.len_bytes()))
        .collect();
    spans.sort_unstable();
    let end = spans.iter().fold(header.data_start(), |end, span| {
        assert_eq!(span.0, end, "a hole or an overlap");
        span.1
    });
    assert_eq!(end, file_len_bytes);
    for tensor in header.tensors() {
        assert_eq!(tensor.elements(), tensor.shape().iter().product::<u64>());
        assert_eq!(
            tensor.elements() * tensor.dtype().bits(),
            tensor.len_bytes() * 8
        );
    }
}

fn assert_same(header: &Header, len: usize, metadata: &Metadata) {
    assert_eq!(header.data_start(), 8 + len as u64);
    let pairs: HashMap<String, String> = header.metadata().iter().cloned().collect();
    assert_eq!(pairs.len(), header.metadata().len());
    assert_eq!(pairs, metadata.metadata().clone().unwrap_or_default());
    assert_eq!(header.tensors().len(), metadata.tensors().len());
    for tensor in header.tensors() {
        let info = metadata
            .info(tensor.name())
            .expect("both know the same names");
        assert_eq!(tensor.dtype().name(), info.dtype.to_string());
        let shape: Vec<u64> = info.shape.iter().map(|&side| side as u64).collect();
        assert_eq!(tensor.shape(), shape);
        let (begin, end) = info.data_offsets;
        assert_eq!(tensor.offset_bytes(), header.data_start() + begin as u64);
        assert_eq!(tensor.len_bytes(), (end - begin) as u64);
    }
}

/// What the crate accepts and we refuse, each for its reason: the module comment of
/// `qwenlora_core::header` names them.
fn is_deliberate(error: &HeaderError) -> bool {
    match error {
        // The crate keeps the last of two.
        HeaderError::DuplicateTensor { .. } | HeaderError::DuplicateMetadataKey { .. }
        // The format wants `{` first and an object of strings; the crate takes what serde takes.
        | HeaderError::NotAnObject { .. } | HeaderError::MetadataNotObject { .. }
        // Sizes that no LoRA has.
        | HeaderError::HeaderTooLong { .. }
        | HeaderError::TooManyTensors { .. }
        | HeaderError::TooManyMetadata { .. } => true,
        HeaderError::Tensor { fault, .. } => matches!(
            fault,
            // An array of the three values, and `{"F32": null}`: serde's other spellings.
            TensorFault::NotAnObject { .. } | TensorFault::DtypeNotString { .. }
            // Sizes, too.
            | TensorFault::NameTooLong { .. }
            | TensorFault::TooManyFields { .. }
            | TensorFault::RankTooHigh { .. }
        ),
        _ => false,
    }
}
