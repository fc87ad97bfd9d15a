//! Arbitrary, mutated and valid headers: no panic, no reading by a lying number, and the safetensors
//! crate as judge.
//!
//! Whatever our reader accepts, the crate accepts with the same content. Where the crate accepts
//! more, [`is_deliberate`] says what.

#![expect(clippy::unwrap_used, reason = "the helpers belong to the tests")]

use std::collections::HashMap;
use std::io::{self, Read};

use proptest::prelude::*;
use proptest::sample::{Index, select};
use qwenlora_core::dtype::Dtype;
use qwenlora_core::header::{Header, HeaderError, TensorFault};
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorView};

/// A reader that notes what is asked of it.
struct Counted<'a> {
    rest: &'a [u8],
    largest_request: usize,
    served: usize,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.largest_request = self.largest_request.max(buffer.len());
        let count = self.rest.read(buffer)?;
        self.served += count;
        Ok(count)
    }
}

/// Reads a header; checks that no request and no use of the file goes past what it may.
fn read(file: &[u8], file_len_bytes: u64) -> Result<Header, HeaderError> {
    let mut reader = Counted {
        rest: file,
        largest_request: 0,
        served: 0,
    };
    let header = Header::read(&mut reader, file_len_bytes);
    // Requests grow with what has arrived, never with what was promised.
    assert!(
        reader.largest_request <= 64 * 1024 + reader.served,
        "{}",
        reader.largest_request
    );
    if let Ok(header) = &header {
        assert_eq!(
            reader.served as u64,
            header.data_start(),
            "tensor data must not be read"
        );
    }
    header
}

/// What the crate accepts and we refuse, each for its reason.
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

/// Holds our reader against the crate's on one file.
fn compare(file: &[u8]) -> Result<(), TestCaseError> {
    let theirs = SafeTensors::read_metadata(file);
    match (read(file, file.len() as u64), theirs) {
        (Ok(header), Ok((len, metadata))) => same(&header, len, &metadata),
        (Ok(_), Err(error)) => Err(TestCaseError::fail(format!("only we accept it: {error}"))),
        (Err(error), Ok(_)) => {
            prop_assert!(is_deliberate(&error), "only the crate accepts it: {error}");
            Ok(())
        }
        (Err(_), Err(_)) => Ok(()),
    }
}

fn same(header: &Header, len: usize, metadata: &Metadata) -> Result<(), TestCaseError> {
    prop_assert_eq!(header.data_start(), 8 + len as u64);
    let pairs: HashMap<String, String> = header.metadata().iter().cloned().collect();
    prop_assert_eq!(pairs.len(), header.metadata().len());
    prop_assert_eq!(pairs, metadata.metadata().clone().unwrap_or_default());
    prop_assert_eq!(header.tensors().len(), metadata.tensors().len());
    for tensor in header.tensors() {
        let info = metadata
            .info(tensor.name())
            .expect("both know the same names");
        prop_assert_eq!(tensor.dtype().name(), info.dtype.to_string());
        let shape: Vec<u64> = info.shape.iter().map(|&side| side as u64).collect();
        prop_assert_eq!(tensor.shape(), &shape[..]);
        let (begin, end) = info.data_offsets;
        prop_assert_eq!(tensor.offset_bytes(), header.data_start() + begin as u64);
        prop_assert_eq!(tensor.len_bytes(), (end - begin) as u64);
        prop_assert_eq!(tensor.elements(), shape.iter().product::<u64>());
    }
    Ok(())
}

fn file(header: &[u8], data_len_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + data_len_bytes, 0);
    file
}

