//! Files that people really have in a LoRA folder and that are not safetensors.

use super::{HeaderError, Quoted};

/// How many bytes of a file [`recognise`] likes to see.
pub(super) const SNIFF_BYTES: u64 = 512;

/// Names the format of a file by how it begins.
///
/// To be asked only when the first eight bytes are no possible header length: `\x80\x02` begins a
/// pickle as well as a header of 640 bytes.
pub(super) fn recognise(start: &[u8]) -> Option<HeaderError> {
    match start {
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => return Some(HeaderError::Pickle),
        [b'G', b'G', b'U', b'F', ..] => return Some(HeaderError::Gguf),
        [0, 5, 0x16, 7, ..] => return Some(HeaderError::AppleDouble),
        _ => {}
    }
    let text = start
        .strip_prefix(b"\xef\xbb\xbf")
        .unwrap_or(start)
        .trim_ascii_start();
    if begins(text, b"version https://git-lfs") {
        return Some(HeaderError::GitLfs);
    }
    if [b"<!".as_slice(), b"<?xml", b"<html", b"<head"]
        .iter()
        .any(|tag| begins(text, tag))
    {
        return Some(HeaderError::Html);
    }
    if text.starts_with(b"{") || text.starts_with(b"[") {
        return Some(HeaderError::JsonText {
            start: Quoted::new(&String::from_utf8_lossy(text)),
        });
    }
    None
}

/// Whether `text` begins with `prefix` in either case.
fn begins(text: &[u8], prefix: &[u8]) -> bool {
    text.get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
