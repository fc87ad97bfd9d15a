//! Composed factors in the packed low-rank layout: bytes moved to their places, none computed.
//!
//! `docs/layout.md` draws the layout. Memory of a factor is (channels/16, tiles, 256) elements:
//! each channel tile is a row of 16 x 16 fragments, one for every 16 ranks. A [`Recipe`] says
//! what those rows are made of, from the first fragment to the last.

mod band;
mod check;
mod error;
mod fillers;
pub mod findings;
mod fragment;
pub mod magnitude;
mod table;
mod unpack;
mod up;

use std::num::NonZeroUsize;

pub use error::{PackError, PackFault};
pub use fillers::{FillPanic, Fillers, Filling};
pub use table::Table;
pub use unpack::{Side, Unpacking, unpack};

use crate::work::drain;

/// Channels, and ranks, of one fragment.
pub const TILE: usize = 16;
/// Elements of one fragment.
pub const FRAGMENT: usize = TILE * TILE;

/// Size of one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementSize {
    /// 2 bytes: bfloat16, float16.
    Two,
    /// 4 bytes: float32.
    Four,
}

impl ElementSize {
    /// The size in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// The size of so many bytes, if there is one.
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            2 => Some(Self::Two),
            4 => Some(Self::Four),
            _ => None,
        }
    }
}

/// The same factor of some slots: where it goes and what it is made of.
#[derive(Debug)]
pub struct Recipe<'a> {
    /// The factors' memory, (slots, channels/16, tiles of all columns, 256) elements.
    pub dest: &'a mut [u8],
    /// How many slots.
    pub slots: usize,
    /// Channels of each factor, a multiple of 16.
    pub channels: usize,
    /// Size of the elements of `dest` and of every source.
    pub element: ElementSize,
    /// The content of each channel tile, along the rank.
    pub columns: Vec<Column<'a>>,
}

/// Consecutive fragments of every channel tile.
#[derive(Debug, Clone)]
pub enum Column<'a> {
    /// Fragments of a tensor that is packed already.
    Fragments {
        /// One tensor for every slot.
        sources: Vec<Packed<'a>>,
        /// The first fragment of each channel tile that is copied.
        first: usize,
        /// How many are copied.
        count: usize,
    },
    /// Logical `down` factors, stacked along the rank; zero where none lies.
    Down {
        /// Fragments that they fill.
        tiles: usize,
        /// The factors; their ranks must not overlap.
        members: Vec<DownMember<'a>>,
    },
    /// Logical `up` factors, each a block of channels by ranks; zero where none lies.
    Up {
        /// Fragments that they fill.
        tiles: usize,
        /// The factors; their blocks must not overlap.
        members: Vec<UpMember<'a>>,
        /// The fate of fragments that none of them touches.
        untouched: Untouched,
    },
    /// Zeros.
    Zero {
        /// How many fragments.
        tiles: usize,
    },
    /// The content that the destination has there already.
    Keep {
        /// How many fragments.
        tiles: usize,
    },
}

impl Column<'_> {
    /// Fragments that it fills in each channel tile.
    pub fn tiles(&self) -> usize {
        match *self {
            Self::Fragments { count, .. } => count,
            Self::Down { tiles, .. }
            | Self::Up { tiles, .. }
            | Self::Zero { tiles }
            | Self::Keep { tiles } => tiles,
        }
    }
}

/// The fate of fragments that no factor touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Untouched {
    /// They are zeroed.
    Zero,
    /// They stay: the same factors lay there before, and nothing else.
    Keep,
}

/// A tensor that is packed already.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// (channels/16, `tiles`, 256) elements.
    pub source: &'a [u8],
    /// Fragments of each channel tile.
    pub tiles: usize,
}

/// A logical `down` factor and its place in a column.
#[derive(Debug, Clone, Copy)]
pub struct DownMember<'a> {
    /// (slots, `rank`, channels) elements, row-major.
    pub source: &'a [u8],
    /// Its ranks.
    pub rank: usize,
    /// Its first rank within the column.
    pub rank_begin: usize,
}

/// A logical `up` factor and its place in a column.
#[derive(Debug, Clone, Copy)]
pub struct UpMember<'a> {
    /// (slots, `row_count`, `rank`) elements, row-major.
    pub source: &'a [u8],
    /// Values that stand for its elements; without it, they themselves do.
    pub table: Option<Table<'a>>,
    /// Its first channel.
    pub row_begin: usize,
    /// Its channels.
    pub row_count: usize,
    /// Its ranks.
    pub rank: usize,
    /// Its first rank within the column.
    pub rank_begin: usize,
}

/// Fills the destinations of all recipes, with up to `threads` threads.
///
/// Every recipe is checked before the first byte is written.
pub fn fill(recipes: Vec<Recipe<'_>>, threads: NonZeroUsize) -> Result<(), PackError> {
    check_all(&recipes)?;
    let bands = recipes.into_iter().flat_map(band::cut).collect();
    drain::drain_apart(bands, threads, band::Band::fill);
    Ok(())
}

fn check_all(recipes: &[Recipe<'_>]) -> Result<(), PackError> {
    recipes.iter().enumerate().try_for_each(|(index, recipe)| {
        check::check(recipe).map_err(|fault| PackError {
            recipe: index,
            fault,
        })
    })
}
