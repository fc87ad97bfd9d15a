//! Row-major factors side by side, their rows reordered: bytes moved to their places, none
//! computed.
//!
//! This is the `up` of a side branch: LoRAs stacked along the rank, and for a modulation layer the
//! rows brought from plane order to the interleaved order of the layer (`docs/layout.md`).

use std::num::NonZeroUsize;

use thiserror::Error;

use crate::queue;

/// One stacked factor: where it goes and what it is made of.
#[derive(Debug)]
pub struct RowsRecipe<'a> {
    /// The factor's memory, (rows, widths of all columns): filled entirely.
    pub dest: &'a mut [u8],
    /// Its rows.
    pub rows: usize,
    /// Planes that the rows of the sources come in: row j (rows / planes) + c of a source goes to
    /// row c planes + j. One plane keeps their order.
    pub planes: NonZeroUsize,
    /// What each row is made of.
    pub columns: Vec<RowsColumn<'a>>,
}

/// Consecutive bytes of every row.
#[derive(Debug, Clone, Copy)]
pub struct RowsColumn<'a> {
    /// (rows, `width_bytes`); zeros where there is none.
    pub source: Option<&'a [u8]>,
    /// Bytes of each row.
    pub width_bytes: usize,
}

/// A recipe that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("recipe {recipe}: {fault}")]
pub struct RowsError {
    /// Its index.
    pub recipe: usize,
    /// What is wrong.
    pub fault: RowsFault,
}

/// Why a recipe cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RowsFault {
    /// The rows make no whole planes.
    #[error("rows must be a multiple of the {planes} planes, got {rows}")]
    Planes {
        /// The rows.
        rows: usize,
        /// The planes.
        planes: NonZeroUsize,
    },
    /// The destination is not as long as the columns say.
    #[error("the destination has {got_bytes} bytes; {rows} rows of {row_bytes} take {want_bytes}")]
    Dest {
        /// Length of the destination.
        got_bytes: usize,
        /// Length that the columns fill.
        want_bytes: usize,
        /// The rows.
        rows: usize,
        /// Bytes of one row.
        row_bytes: usize,
    },
    /// A source is not as long as its column says.
    #[error(
        "column {column}: the source has {got_bytes} bytes; {rows} rows of {width_bytes} take \
         {want_bytes}"
    )]
    Source {
        /// Index of the column.
        column: usize,
        /// Length of the source.
        got_bytes: usize,
        /// Length that the column takes.
        want_bytes: usize,
        /// The rows.
        rows: usize,
        /// Bytes of one row of the column.
        width_bytes: usize,
    },
    /// A size is too large for memory to have.
    #[error("a tensor of the recipe is too large for this machine's memory")]
    TooLarge,
}

/// Fills the destinations of all recipes, with up to `threads` threads.
///
/// Every recipe is checked before the first byte is written.
pub fn fill(recipes: &mut [RowsRecipe<'_>], threads: NonZeroUsize) -> Result<(), RowsError> {
    for (index, recipe) in recipes.iter().enumerate() {
        check(recipe).map_err(|fault| RowsError {
            recipe: index,
            fault,
        })?;
    }
    let bands = recipes.iter_mut().flat_map(cut).collect();
    queue::drain_apart(bands, threads, Band::fill);
    Ok(())
}

fn check(recipe: &RowsRecipe<'_>) -> Result<(), RowsFault> {
    let (rows, planes) = (recipe.rows, recipe.planes);
    if !rows.is_multiple_of(planes.get()) {
        return Err(RowsFault::Planes { rows, planes });
    }
    let mut widths = recipe.columns.iter().map(|column| column.width_bytes);
    let row_bytes = widths.try_fold(0_usize, usize::checked_add);
    let row_bytes = row_bytes.ok_or(RowsFault::TooLarge)?;
    let want_bytes = rows.checked_mul(row_bytes).ok_or(RowsFault::TooLarge)?;
    if recipe.dest.len() != want_bytes {
        return Err(RowsFault::Dest {
            got_bytes: recipe.dest.len(),
            want_bytes,
            rows,
            row_bytes,
        });
    }
    for (column, part) in recipe.columns.iter().enumerate() {
        // A part of the destination, whose size does not overflow.
        let want_bytes = rows * part.width_bytes;
        if let Some(source) = part.source.filter(|source| source.len() != want_bytes) {
            return Err(RowsFault::Source {
                column,
                got_bytes: source.len(),
                want_bytes,
                rows,
                width_bytes: part.width_bytes,
            });
        }
    }
    Ok(())
}

/// Some rows of one destination.
struct Band<'a> {
    dest: &'a mut [u8],
    /// The first of its rows.
    first: usize,
    row_bytes: usize,
    planes: usize,
    /// Rows of one plane.
    plane_rows: usize,
    columns: &'a [RowsColumn<'a>],
}

/// Cuts a checked recipe into bands.
fn cut<'r>(recipe: &'r mut RowsRecipe<'_>) -> Vec<Band<'r>> {
    if recipe.dest.is_empty() {
        return Vec::new();
    }
    let row_bytes = recipe.dest.len() / recipe.rows;
    let (planes, columns) = (recipe.planes.get(), &*recipe.columns);
    let plane_rows = recipe.rows / planes;
    queue::bands(recipe.dest, row_bytes, 1)
        .map(|(first, dest)| Band {
            dest,
            first,
            row_bytes,
            planes,
            plane_rows,
            columns,
        })
        .collect()
}

impl Band<'_> {
    fn fill(self) {
        for (row, at) in self.dest.chunks_exact_mut(self.row_bytes).zip(self.first..) {
            let from = at % self.planes * self.plane_rows + at / self.planes;
            let mut rest = row;
            for column in self.columns {
                let width = column.width_bytes;
                let (part, after) = rest.split_at_mut(width);
                match column.source {
                    Some(source) => part.copy_from_slice(&source[from * width..][..width]),
                    None => part.fill(0),
                }
                rest = after;
            }
        }
    }
}
