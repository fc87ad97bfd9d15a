//! Files that people really have in a LoRA folder and that are not safetensors.

use super::{HeaderError, MAX_HEADER_BYTES, Quoted};

/// How many bytes of a file [`recognise`] likes to see: a tar names itself at byte 257.
pub(super) const SNIFF_BYTES: u64 = 512;
/// A byte alone is no text.
const MIN_TEXT_BYTES: usize = 2;
/// Length of a zip member's entry before its name.
const ZIP_MEMBER_BYTES: usize = 30;

/// A format, as somebody who wanted a LoRA sees it.
#[derive(Clone, Copy)]
enum Kind {
    /// Has to be unpacked.
    Archive,
    /// A picture, a film, a document.
    Media,
    /// Weights in another form.
    Weights,
}

/// (place, bytes there, kind, name with its article). The longer of two alike comes first.
const MAGICS: [(usize, &[u8], Kind, &str); 29] = [
    (0, b"7z\xbc\xaf\x27\x1c", Kind::Archive, "a 7z archive"),
    (0, b"Rar!\x1a\x07", Kind::Archive, "a rar archive"),
    (0, b"\x1f\x8b\x08", Kind::Archive, "a gzip archive"),
    (0, b"\xfd7zXZ\x00", Kind::Archive, "an xz archive"),
    (0, b"BZh", Kind::Archive, "a bzip2 archive"),
    (0, b"\x28\xb5\x2f\xfd", Kind::Archive, "a zstd archive"),
    (0, b"\x04\x22\x4d\x18", Kind::Archive, "an lz4 archive"),
    (257, b"ustar", Kind::Archive, "a tar archive"),
    (0, b"\x89PNG\r\n\x1a\n", Kind::Media, "a PNG picture"),
    (0, b"\xff\xd8\xff", Kind::Media, "a JPEG picture"),
    (0, b"GIF8", Kind::Media, "a GIF picture"),
    (8, b"WEBP", Kind::Media, "a WebP picture"),
    (8, b"AVI ", Kind::Media, "a film (AVI)"),
    (4, b"ftypavif", Kind::Media, "an AVIF picture"),
    (4, b"ftypheic", Kind::Media, "a HEIC picture"),
    (4, b"ftyp", Kind::Media, "a film (MP4)"),
    (0, b"\x1a\x45\xdf\xa3", Kind::Media, "a film (WebM)"),
    (0, b"II*\x00", Kind::Media, "a TIFF picture"),
    (0, b"MM\x00*", Kind::Media, "a TIFF picture"),
    (0, b"%PDF-", Kind::Media, "a PDF document"),
    (0, b"MZ\x90\x00", Kind::Media, "a program for Windows"),
    (0, b"\x7fELF", Kind::Media, "a program for Linux"),
    (0, b"SQLite format 3\x00", Kind::Media, "an SQLite database"),
    (0, b"\x93NUMPY", Kind::Weights, "a NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", Kind::Weights, "an HDF5 file"),
    (0, b"tjgg", Kind::Weights, "a GGML model"),
    (0, b"fmgg", Kind::Weights, "a GGML model"),
    (0, b"lmgg", Kind::Weights, "a GGML model"),
    (0, b"algg", Kind::Weights, "a GGLA adapter of llama.cpp"),
];

/// Names the format of a file by how it begins.
///
/// To be asked only when what begins the file is no possible header: `\x80\x02` begins a pickle as
/// well as a header of 640 bytes.
pub(super) fn recognise(start: &[u8]) -> Option<HeaderError> {
    match start {
        // The first member of an archive that `torch.save` writes.
        [b'P', b'K', 3, 4, ..] => return Some(zip(first_member(start).as_slice())),
        [b'P', b'K', 5, 6, ..] | [b'P', b'K', 7, 8, ..] => return Some(zip(&[])),
        [0x80, 2..=5, ..] if !is_length(start) => return Some(HeaderError::Pickle),
        [b'G', b'G', b'U', b'F', ..] => return Some(HeaderError::Gguf),
        [0, 5, 0x16, 7, ..] => return Some(HeaderError::AppleDouble),
        _ => {}
    }
    let holds = |(at, magic, ..): &&(usize, &[u8], Kind, &str)| {
        start.get(*at..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some((_, _, kind, name)) = MAGICS.iter().find(holds) {
        return Some(match kind {
            Kind::Archive => HeaderError::Archive { name },
            Kind::Media => HeaderError::Media { name },
            Kind::Weights => HeaderError::OtherWeights { name },
        });
    }
    recognise_text(start)
}

/// The error for a zip archive with these members.
pub(crate) fn zip(members: &[String]) -> HeaderError {
    if members.iter().any(|name| name.ends_with("/data.pkl")) {
        return HeaderError::Pickle;
    }
    let is_lora = |name: &&String| {
        let lower = name.to_ascii_lowercase();
        [".safetensors", ".sft"]
            .iter()
            .any(|end| lower.ends_with(end))
    };
    HeaderError::Zip {
        holds: members.iter().find(is_lora).map(|name| Quoted::new(name)),
    }
}

/// The name of a zip's first member, where all of it is there.
fn first_member(start: &[u8]) -> Vec<String> {
    let name = || {
        let [low, high] = *start.get(26..28)? else {
            return None;
        };
        let len = usize::from(u16::from_le_bytes([low, high]));
        start.get(ZIP_MEMBER_BYTES..)?.get(..len)
    };
    name()
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .into_iter()
        .collect()
}

/// Whether a possible length of a header begins the file.
fn is_length(start: &[u8]) -> bool {
    let length = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    length.is_some_and(|length| length <= MAX_HEADER_BYTES)
}

/// Text of any kind: a page, JSON, a pointer, a sentence.
fn recognise_text(start: &[u8]) -> Option<HeaderError> {
    let text = start
        .strip_prefix(b"\xef\xbb\xbf")
        .unwrap_or(start)
        .trim_ascii_start();
    if begins(text, b"version https://git-lfs") {
        return Some(HeaderError::GitLfs);
    }
    if [
        b"<!".as_slice(),
        b"<?xml",
        b"<html",
        b"<head",
        b"<body",
        b"<title",
        b"<script",
    ]
    .iter()
    .any(|tag| begins(text, tag))
    {
        return Some(HeaderError::Html);
    }
    let shown = readable(text)?;
    // Pickles of protocol 0 are text: a mark, the kind of object, the number of its memo.
    if [b"(dp".as_slice(), b"(lp", b"ccollections\n", b"ctorch"]
        .iter()
        .any(|begin| text.starts_with(begin))
    {
        return Some(HeaderError::Pickle);
    }
    let start = Quoted::new(shown);
    if text.starts_with(b"{") || text.starts_with(b"[") {
        return Some(HeaderError::JsonText { start });
    }
    Some(HeaderError::PlainText { start })
}

/// The text, where all of it is such; its last character may be cut.
fn readable(bytes: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(bytes.get(..error.valid_up_to())?).ok()?
        }
        Err(_) => return None,
    };
    let text = text.trim_end();
    let is_text = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    (text.len() >= MIN_TEXT_BYTES && text.chars().all(is_text)).then_some(text)
}

/// Whether `text` begins with `prefix` in either case.
fn begins(text: &[u8], prefix: &[u8]) -> bool {
    text.get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
