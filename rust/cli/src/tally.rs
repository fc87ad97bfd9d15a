//! Many values in a few words: counts, spreads, sizes, numbers.

use std::cmp::Ordering;

/// More distinct values than this become a range.
const MAX_DISTINCT: usize = 4;

/// Distinct values in order, each with how often it occurs.
pub(crate) fn counted<T: Copy>(
    mut values: Vec<T>,
    compare: impl Fn(&T, &T) -> Ordering,
) -> Vec<(T, usize)> {
    values.sort_by(&compare);
    values
        .chunk_by(|a, b| compare(a, b).is_eq())
        .filter_map(|run| Some((*run.first()?, run.len())))
        .collect()
}

/// `16`, or `16 (480), 32 (240)`, or a range with its commonest value where there are many.
pub(crate) fn spread<T>(counted: &[(T, usize)], show: impl Fn(&T) -> String) -> Option<String> {
    let (first, last) = (counted.first()?, counted.last()?);
    if counted.len() == 1 {
        return Some(show(&first.0));
    }
    if counted.len() <= MAX_DISTINCT {
        let parts: Vec<String> = counted
            .iter()
            .map(|(value, count)| format!("{} ({count})", show(value)))
            .collect();
        return Some(parts.join(", "));
    }
    // The earliest of equals.
    let most = counted.iter().rev().max_by_key(|(_, count)| *count)?;
    let (low, high, common) = (show(&first.0), show(&last.0), show(&most.0));
    Some(format!("{low} to {high}, most often {common} ({})", most.1))
}

/// `1 module`, `2 modules`.
pub(crate) fn count(count: usize, noun: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

/// A number to six digits.
pub(crate) fn number(value: f64) -> String {
    rounded(value, 6)
}

/// A number to so many digits.
pub(crate) fn rounded(value: f64, digits: usize) -> String {
    let places = digits.saturating_sub(1);
    let rounded: f64 = format!("{value:.places$e}").parse().unwrap_or(value);
    if rounded == 0.0 || (1e-4..1e7).contains(&rounded.abs()) {
        rounded.to_string()
    } else {
        format!("{rounded:e}")
    }
}

const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// `1.4 KiB`, `281.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    let Some((name, unit)) = UNITS.iter().find(|(_, unit)| bytes >= *unit) else {
        return format!("{bytes} bytes");
    };
    let tenths = u128::from(bytes) * 10 / u128::from(*unit);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// `1.4K`, `281M`, as file listings have it.
pub(crate) fn size_short(bytes: u64) -> String {
    let Some((name, unit)) = UNITS.iter().find(|(_, unit)| bytes >= *unit) else {
        return bytes.to_string();
    };
    let letter = name.get(..1).unwrap_or_default();
    let tenths = u128::from(bytes) * 10 / u128::from(*unit);
    if tenths < 100 {
        format!("{}.{}{letter}", tenths / 10, tenths % 10)
    } else {
        format!("{}{letter}", tenths / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_values_are_listed_and_many_are_a_range() {
        let show = |values: &[u64]| spread(&counted(values.to_vec(), u64::cmp), u64::to_string);
        assert_eq!(show(&[]), None);
        assert_eq!(show(&[16, 16]).as_deref(), Some("16"));
        assert_eq!(show(&[32, 16, 16]).as_deref(), Some("16 (2), 32 (1)"));
        assert_eq!(
            show(&[8, 1, 2, 3, 4, 3, 2]).as_deref(),
            Some("1 to 8, most often 2 (2)")
        );
    }

    #[test]
    fn numbers_and_sizes() {
        let numbers = [0.125, 1.0, 1.0 / 3.0, 0.0, 1e-9, -2.5e300, f64::INFINITY];
        assert_eq!(
            numbers.map(number),
            ["0.125", "1", "0.333333", "0", "1e-9", "-2.5e300", "inf"]
        );
        let sizes = [0, 1023, 1024, 295_146_184, u64::MAX];
        assert_eq!(
            sizes.map(size),
            [
                "0 bytes",
                "1023 bytes",
                "1.0 KiB",
                "281.4 MiB",
                "17179869183.9 GiB"
            ]
        );
        assert_eq!(
            sizes.map(size_short),
            ["0", "1023", "1.0K", "281M", "17179869183G"]
        );
        let rough = [1.0 / 3.0, 0.0625, 12345.0].map(|value| rounded(value, 3));
        assert_eq!(rough, ["0.333", "0.0625", "12300"]);
    }
}