/// A file as the crate writes it, with any names, dtypes, shapes and metadata.
fn valid_file() -> impl Strategy<Value = Vec<u8>> {
    let tensor = (
        select(&Dtype::ALL[..]),
        prop::collection::vec(0_usize..4, 0..5),
    );
    let name = prop_oneof!["[a-z_.]{1,12}", any::<String>()]
        .prop_filter("reserved", |name| name != "__metadata__");
    let tensors = prop::collection::hash_map(name, tensor, 0..8);
    let metadata = prop::option::of(prop::collection::hash_map(
        any::<String>(),
        any::<String>(),
        0..4,
    ));
    (tensors, metadata).prop_map(|(tensors, metadata)| {
        // The crate writes no tensors with an empty map as `{},"__metadata__":{}`.
        let metadata = metadata.filter(|pairs| !(pairs.is_empty() && tensors.is_empty()));
        let data = [0_u8; 8 * 256 * 8];
        let views = tensors.iter().map(|(name, (dtype, shape))| {
            let mut shape = shape.clone();
            if dtype.bits() < 8 {
                // Whole bytes, whatever the width.
                shape.push(8);
            }
            let bits = shape.iter().product::<usize>() * usize::try_from(dtype.bits()).unwrap();
            let their_dtype = serde_json::from_str(&format!("\"{dtype}\"")).unwrap();
            (
                name,
                TensorView::new(their_dtype, shape, &data[..bits / 8]).unwrap(),
            )
        });
        safetensors::serialize(views, metadata).unwrap()
    })
}

/// The text of one value: mostly `good`, else something of the wrong kind.
fn mostly(good: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    const WRONG: [&str; 24] = [
        "null",
        "true",
        "0",
        "-0",
        "-1",
        "1.0",
        "1e0",
        "1E400",
        "18446744073709551616",
        r#""""#,
        r#""F32""#,
        r#""\ud800""#,
        "[]",
        "[0]",
        "[0,0]",
        "[0,4]",
        "[0,4,4]",
        "[4,0]",
        "[-1,4]",
        "[null]",
        "{}",
        r#"{"F32":null}"#,
        r#"["F32",[1],[0,4]]"#,
        "[[[]]]",
    ];
    prop_oneof![12 => select(good), 1 => select(&WRONG[..])]
}

