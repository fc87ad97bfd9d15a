//! The weight of an SVDQuant layer, in 4-bit integers or 4-bit floats.
//!
//! A tile has 128 rows by 64 columns, in the order (n16, n8, k4, n2, k2, k8) of
//! `python/qwenlora/packing/pack.py`: 16 bytes hold eight columns each of the rows n and n + 8, at
//! two places that are 32 columns apart.

use std::num::NonZeroUsize;

use super::{Float, WeightFault, check_len, floats, value};
use crate::work::drain;

/// Rows of a tile.
const TILE_ROWS: usize = 128;
/// Columns of a tile.
const TILE_COLUMNS: usize = 64;
/// Rows whose values lie together in a tile.
const STRIP_ROWS: usize = 16;
/// Bytes of 16 rows of a tile.
const STRIP_BYTES: usize = STRIP_ROWS * TILE_COLUMNS / 2;
/// Bytes of a float32.
const FLOAT: usize = 4;

/// The form of an SVDQuant weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SvdqForm {
    /// Signed integers in groups of 64 columns.
    Int4,
    /// Floats (e2m1) in groups of 16 columns.
    Fp4,
}

impl SvdqForm {
    /// Groups of columns, each with its own scale, in a tile.
    fn groups(self) -> usize {
        match self {
            Self::Int4 => 1,
            Self::Fp4 => 4,
        }
    }

    /// What each byte stands for: the value in its low half, then that in its high half.
    fn values(self) -> &'static [[f32; 2]; 256] {
        match self {
            Self::Int4 => &INT4,
            Self::Fp4 => &FP4,
        }
    }

    /// The place of a row's scale among those of a tile: of its first group, the others follow.
    fn scale_at(self, row: usize) -> usize {
        match self {
            Self::Int4 => row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2,
            Self::Fp4 => ((row % 8 * 4 + row % 32 / 8) * 4 + row / 32) * 4,
        }
    }
}

const INTEGERS: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0,
];
const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];
static INT4: [[f32; 2]; 256] = pairs(&INTEGERS);
static FP4: [[f32; 2]; 256] = pairs(&E2M1);

const fn pairs(values: &[f32; 16]) -> [[f32; 2]; 256] {
    let mut table = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [values[byte % 16], values[byte / 16]];
        byte += 1;
    }
    table
}

/// Whole tiles of rows of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Svdq<'a> {
    /// The form of its values.
    pub form: SvdqForm,
    /// (rows, columns/2) bytes packed.
    pub values: &'a [u8],
    /// (columns/group, rows) float32, packed as the form has them.
    pub scales: &'a [u8],
    /// (rows) float32: a factor on each row.
    pub row_factors: Option<&'a [u8]>,
    /// (columns) float32: a factor on each column.
    pub column_factors: &'a [u8],
    /// Its rows, a multiple of 128.
    pub rows: usize,
    /// Its columns, a multiple of 64.
    pub columns: usize,
}

