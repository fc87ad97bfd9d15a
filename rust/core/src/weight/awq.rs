//! The weight of an AWQ layer: unsigned 4-bit integers with a zero for each group of 64 columns.
//!
//! Four rows alternate in memory, 32 bytes of each. These are words of 16 bits in the order (k2, k8),
//! and a word has the columns k, k + 8, k + 16 and k + 24, the first in its lowest bits.

use std::num::NonZeroUsize;

use super::{Float, WeightFault, check_len, floats, value};
use crate::work::drain;

/// Rows that alternate.
const ROWS: usize = 4;
/// Columns of a group.
const GROUP: usize = 64;
/// Bytes of a group in one row.
const GROUP_BYTES: usize = GROUP / 2;
/// Bytes of a float32.
const FLOAT: usize = 4;

/// A weight.
#[derive(Debug, Clone, Copy)]
pub struct Awq<'a> {
    /// (rows/4, columns/2) words of 32 bits, packed.
    pub values: &'a [u8],
    /// (columns/64, rows) float32.
    pub scales: &'a [u8],
    /// (columns/64, rows) float32.
    pub zeros: &'a [u8],
    /// Its rows, a multiple of 4 and of `planes`.
    pub rows: usize,
    /// Its columns, a multiple of 64.
    pub columns: usize,
    /// Planes whose rows alternate in memory, while logical rows have them one after another; 1
    /// where both orders are the same.
    pub planes: NonZeroUsize,
}

impl Awq<'_> {
    /// Writes value * scale + zero of some logical rows, with up to `threads` threads.
    ///
    /// `dest` is (`count`, columns) float32.
    pub fn write_to(
        &self,
        begin: usize,
        count: usize,
        dest: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), WeightFault> {
        self.check(begin, count, dest)?;
        let row_bytes = self.columns * FLOAT;
        let bands = drain::bands(dest, row_bytes, 1).collect();
        drain::drain_apart(bands, threads, |(first, band): (usize, &mut [u8])| {
            for (row, dest) in (begin + first..).zip(band.chunks_exact_mut(row_bytes)) {
                self.write_row(row, dest.as_chunks_mut().0);
            }
        });
        Ok(())
    }

    fn check(&self, begin: usize, count: usize, dest: &[u8]) -> Result<(), WeightFault> {
        let (rows, columns) = (self.rows, self.columns);
        for (what, size, multiple) in [
            ("rows", rows, ROWS),
            ("rows", rows, self.planes.get()),
            ("columns", columns, GROUP),
        ] {
            if !size.is_multiple_of(multiple) {
                return Err(WeightFault::Multiple {
                    what,
                    size,
                    multiple,
                });
            }
        }
        check_len("qweight", self.values.len(), &[rows, columns / 2])?;
        for (what, memory) in [("wscales", self.scales), ("wzeros", self.zeros)] {
            check_len(what, memory.len(), &[columns / GROUP, rows, FLOAT])?;
        }
        if begin.checked_add(count).is_none_or(|end| end > rows) {
            return Err(WeightFault::Rows { begin, count, rows });
        }
        check_len("the destination", dest.len(), &[count, columns, FLOAT])
    }

    fn write_row(&self, row: usize, dest: &mut [Float]) {
        let channels = self.rows / self.planes.get();
        let stored = row % channels * self.planes.get() + row / channels;
        let groups = self.columns / GROUP;
        let bytes = self.values.as_chunks::<GROUP_BYTES>().0;
        let first = stored / ROWS * groups * ROWS + stored % ROWS;
        let bytes = bytes.iter().skip(first).step_by(ROWS);
        let of_row = |memory| floats(memory).iter().skip(stored).step_by(self.rows);
        let factors = of_row(self.scales).zip(of_row(self.zeros));
        let dest = dest.as_chunks_mut::<GROUP>().0.iter_mut();
        for (dest, (bytes, (&scale, &zero))) in dest.zip(bytes.zip(factors)) {
            write_group(bytes, value(scale), value(zero), dest);
        }
    }
}

/// Writes 64 columns of one row.
#[inline]
fn write_group(bytes: &[u8; GROUP_BYTES], scale: f32, zero: f32, dest: &mut [Float; GROUP]) {
    // (k2, k8)
    let words = bytes.as_chunks::<16>().0;
    for (half, words) in dest.as_chunks_mut::<32>().0.iter_mut().zip(words) {
        let words = words.as_chunks::<2>().0;
        // (k4, k8)
        for (k4, dest) in half.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            for (dest, &word) in dest.iter_mut().zip(words) {
                let own = u16::from_le_bytes(word) >> (4 * k4) & 15;
                *dest = (f32::from(own) * scale + zero).to_ne_bytes();
            }
        }
    }
}
