//! Squared norms of the rows or columns of a float32 matrix, summed up in float64.
//!
//! The order of the sums is that of the rows, however many threads there are.

use std::num::NonZeroUsize;

use super::{Float, WeightFault, check_len, floats, value};
use crate::work::drain;

/// Bytes of a float64.
const DOUBLE: usize = 8;
/// Bytes of a float32.
const FLOAT: usize = 4;
/// Rows that are summed up by one thread.
const BAND_ROWS: usize = 32;

/// Writes the squared norm of each row.
///
/// `matrix` is (rows, columns) float32, `norms` (rows) float64.
pub fn row_norms(
    matrix: &[u8],
    columns: NonZeroUsize,
    norms: &mut [u8],
    threads: NonZeroUsize,
) -> Result<(), WeightFault> {
    let rows = norms.len() / DOUBLE;
    check(matrix, rows, columns)?;
    check_len("the norms", norms.len(), &[rows, DOUBLE])?;
    let bands = matrix.chunks(BAND_ROWS * columns.get() * FLOAT);
    let bands = bands.zip(norms.chunks_mut(BAND_ROWS * DOUBLE)).collect();
    drain::drain_apart(bands, threads, |(matrix, norms): (&[u8], &mut [u8])| {
        let rows = floats(matrix).chunks_exact(columns.get());
        for (norm, row) in norms.as_chunks_mut().0.iter_mut().zip(rows) {
            *norm = row_norm(row).to_ne_bytes();
        }
    });
    Ok(())
}

/// Adds the squared norm of each column.
///
/// `matrix` is (rows, columns) float32, `norms` (columns) float64.
pub fn column_norms(
    matrix: &[u8],
    columns: NonZeroUsize,
    norms: &mut [u8],
    threads: NonZeroUsize,
) -> Result<(), WeightFault> {
    let rows = matrix.len() / FLOAT / columns;
    check(matrix, rows, columns)?;
    check_len("the norms", norms.len(), &[columns.get(), DOUBLE])?;
    let bands = matrix.chunks(BAND_ROWS * columns.get() * FLOAT);
    let mut sums = vec![0.0; bands.len() * columns.get()];
    let bands = bands.zip(sums.chunks_mut(columns.get())).collect();
    drain::drain_apart(bands, threads, |(matrix, sums): (&[u8], &mut [f64])| {
        for row in floats(matrix).chunks_exact(columns.get()) {
            for (sum, &own) in sums.iter_mut().zip(row) {
                *sum += square(own);
            }
        }
    });
    for sums in sums.chunks_exact(columns.get()) {
        for (norm, sum) in norms.as_chunks_mut().0.iter_mut().zip(sums) {
            *norm = (f64::from_ne_bytes(*norm) + sum).to_ne_bytes();
        }
    }
    Ok(())
}

fn check(matrix: &[u8], rows: usize, columns: NonZeroUsize) -> Result<(), WeightFault> {
    check_len("the matrix", matrix.len(), &[rows, columns.get(), FLOAT])
}

fn row_norm(row: &[Float]) -> f64 {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for (lane, &own) in lanes.iter_mut().zip(chunk) {
            *lane += square(own);
        }
    }
    let rest: f64 = rest.iter().map(|&own| square(own)).sum();
    lanes.iter().sum::<f64>() + rest
}

fn square(own: Float) -> f64 {
    let own = value(own);
    f64::from(own * own)
}
