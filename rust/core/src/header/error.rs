//! Faults of a header, each with the value that shows it.

use std::io;

use thiserror::Error;

use super::Quoted;
use crate::dtype::Dtype;

/// Why a file has no header that can be trusted.
///
/// A message is one line, sometimes with a second one that begins with `hint:`. Offsets named
/// "byte" count from the start of the file, those named "data byte" from the end of the header, as
/// `data_offsets` do.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// The system could not read the file.
    #[error("cannot read the header: {0}")]
    Io(io::Error),
    /// The file has no bytes.
    #[error("the file is empty\nhint: a download or a save did not finish; get the file again")]
    Empty,
    /// The file has no room for the length of a header.
    #[error(
        "the file is too short for a safetensors header: {len_bytes} bytes\n\
         hint: a download or a save did not finish; get the file again"
    )]
    TooShort {
        /// Length of the file.
        len_bytes: u64,
    },
    /// A pickle, bare or in the zip container of `torch.save`.
    #[error(
        "the file is a PyTorch pickle, not safetensors; a pickle can run any code while it loads\n\
         hint: convert it once: `python -c \"import torch, safetensors.torch as st; \
         st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')\"`"
    )]
    Pickle,
    /// A zip archive of other files.
    #[error(
        "the file is a zip archive, not safetensors{}\nhint: unpack it, and {}",
        .holds.as_ref().map(|name| format!(": it holds {name}")).unwrap_or_default(),
        if .holds.is_some() {
            "use the file that it holds"
        } else {
            "look for a `.safetensors` file in it"
        }
    )]
    Zip {
        /// The first `.safetensors` file in it, where one is found.
        holds: Option<Quoted>,
    },
    /// An archive that only its own program reads.
    #[error(
        "the file is {name}, not safetensors\n\
         hint: unpack it, and look for a `.safetensors` file in it"
    )]
    Archive {
        /// Its format, with the article.
        name: &'static str,
    },
    /// Something to look at or to run.
    #[error(
        "the file is {name}, not safetensors\n\
         hint: it was saved under a LoRA's name; download the LoRA itself"
    )]
    Media {
        /// Its format, with the article.
        name: &'static str,
    },
    /// Weights in a form that is not read.
    #[error("the file is {name}, not safetensors\nhint: a LoRA comes as `.safetensors`")]
    OtherWeights {
        /// Its format, with the article.
        name: &'static str,
    },
    /// A web page.
    #[error(
        "the file is a web page, not safetensors\n\
         hint: the site sent a page in place of the file, often to ask for a login; \
         download the file itself"
    )]
    Html,
    /// The text that git keeps in place of a large file.
    #[error(
        "the file is a git LFS pointer, not the file it stands for\n\
         hint: run `git lfs pull` where it was cloned, or download the file itself"
    )]
    GitLfs,
    /// A GGUF model.
    #[error(
        "the file is a GGUF model, not safetensors\n\
         hint: a LoRA comes as `.safetensors`; a GGUF file belongs to a GGUF model loader"
    )]
    Gguf,
    /// Bare JSON: an answer of a download site, or a configuration.
    #[error(
        "the file is JSON text, not safetensors: {start}\n\
         hint: a site's error message, or an index or configuration that belongs beside the file; \
         download the file itself"
    )]
    JsonText {
        /// How the text begins.
        start: Quoted,
    },
    /// Any other text: a site's refusal in a sentence, notes.
    #[error(
        "the file is plain text, not safetensors: {start}\n\
         hint: often a site's message in place of the file; download the file itself"
    )]
    PlainText {
        /// How the text begins.
        start: Quoted,
    },
    /// The `._name` companion that macOS writes beside a file.
    #[error(
        "the file holds macOS attributes only\n\
         hint: use the file of the same name without the leading `._`"
    )]
    AppleDouble,
    /// The first eight bytes give a length that no header has.
    #[error(
        "the header length is over the limit of {max_bytes} bytes: {len_bytes}\n\
         hint: this is not a safetensors file, or it is damaged; get the file again"
    )]
    HeaderTooLong {
        /// The length that the file gives.
        len_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The header would end after the file does.
    #[error(
        "the header ends beyond the file: {len_bytes} bytes from byte 8 on, in a file of \
         {file_len_bytes} bytes\n\
         hint: the file is cut short or is not safetensors; get the file again"
    )]
    HeaderBeyondFile {
        /// The length that the file gives.
        len_bytes: u64,
        /// Length of the file.
        file_len_bytes: u64,
    },
    /// The length is zero, as in a file of zeros.
    #[error(
        "the header length is zero\n\
         hint: a file of zeros is what an interrupted download leaves; get the file again"
    )]
    HeaderEmpty,
    /// The file had fewer bytes than its length said.
    #[error(
        "the file ended at byte {offset_bytes}, inside the header\n\
         hint: it changed while it was read; try again once it is complete"
    )]
    Ended {
        /// Its end.
        offset_bytes: u64,
    },
    /// The header is not text.
    #[error("the header is not UTF-8 at byte {offset_bytes}")]
    NotUtf8 {
        /// The first byte that is not.
        offset_bytes: u64,
    },
    /// The header is not a JSON object from its first byte on.
    #[error("the header does not start with `{{`: {found}")]
    NotAnObject {
        /// How it starts.
        found: Quoted,
    },
    /// The header is not JSON.
    #[error("the header is not valid JSON at byte {offset_bytes}: {reason}, in {near}")]
    Json {
        /// The place where the parser stopped.
        offset_bytes: u64,
        /// The missing part.
        reason: String,
        /// The text up to that place.
        near: Quoted,
    },
    /// More tensors than any model has.
    #[error("the header names too many tensors, over the limit of {max}: {count}")]
    TooManyTensors {
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// Two tensors of one name.
    #[error("the header names tensor {tensor} twice")]
    DuplicateTensor {
        /// The name.
        tensor: Quoted,
    },
    /// Two `__metadata__` entries.
    #[error("the header holds `__metadata__` twice")]
    DuplicateMetadata,
    /// `__metadata__` is something else than an object.
    #[error("`__metadata__` is not an object: {found}")]
    MetadataNotObject {
        /// The value that is there.
        found: Quoted,
    },
    /// More metadata entries than any trainer writes.
    #[error("`__metadata__` has too many entries, over the limit of {max}: {count}")]
    TooManyMetadata {
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// Two metadata entries of one key.
    #[error("`__metadata__` holds key {key} twice")]
    DuplicateMetadataKey {
        /// The key.
        key: Quoted,
    },
    /// A metadata value is something else than a string.
    #[error("`__metadata__` key {key} is not a string: {found}")]
    MetadataNotString {
        /// The key.
        key: Quoted,
        /// The value.
        found: Quoted,
    },
    /// One tensor's entry is wrong in itself.
    #[error("tensor {tensor}: {fault}")]
    Tensor {
        /// The tensor's name.
        tensor: Quoted,
        /// The fault.
        fault: TensorFault,
    },
    /// A tensor's data begins before that of its predecessor ends.
    #[error(
        "tensor {tensor} begins at data byte {begin}, inside tensor {other}, which ends at {end}"
    )]
    Overlap {
        /// The later tensor.
        tensor: Quoted,
        /// Its first byte.
        begin: u64,
        /// The earlier tensor.
        other: Quoted,
        /// The end of that.
        end: u64,
    },
    /// Data bytes before a tensor belong to no tensor.
    #[error("data bytes {end} to {begin}, before tensor {tensor}, belong to no tensor")]
    Hole {
        /// The tensor after the hole.
        tensor: Quoted,
        /// Its first byte.
        begin: u64,
        /// The end of the data before it.
        end: u64,
    },
    /// Data bytes at the end of the file belong to no tensor.
    #[error("data bytes {end} to {data_len_bytes}, after the last tensor, belong to no tensor")]
    Tail {
        /// The end of the last tensor.
        end: u64,
        /// Length of the data in this file.
        data_len_bytes: u64,
    },
}