/// One member of a tensor's entry.
fn field() -> impl Strategy<Value = String> {
    prop_oneof![
        mostly(&[r#""F32""#, r#""I32""#, r#""U8""#, r#""\u004632""#])
            .prop_map(|v| format!(r#""dtype":{v}"#)),
        mostly(&["[1]", "[]", "[1,1]", "[4]", "[2]"]).prop_map(|v| format!(r#""shape":{v}"#)),
        mostly(&["[0,4]", "[4,8]", "[0,8]", "[8,12]"])
            .prop_map(|v| format!(r#""data_offsets":{v}"#)),
        mostly(&["7", "[{}]"]).prop_map(|v| format!(r#""note":{v}"#)),
    ]
}

/// A tensor's entry: the three fields, now and then one too many, too few, or none at all.
fn entry() -> impl Strategy<Value = String> {
    let right = (
        mostly(&[r#""F32""#, r#""U32""#]),
        mostly(&["[1]", "[]"]),
        mostly(&["[0,4]", "[4,8]"]),
    )
        .prop_map(|(d, s, o)| format!(r#"{{"dtype":{d},"shape":{s},"data_offsets":{o}}}"#));
    let any_fields =
        prop::collection::vec(field(), 0..5).prop_map(|f| format!("{{{}}}", f.join(",")));
    prop_oneof![
        8 => right,
        2 => any_fields,
        1 => mostly(&[r#"["F32",[1],[0,4]]"#]).prop_map(str::to_owned),
    ]
}

/// A header put together from such entries, so that most faults are of meaning, not of syntax.
fn assembled_file() -> impl Strategy<Value = Vec<u8>> {
    let metadata = mostly(&[
        "{}",
        r#"{"a":"1"}"#,
        r#"{"a":"1","a":"1"}"#,
        r#"{"a":1}"#,
        "null",
    ]);
    let tensor =
        (select(&["a", "b", "\\u0061"][..]), entry()).prop_map(|(n, e)| format!(r#""{n}":{e}"#));
    let member =
        prop_oneof![6 => tensor, 1 => metadata.prop_map(|m| format!(r#""__metadata__":{m}"#))];
    let around = select(&["", "", "", " ", "\n", "\0"][..]);
    (
        prop::collection::vec(member, 0..4),
        around.clone(),
        around,
        select(&[0_usize, 4, 8, 12][..]),
    )
        .prop_map(|(members, before, after, data_len)| {
            file(
                format!("{before}{{{}}}{after}", members.join(",")).as_bytes(),
                data_len,
            )
        })
}

/// One change to a file's bytes.
#[derive(Debug, Clone)]
enum Mutation {
    Replace(Index, u8),
    Insert(Index, &'static str),
    Remove(Index),
    Swap(Index, Index),
    Truncate(Index),
    Extend(usize),
    Length(u64),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    const TOKENS: [&str; 16] = [
        "0", "9", "-", ".", "e9", "\"", "\\", "\\u0000", "[", "]", "{", "}", ",", ":", " ", "null,",
    ];
    prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Replace(at, byte)),
        4 => (any::<Index>(), select(&TOKENS[..])).prop_map(|(at, token)| Mutation::Insert(at, token)),
        4 => any::<Index>().prop_map(Mutation::Remove),
        2 => (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        1 => any::<Index>().prop_map(Mutation::Truncate),
        1 => (1_usize..9).prop_map(Mutation::Extend),
        1 => prop_oneof![any::<u64>(), 0_u64..4096].prop_map(Mutation::Length),
    ]
}

/// Applies a mutation; those of the text keep the length before it right.
fn mutate(bytes: &[u8], mutation: &Mutation) -> Vec<u8> {
    let len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let (mut text, data_len) = (bytes[8..8 + len].to_vec(), bytes.len() - 8 - len);
    match mutation {
        Mutation::Replace(at, byte) => text[at.index(len)] = *byte,
        Mutation::Insert(at, token) => {
            let at = at.index(len);
            text.splice(at..at, token.bytes());
        }
        Mutation::Remove(at) => {
            text.remove(at.index(len));
        }
        Mutation::Swap(a, b) => text.swap(a.index(len), b.index(len)),
        Mutation::Truncate(at) => return bytes[..at.index(bytes.len())].to_vec(),
        Mutation::Extend(count) => return file(&text, data_len + count),
        Mutation::Length(length) => return [&length.to_le_bytes(), &bytes[8..]].concat(),
    }
    file(&text, data_len)
}

proptest! {
    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        compare(&bytes)?;
    }

    #[test]
    fn arbitrary_text_in_a_frame(text in "[{\"a0-9:,\\[\\] \\\\u}]{0,60}", data_len in 0_usize..9) {
        compare(&file(text.as_bytes(), data_len))?;
        compare(&file(format!("{{{text}}}").as_bytes(), data_len))?;
    }

    /// The length of the file, the length of the header, and what the reader has need not agree.
    #[test]
    fn lying_lengths(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        header_len in prop_oneof![any::<u64>(), 0_u64..100, 33_554_400_u64..33_554_500],
        file_len in prop_oneof![any::<u64>(), 0_u64..100],
    ) {
        let file = [&header_len.to_le_bytes()[..], &bytes].concat();
        // The header may be there although the file is said to be longer, but never shorter.
        if let Ok(header) = read(&file, file_len) {
            prop_assert!(header.data_start() <= file_len);
        }
    }

    #[test]
    fn valid_files_read_the_same(bytes in valid_file()) {
        let header = read(&bytes, bytes.len() as u64);
        prop_assert!(header.is_ok(), "{}", header.unwrap_err());
        compare(&bytes)?;
    }

    #[test]
    fn mutated_files_are_judged_the_same(
        bytes in valid_file(),
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let mut bytes = bytes;
        for mutation in &mutations {
            let len = bytes.get(..8).map(|len| u64::from_le_bytes(len.try_into().unwrap()));
            let Some(1..) = len.filter(|&len| len <= bytes.len() as u64 - 8) else { break };
            bytes = mutate(&bytes, mutation);
            compare(&bytes)?;
        }
    }

    #[test]
    fn assembled_files_are_judged_the_same(bytes in assembled_file()) {
        compare(&bytes)?;
    }
}
