//! The order of names that people expect: `v2` before `v10`, `a` beside `A`.

use std::cmp::Ordering;
use std::path::Path;

/// Compares paths, folder by folder; only equal paths are equal.
pub(crate) fn compare(a: &Path, b: &Path) -> Ordering {
    let parts = |path: &Path| -> Vec<String> {
        path.components()
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .collect()
    };
    let (left, right) = (parts(a), parts(b));
    let unequal = left
        .iter()
        .zip(&right)
        .map(|(a, b)| names(a, b))
        .find(|order| order.is_ne());
    unequal
        .unwrap_or_else(|| left.len().cmp(&right.len()))
        .then_with(|| a.cmp(b))
}

/// Compares letters without their case and runs of digits by value.
fn names(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a, b);
    loop {
        let order = match (number(left), number(right)) {
            (Some((a, rest_a)), Some((b, rest_b))) => {
                (left, right) = (rest_a, rest_b);
                // Without leading zeros the longer number is the larger one.
                a.len().cmp(&b.len()).then_with(|| a.cmp(b))
            }
            _ => match (left.chars().next(), right.chars().next()) {
                (Some(a), Some(b)) => {
                    left = left.get(a.len_utf8()..).unwrap_or_default();
                    right = right.get(b.len_utf8()..).unwrap_or_default();
                    a.to_lowercase().cmp(b.to_lowercase())
                }
                (a, b) => return a.is_some().cmp(&b.is_some()),
            },
        };
        if order.is_ne() {
            return order;
        }
    }
}

/// The digits that `text` begins with, without leading zeros, and what follows them.
fn number(text: &str) -> Option<(&str, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(end)?;
    (!digits.is_empty()).then(|| (digits.trim_start_matches('0'), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_count() {
        let sorted = [
            "2.safetensors",
            "10.safetensors",
            "B/1",
            "b/2",
            "b.safetensors",
            "style-v2",
            "style-v2.1",
            "Style-v10",
            "style-v010",
            "style-v10-final",
            "z",
            "画2",
            "画10",
        ];
        let mut names: Vec<&Path> = sorted.iter().rev().map(Path::new).collect();
        names.sort_by(|a, b| compare(a, b));
        assert_eq!(names, sorted.map(Path::new));
    }

    #[test]
    fn the_order_is_total() {
        let names = [
            "a1",
            "a01",
            "A1",
            "a",
            "",
            "1",
            "01",
            "a/b",
            "ab",
            "a-b",
            "1a",
            "99999999999999999999",
        ];
        for a in names.map(Path::new) {
            for b in names.map(Path::new) {
                assert_eq!(compare(a, b), compare(b, a).reverse());
                assert_eq!(compare(a, b).is_eq(), a == b);
                for c in names.map(Path::new) {
                    if compare(a, b).is_le() && compare(b, c).is_le() {
                        assert!(compare(a, c).is_le(), "{a:?} {b:?} {c:?}");
                    }
                }
            }
        }
    }
}