/// Faults of one tensor's entry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TensorFault {
    /// The name is longer than any name.
    #[error("the name is over the limit of {max_bytes} bytes: {len_bytes}")]
    NameTooLong {
        /// Its length.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The entry is something else than an object.
    #[error("the entry is not an object: {found}")]
    NotAnObject {
        /// The value that is there.
        found: Quoted,
    },
    /// The entry has more fields than any writer adds.
    #[error("the entry has too many fields, over the limit of {max}: {count}")]
    TooManyFields {
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A field that must be there is not.
    #[error("field `{field}` is missing")]
    FieldMissing {
        /// The field.
        field: &'static str,
    },
    /// A field stands twice.
    #[error("field `{field}` stands twice")]
    FieldTwice {
        /// The field.
        field: &'static str,
    },
    /// `dtype` is something else than a string.
    #[error("`dtype` is not a string: {found}")]
    DtypeNotString {
        /// The value that is there.
        found: Quoted,
    },
    /// `dtype` is no name that safetensors knows.
    #[error("unknown dtype: {found}")]
    DtypeUnknown {
        /// The name.
        found: Quoted,
    },
    /// `shape` or `data_offsets` is something else than an array.
    #[error("`{field}` is not an array: {found}")]
    NotAnArray {
        /// The field.
        field: &'static str,
        /// The value that is there.
        found: Quoted,
    },
    /// `shape` has more dimensions than any tensor here.
    #[error("`shape` has too many dimensions, over the limit of {max}: {rank}")]
    RankTooHigh {
        /// How many.
        rank: usize,
        /// The limit.
        max: usize,
    },
    /// `data_offsets` is not a pair.
    #[error("`data_offsets` does not hold two numbers: {count}")]
    OffsetCount {
        /// How many there are.
        count: usize,
    },
    /// A dimension or an offset is no count: negative, fractional, over 64 bits, or no number.
    #[error("`{field}` holds something else than a whole number from 0 to 2^64 - 1: {found}")]
    NotACount {
        /// The field.
        field: &'static str,
        /// The value.
        found: Quoted,
    },
    /// The data would end before it begins.
    #[error("the data ends before it begins: `data_offsets` [{begin}, {end}]")]
    OffsetsReversed {
        /// First data byte.
        begin: u64,
        /// One past the last data byte.
        end: u64,
    },
    /// The data would end after the file does.
    #[error(
        "the data ends beyond the file: at data byte {end} of {data_len_bytes}\n\
         hint: a download or a save did not finish; get the file again"
    )]
    BeyondFile {
        /// One past the last data byte.
        end: u64,
        /// Length of the data in this file.
        data_len_bytes: u64,
    },
    /// The number of elements or of their bits does not fit 64 bits.
    #[error("the size overflows 64 bits: {dtype} {shape:?}")]
    SizeOverflow {
        /// Element type.
        dtype: Dtype,
        /// Dimensions.
        shape: Box<[u64]>,
    },
    /// Elements narrower than a byte do not fill their last byte.
    #[error("the elements do not fill whole bytes: {dtype} {shape:?} is {bits} bits")]
    PartialByte {
        /// Element type.
        dtype: Dtype,
        /// Dimensions.
        shape: Box<[u64]>,
        /// Bits of all elements.
        bits: u64,
    },
    /// The data's length is not that of the shape.
    #[error("the data is {len_bytes} bytes, but {dtype} {shape:?} needs {needed_bytes}")]
    LengthMismatch {
        /// Element type.
        dtype: Dtype,
        /// Dimensions.
        shape: Box<[u64]>,
        /// Length by `data_offsets`.
        len_bytes: u64,
        /// Length by `dtype` and `shape`.
        needed_bytes: u64,
    },
}
