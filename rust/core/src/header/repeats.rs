//! Whether a name stands twice.

/// Whether two items have the same name.
///
/// Names that agree in a cheap fingerprint are compared themselves. Whoever makes many names agree
/// in it gains nothing: they are sorted, however many they are.
pub(super) fn repeats<T>(items: &[T], name: impl Fn(&T) -> &str) -> bool {
    let prints = items.iter().map(|item| (fingerprint(name(item)), item));
    let mut order: Vec<(u64, &T)> = prints.collect();
    order.sort_unstable_by_key(|(print, _)| *print);
    order.chunk_by(|a, b| a.0 == b.0).any(|alike| {
        let mut names: Vec<&str> = match alike {
            [_] => return false,
            several => several.iter().map(|(_, item)| name(item)).collect(),
        };
        names.sort_unstable();
        names
            .windows(2)
            .any(|pair| matches!(pair, [a, b] if a == b))
    })
}

/// An odd number with its bits in no order.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A number that differs for most names that differ.
fn fingerprint(name: &str) -> u64 {
    let (words, rest) = name.as_bytes().as_chunks::<8>();
    let mut last = [0; 8];
    for (to, byte) in last.iter_mut().zip(rest) {
        *to = *byte;
    }
    let words = words
        .iter()
        .chain([&last])
        .map(|word| u64::from_le_bytes(*word));
    let seed = u64::try_from(name.len()).unwrap_or(u64::MAX);
    words.fold(seed, |print, word| {
        (print.rotate_left(5) ^ word).wrapping_mul(FACTOR)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn of(names: &[&str]) -> bool {
        repeats(names, |name| name)
    }

    #[test]
    fn names_are_compared_whole() {
        assert!(!of(&[]));
        assert!(!of(&[
            "",
            "\0",
            "\0\0",
            "a",
            "a\0",
            "abcdefgh",
            "abcdefgh\0",
            "abcdefghi"
        ]));
        assert!(of(&["", ""]));
        assert!(of(&["b", "abcdefghij", "a", "abcdefghij"]));
        assert!(of(&["é", "e", "é"]));
    }

    #[test]
    fn names_of_one_fingerprint_are_told_apart() {
        let after = |begin: &str| {
            let word = u64::from_le_bytes(begin.as_bytes().try_into().unwrap());
            ((16_u64.rotate_left(5) ^ word).wrapping_mul(FACTOR)).rotate_left(5)
        };
        let wanted = after("00000000") ^ u64::from_le_bytes(*b"00000000");
        // The second word undoes what another first word changed, where that makes it text.
        let names: Vec<String> = (0..5000)
            .map(|number| format!("{number:08}"))
            .filter_map(|begin| {
                let end = (after(&begin) ^ wanted).to_le_bytes();
                Some(begin + std::str::from_utf8(&end).ok()?)
            })
            .collect();
        let prints: HashSet<u64> = names.iter().map(|name| fingerprint(name)).collect();
        assert!(names.len() > 4 && prints.len() == 1, "{names:?}");
        assert!(!repeats(&names, |name| name));
        let twice: Vec<String> = names.iter().chain(names.first()).cloned().collect();
        assert!(repeats(&twice, |name| name));
    }
}
