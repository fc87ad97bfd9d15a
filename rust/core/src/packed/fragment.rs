//! The order of elements within a fragment, in units of two elements that stay together.
//!
//! An element (n, k) lies at `(n % 8) * 32 + (k % 8) / 2 * 8 + n / 8 * 4 + k / 8 * 2 + k % 2`. So
//! the logical rows n and n + 8 make one line of the fragment, and k and k + 1 (k even) are one
//! unit: in units a line is a 4 x 4 transpose.

#[cfg(target_arch = "x86_64")]
use safe_arch::{
    load_unaligned_m128i, m128i, store_unaligned_m128i, unpack_high_i32_m128i,
    unpack_high_i64_m128i, unpack_low_i32_m128i, unpack_low_i64_m128i,
};

use super::{FRAGMENT, TILE};

/// Lines of a fragment.
pub(super) const LINES: usize = TILE / 2;

/// Two elements: `U` is the size of both.
pub(super) type Unit<const U: usize> = [u8; U];
/// One logical row of a fragment: 16 elements.
pub(super) type Row<const U: usize> = [Unit<U>; TILE / 2];
/// One line of a packed fragment: 32 elements, a cache line where elements have 2 bytes.
pub(super) type Line<const U: usize> = [Unit<U>; FRAGMENT / LINES / 2];

/// Writes the line that logical rows n and n + 8 make.
#[inline]
pub(super) fn weave<const U: usize>(upper: &Row<U>, lower: &Row<U>, line: &mut Line<U>) {
    #[cfg(target_arch = "x86_64")]
    if U == 4 {
        let line = line.as_flattened_mut().as_chunks_mut().0;
        return weave_vectors(vectors(upper), vectors(lower), line);
    }
    // (n2, k2, k4) => (k4, n2, k2), a unit each
    for k4 in 0..4 {
        line[4 * k4] = upper[k4];
        line[4 * k4 + 1] = upper[4 + k4];
        line[4 * k4 + 2] = lower[k4];
        line[4 * k4 + 3] = lower[4 + k4];
    }
}

/// The logical rows n and n + 8 of a line: undoes [`weave`].
#[inline]
pub(super) fn unweave<const U: usize>(line: &Line<U>) -> [Row<U>; 2] {
    let mut rows = [[[0; U]; TILE / 2]; 2];
    #[cfg(target_arch = "x86_64")]
    if U == 4 {
        let by_k4 = [0, 1, 2, 3].map(|k4| load_unaligned_m128i(&vectors(line)[k4]));
        // (k4, n2, k2) => (n2, k2, k4)
        let columns = rows.as_flattened_mut().as_flattened_mut().as_chunks_mut().0;
        for (column, values) in columns.iter_mut().zip(transposed(by_k4)) {
            store_unaligned_m128i(column, values);
        }
        return rows;
    }
    let [upper, lower] = &mut rows;
    // (k4, n2, k2) => (n2, k2, k4), a unit each
    for k4 in 0..4 {
        upper[k4] = line[4 * k4];
        upper[4 + k4] = line[4 * k4 + 1];
        lower[k4] = line[4 * k4 + 2];
        lower[4 + k4] = line[4 * k4 + 3];
    }
    rows
}

/// The same for units of 4 bytes, four at a time: the compiler does not find this by itself.
#[cfg(target_arch = "x86_64")]
#[inline]
fn weave_vectors(upper: &[[u8; 16]], lower: &[[u8; 16]], line: &mut [[u8; 16]]) {
    // k2 of row n, k2 of row n + 8
    let [a, b] = [0, 1].map(|k2| load_unaligned_m128i(&upper[k2]));
    let [c, d] = [0, 1].map(|k2| load_unaligned_m128i(&lower[k2]));
    // (n2, k2, k4) => (k4, n2, k2)
    for (values, woven) in line.iter_mut().zip(transposed([a, b, c, d])) {
        store_unaligned_m128i(values, woven);
    }
}

/// A 4 x 4 matrix of units, transposed.
#[cfg(target_arch = "x86_64")]
#[inline]
fn transposed([a, b, c, d]: [m128i; 4]) -> [m128i; 4] {
    let (ab_low, ab_high) = (unpack_low_i32_m128i(a, b), unpack_high_i32_m128i(a, b));
    let (cd_low, cd_high) = (unpack_low_i32_m128i(c, d), unpack_high_i32_m128i(c, d));
    [
        unpack_low_i64_m128i(ab_low, cd_low),
        unpack_high_i64_m128i(ab_low, cd_low),
        unpack_low_i64_m128i(ab_high, cd_high),
        unpack_high_i64_m128i(ab_high, cd_high),
    ]
}

#[cfg(target_arch = "x86_64")]
fn vectors<const U: usize>(units: &[Unit<U>]) -> &[[u8; 16]] {
    units.as_flattened().as_chunks().0
}

/// Packed memory as lines.
pub(super) fn lines<const U: usize>(bytes: &[u8]) -> &[Line<U>] {
    bytes.as_chunks().0.as_chunks().0
}

/// Packed memory as lines.
pub(super) fn lines_mut<const U: usize>(bytes: &mut [u8]) -> &mut [Line<U>] {
    bytes.as_chunks_mut().0.as_chunks_mut().0
}

/// Logical memory, of rows that are multiples of 16 elements, as rows of fragments.
pub(super) fn rows<const U: usize>(bytes: &[u8]) -> &[Row<U>] {
    bytes.as_chunks().0.as_chunks().0
}

/// The same, to be written.
pub(super) fn rows_mut<const U: usize>(bytes: &mut [u8]) -> &mut [Row<U>] {
    bytes.as_chunks_mut().0.as_chunks_mut().0
}

/// Zeros some lines.
pub(super) fn clear<const U: usize>(lines: &mut [Line<U>]) {
    lines.as_flattened_mut().as_flattened_mut().fill(0);
}
