//! Rows of packed weights against the element formulas, norms against float64, and every fault.

use std::num::NonZeroUsize;

use proptest::prelude::*;
use qwenlora_core::weight::{Awq, Svdq, SvdqForm, WeightFault, column_norms, row_norms};

const INTEGERS: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0,
];
const FLOATS: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Bytes without period.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Positive numbers without period.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    pattern(len, seed)
        .into_iter()
        .map(|own| f32::from(own) / 64.0 + 0.25)
        .collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|own| own.to_ne_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|own| f32::from_ne_bytes(*own))
        .collect()
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).expect("a thread")
}

/// The byte and the half of it that hold an element of an SVDQuant weight.
fn svdq_place(n: usize, k: usize, columns: usize) -> (usize, usize) {
    let tile = n / 128 * (columns / 64) + k / 64;
    let lane = ((tile * 8 + n % 128 / 16) * 8 + n % 8) * 4 + k % 32 / 8;
    let word = lane * 4 + n % 16 / 8 * 2 + k % 64 / 32;
    (word * 4 + k % 8 / 2, k % 2)
}

fn svdq_scale_place(form: SvdqForm, n: usize, k: usize, columns: usize) -> usize {
    match form {
        SvdqForm::Int4 => {
            let tile = (n / 128 * (columns / 64) + k / 64) * 128;
            tile + n % 128 / 16 * 16 + n % 8 / 2 * 4 + n % 16 / 8 * 2 + n % 2
        }
        SvdqForm::Fp4 => {
            let group = k / 16;
            let tile = n / 128 * (columns / 64) + group / 4;
            let lane = (tile * 8 + n % 8) * 4 + n % 32 / 8;
            (lane * 4 + n % 128 / 32) * 4 + group % 4
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn svdq_rows_are_those_of_the_formula(
        fp4 in any::<bool>(),
        tiles in 1_usize..3,
        groups in 1_usize..4,
        has_factors in any::<bool>(),
        workers in 1_usize..4,
        seed in any::<u32>(),
    ) {
        let (form, table, group) = if fp4 {
            (SvdqForm::Fp4, FLOATS, 16)
        } else {
            (SvdqForm::Int4, INTEGERS, 64)
        };
        let (rows, columns) = (tiles * 128, groups * 64);
        let values = pattern(rows * columns / 2, seed);
        let scales = numbers(rows * columns / group, seed ^ 1);
        let by_row = numbers(rows, seed ^ 2);
        let by_column = numbers(columns, seed ^ 3);
        let row_bytes = bytes(&by_row);
        let weight = Svdq {
            form,
            values: &values,
            scales: &bytes(&scales),
            row_factors: has_factors.then_some(row_bytes.as_slice()),
            column_factors: &bytes(&by_column),
            rows,
            columns,
        };
        let mut dest = vec![0; rows * columns * 4];
        weight.write_to(&mut dest, threads(workers)).expect("sizes that fit");
        for (at, found) in floats(&dest).into_iter().enumerate() {
            let (n, k) = (at / columns, at % columns);
            let (byte, half) = svdq_place(n, k, columns);
            let nibble = usize::from(values[byte] >> (4 * half) & 15);
            let scale = scales[svdq_scale_place(form, n, k, columns)];
            let factor = if has_factors { by_row[n] } else { 1.0 };
            let wanted = table[nibble] * (scale * factor) * by_column[k];
            prop_assert_eq!(found.to_bits(), wanted.to_bits());
        }
    }

    #[test]
    fn awq_rows_are_those_of_the_formula(
        planes in prop::sample::select(vec![1_usize, 2, 6]),
        tiles in 1_usize..3,
        groups in 1_usize..3,
        workers in 1_usize..4,
        begin in 0_usize..12,
        seed in any::<u32>(),
    ) {
        let (rows, columns) = (tiles * 12, groups * 64);
        let values = pattern(rows * columns / 2, seed);
        let scales = numbers(rows * groups, seed ^ 1);
        let zeros = numbers(rows * groups, seed ^ 2);
        let weight = Awq {
            values: &values,
            scales: &bytes(&scales),
            zeros: &bytes(&zeros),
            rows,
            columns,
            planes: NonZeroUsize::new(planes).expect("a plane"),
        };
        let count = rows - begin;
        let mut dest = vec![0; count * columns * 4];
        weight.write_to(begin, count, &mut dest, threads(workers)).expect("sizes that fit");
        for (at, found) in floats(&dest).into_iter().enumerate() {
            let (row, k) = (begin + at / columns, at % columns);
            let n = row % (rows / planes) * planes + row / (rows / planes);
            let word = ((n / 4 * groups + k / 64) * 4 + n % 4) * 16 + k % 64 / 32 * 8 + k % 8;
            let own = u16::from_le_bytes([values[2 * word], values[2 * word + 1]]);
            let value = f32::from(own >> (4 * (k % 32 / 8)) & 15);
            let place = k / 64 * rows + n;
            let wanted = value * scales[place] + zeros[place];
            prop_assert_eq!(found.to_bits(), wanted.to_bits());
        }
    }

    #[test]
    fn norms_are_those_of_float64(
        rows in 1_usize..80,
        columns in 1_usize..40,
        workers in 1_usize..4,
        seed in any::<u32>(),
    ) {
        let matrix = numbers(rows * columns, seed);
        let size = NonZeroUsize::new(columns).expect("a column");
        let mut by_row = vec![0; rows * 8];
        let mut by_column = vec![0; columns * 8];
        row_norms(&bytes(&matrix), size, &mut by_row, threads(workers)).expect("sizes that fit");
        column_norms(&bytes(&matrix), size, &mut by_column, threads(workers))
            .expect("sizes that fit");
        let near = |bytes: &[u8], wanted: f64| {
            let found = bytes.as_chunks().0.first().map_or(0.0, |own| f64::from_ne_bytes(*own));
            (found - wanted).abs() <= 1e-6 * wanted
        };
        let square = |at: usize| f64::from(matrix[at]).powi(2);
        for row in 0..rows {
            let wanted = (0..columns).map(|column| square(row * columns + column)).sum();
            prop_assert!(near(&by_row[row * 8..], wanted));
        }
        for column in 0..columns {
            let wanted = (0..rows).map(|row| square(row * columns + column)).sum();
            prop_assert!(near(&by_column[column * 8..], wanted));
        }
    }
}

/// What a weight of 128 x 64 whose sizes were changed is refused with.
fn svdq_fault(rows: usize, columns: usize, lens: [usize; 4]) -> WeightFault {
    let [values, scales, factors, dest] = lens.map(|len| vec![0; len]);
    let weight = Svdq {
        form: SvdqForm::Int4,
        values: &values,
        scales: &scales,
        row_factors: None,
        column_factors: &factors,
        rows,
        columns,
    };
    let mut dest = dest;
    weight
        .write_to(&mut dest, threads(1))
        .expect_err("sizes that do not fit")
}

#[test]
fn faults_name_what_does_not_fit() {
    let right = [128 * 32, 128 * 4, 64 * 4, 128 * 64 * 4];
    let faults = [
        (127, 64, right, "rows must be a multiple of 128, got 127"),
        (128, 63, right, "columns must be a multiple of 64, got 63"),
        (
            128,
            64,
            [0, right[1], right[2], right[3]],
            "qweight has 0 bytes, its shape takes 4096",
        ),
        (
            128,
            64,
            [right[0], 8, right[2], right[3]],
            "wscales has 8 bytes, its shape takes 512",
        ),
        (
            128,
            64,
            [right[0], right[1], right[2], 4],
            "the destination has 4 bytes, its shape takes 32768",
        ),
        (
            1 << 60,
            64,
            right,
            "qweight has 4096 bytes, its shape takes more than memory has",
        ),
    ];
    for (rows, columns, lens, words) in faults {
        assert_eq!(svdq_fault(rows, columns, lens).to_string(), words);
    }
}

#[test]
fn rows_that_a_weight_lacks_are_refused() {
    let (values, factors) = (vec![0; 4 * 32], vec![0; 4 * 4]);
    let weight = Awq {
        values: &values,
        scales: &factors,
        zeros: &factors,
        rows: 4,
        columns: 64,
        planes: NonZeroUsize::MIN,
    };
    let fault = weight.write_to(3, 2, &mut vec![0; 2 * 64 * 4], threads(1));
    let words = fault.expect_err("one row too many").to_string();
    assert_eq!(words, "rows 3 to 5 of a weight of 4");
    let fault = weight.write_to(usize::MAX, 1, &mut vec![0; 64 * 4], threads(1));
    assert!(fault.is_err());
}
