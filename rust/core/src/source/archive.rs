//! The names of a zip archive's members, read from the directory at its end.

/// Longest directory that is read; that of a model's pickle stays under 1 MiB.
const MAX_DIRECTORY_BYTES: u64 = 4 * 1024 * 1024;
/// Longest end of an archive: its last record, and the longest comment after that.
const END_BYTES: u64 = 22 + 65_535;
/// The record that says where the directory lies.
const END: &[u8] = b"PK\x05\x06";
/// Mark of the pointer to a large archive's larger record; it stands before [`END`].
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END64_LOCATOR_BYTES: usize = 20;
/// That larger record.
const END64: &[u8] = b"PK\x06\x06";
const END64_BYTES: u64 = 56;
/// A member's entry in the directory, and its length before the name.
const ENTRY: &[u8] = b"PK\x01\x02";
const ENTRY_BYTES: usize = 46;

/// The names of the members, or none where the directory cannot be found.
///
/// `read_at` gives the bytes from an offset on, as many of those asked for as there are.
pub(super) fn members(
    file_len_bytes: u64,
    read_at: impl Fn(u64, u64) -> Option<Vec<u8>>,
) -> Vec<String> {
    directory(file_len_bytes, read_at)
        .map(|bytes| names(&bytes))
        .unwrap_or_default()
}

fn directory(
    file_len_bytes: u64,
    read_at: impl Fn(u64, u64) -> Option<Vec<u8>>,
) -> Option<Vec<u8>> {
    let end_begin = file_len_bytes.saturating_sub(END_BYTES);
    let end = read_at(end_begin, file_len_bytes.min(END_BYTES))?;
    // The last one: a comment hardly holds another.
    let at = end.windows(END.len()).rposition(|bytes| bytes == END)?;
    let record = end.get(at..)?;
    let (mut len, mut begin) = (number(record, 12, 4)?, number(record, 16, 4)?);
    let locator = at
        .checked_sub(END64_LOCATOR_BYTES)
        .and_then(|before| end.get(before..at))
        .filter(|bytes| bytes.starts_with(END64_LOCATOR));
    if let Some(locator) = locator {
        let large = read_at(number(locator, 8, 8)?, END64_BYTES)?;
        if large.starts_with(END64) {
            (len, begin) = (number(&large, 40, 8)?, number(&large, 48, 8)?);
        }
    }
    read_at(begin, len.min(MAX_DIRECTORY_BYTES))
}

/// The names in a directory, up to the first entry that is none.
fn names(mut directory: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    while let Some((name, rest)) = first_name(directory) {
        names.push(name);
        directory = rest;
    }
    names
}

fn first_name(directory: &[u8]) -> Option<(String, &[u8])> {
    if !directory.starts_with(ENTRY) {
        return None;
    }
    let len = |at| usize::try_from(number(directory, at, 2)?).ok();
    let (name, extra, comment) = (len(28)?, len(30)?, len(32)?);
    let text = directory.get(ENTRY_BYTES..)?.get(..name)?;
    let rest = directory.get(ENTRY_BYTES + name + extra + comment..)?;
    Some((String::from_utf8_lossy(text).into_owned(), rest))
}

/// A little-endian number of some bytes.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let own = bytes.get(at..)?.get(..len)?;
    let value = own
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    Some(value)
}