impl Svdq<'_> {
    /// Writes value * (scale * row factor) * column factor of all rows, with up to `threads` threads.
    ///
    /// `dest` is (rows, columns) float32.
    pub fn write_to(&self, dest: &mut [u8], threads: NonZeroUsize) -> Result<(), WeightFault> {
        self.check(dest)?;
        let strip_bytes = STRIP_ROWS * self.columns * FLOAT;
        let bands = drain::bands(dest, strip_bytes, 1).collect();
        drain::drain_apart(bands, threads, |(first, band): (usize, &mut [u8])| {
            for (strip, rows) in (first..).zip(band.chunks_exact_mut(strip_bytes)) {
                self.write_strip(strip, rows.as_chunks_mut().0);
            }
        });
        Ok(())
    }

    fn check(&self, dest: &[u8]) -> Result<(), WeightFault> {
        let (rows, columns) = (self.rows, self.columns);
        for (what, size, multiple) in [
            ("rows", rows, TILE_ROWS),
            ("columns", columns, TILE_COLUMNS),
        ] {
            if !size.is_multiple_of(multiple) {
                return Err(WeightFault::Multiple {
                    what,
                    size,
                    multiple,
                });
            }
        }
        let groups = columns / TILE_COLUMNS * self.form.groups();
        check_len("qweight", self.values.len(), &[rows, columns / 2])?;
        check_len("wscales", self.scales.len(), &[rows, groups, FLOAT])?;
        check_len(
            "column factors",
            self.column_factors.len(),
            &[columns, FLOAT],
        )?;
        if let Some(factors) = self.row_factors {
            check_len("row factors", factors.len(), &[rows, FLOAT])?;
        }
        check_len("the destination", dest.len(), &[rows, columns, FLOAT])
    }

    /// Writes 16 rows.
    fn write_strip(&self, strip: usize, rows: &mut [Float]) {
        let tiles = self.columns / TILE_COLUMNS;
        let strips = TILE_ROWS / STRIP_ROWS;
        let (tile_row, within) = (strip / strips, strip % strips);
        let factors: [f32; STRIP_ROWS] = std::array::from_fn(|row| {
            let own = self.row_factors.map(floats);
            own.map_or(1.0, |factors| value(factors[strip * STRIP_ROWS + row]))
        });
        let column_factors = floats(self.column_factors).as_chunks::<TILE_COLUMNS>().0;
        let tile_scales = TILE_ROWS * self.form.groups();
        let scales = floats(self.scales).chunks_exact(tile_scales);
        let scales = scales.skip(tile_row * tiles);
        let bytes = self.values.as_chunks::<STRIP_BYTES>().0;
        let bytes = bytes.iter().skip(tile_row * tiles * strips + within);
        let places = bytes.step_by(strips).zip(scales).zip(column_factors);
        for (tile, ((bytes, scales), columns)) in places.enumerate() {
            let columns = columns.map(value);
            let scale = |row: usize, group: usize| {
                let at = self.form.scale_at(within * STRIP_ROWS + row);
                value(scales[at + group]) * factors[row]
            };
            for (n8, bytes) in bytes
                .as_chunks::<{ STRIP_BYTES / 8 }>()
                .0
                .iter()
                .enumerate()
            {
                for n2 in [0, 1] {
                    let row = n2 * 8 + n8;
                    let begin = row * self.columns + tile * TILE_COLUMNS;
                    let dest = &mut rows[begin..][..TILE_COLUMNS];
                    let own = match self.form {
                        SvdqForm::Int4 => [scale(row, 0); 4],
                        SvdqForm::Fp4 => std::array::from_fn(|group| scale(row, group)),
                    };
                    write_row(self.form.values(), bytes, n2, own, &columns, dest);
                }
            }
        }
    }
}

/// Writes 64 columns of one row, from 64 bytes that hold two rows: (k4, n2, k2, four bytes).
#[inline]
fn write_row(
    values: &[[f32; 2]; 256],
    bytes: &[u8; STRIP_BYTES / 8],
    n2: usize,
    scales: [f32; 4],
    columns: &[f32; TILE_COLUMNS],
    dest: &mut [Float],
) {
    let words = bytes.as_chunks::<4>().0;
    let dest = dest.as_chunks_mut::<8>().0.iter_mut();
    let columns = columns.as_chunks::<8>().0;
    // (k2, k4): eight columns each
    for (at, (dest, columns)) in dest.zip(columns).enumerate() {
        let (k2, k4) = (at / 4, at % 4);
        let word = words[k4 * 4 + n2 * 2 + k2];
        let scale = scales[at / 2];
        for (pair, byte) in word.into_iter().enumerate() {
            let own = values[usize::from(byte)];
            for half in [0, 1] {
                let column = pair * 2 + half;
                dest[column] = (own[half] * scale * columns[column]).to_ne_bytes();
            }
        }
    }
}
