//! Keys of a file that are spelled much like another.

use crate::key;
use crate::key::role::Role;
use crate::key::suffix;
use crate::key::table::Entry;
use crate::model::ModuleId;

/// Most edits between keys that may be the same key mistyped.
const MAX_EDITS: usize = 12;
/// No key that somebody types is longer; the bound keeps a hostile file cheap.
const MAX_COMPARED_BYTES: usize = 256;

/// How near a key is: lower is nearer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Nearness {
    /// Another spelling of the same tensor of the same module.
    SameTensor,
    /// Another tensor of the same module.
    SameModule,
    /// One holds the other; bytes between them.
    Holds(usize),
    /// Edits apart.
    Edits(usize),
}

pub(super) fn nearest<'e>(entries: &'e [Entry], key: &str, at_most: usize) -> Vec<&'e str> {
    let named = named(key);
    let mut near: Vec<(Nearness, &str)> = entries
        .iter()
        .filter_map(|entry| {
            let other = entry.tensor.key.as_str();
            Some((nearness(key, named, other)?, other))
        })
        .collect();
    // Stable: of equals the first in the file.
    near.sort_by_key(|(nearness, _)| *nearness);
    near.into_iter()
        .map(|(_, other)| other)
        .take(at_most)
        .collect()
}

/// The module that a key or a path names, and the part of it.
fn named(key: &str) -> Option<(ModuleId, Option<Role>)> {
    let cut = suffix::cut(key);
    let stem = cut.map_or(key, |cut| cut.stem);
    Some((key::resolve(stem)?, cut.map(|cut| cut.role)))
}

fn nearness(
    wanted: &str,
    meant: Option<(ModuleId, Option<Role>)>,
    other: &str,
) -> Option<Nearness> {
    match (meant, meant.and_then(|_| named(other))) {
        (Some(a), Some(b)) if a == b => return Some(Nearness::SameTensor),
        (Some((a, _)), Some((b, _))) if a == b => return Some(Nearness::SameModule),
        _ => {}
    }
    if !wanted.is_empty() && (other.contains(wanted) || wanted.contains(other)) {
        return Some(Nearness::Holds(wanted.len().abs_diff(other.len())));
    }
    edits(wanted.as_bytes(), other.as_bytes()).map(Nearness::Edits)
}

/// Levenshtein's distance, where it is at most [`MAX_EDITS`].
fn edits(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len().max(b.len()) > MAX_COMPARED_BYTES || a.len().abs_diff(b.len()) > MAX_EDITS {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, byte) in a.iter().enumerate() {
        // `diagonal` is the distance of the prefixes that end before both bytes.
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, other) in row.iter_mut().skip(1).zip(b) {
            let changed = diagonal + usize::from(byte != other);
            diagonal = *cell;
            left = changed.min(left + 1).min(diagonal + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        if row.iter().all(|cell| *cell > MAX_EDITS) {
            return None;
        }
    }
    row.last().copied().filter(|edits| *edits <= MAX_EDITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let distance = |a: &str, b: &str| edits(a.as_bytes(), b.as_bytes());
        assert_eq!(distance("", ""), Some(0));
        assert_eq!(distance("kitten", "sitting"), Some(3));
        assert_eq!(distance("to_q", "to_k"), Some(1));
        assert_eq!(distance("abc", ""), Some(3));
        assert_eq!(distance("", "abc"), Some(3));
        assert_eq!(distance(&"a".repeat(20), &"b".repeat(20)), None);
        assert_eq!(distance(&"a".repeat(300), &"a".repeat(300)), None);
    }
}
