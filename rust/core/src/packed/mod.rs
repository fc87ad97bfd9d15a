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
mod recipe;
mod table;
mod unpack;
mod up;

use std::num::NonZeroUsize;

pub use error::{PackError, PackFault};
pub use fillers::{FillPanic, Fillers, Filling};
pub use recipe::{
    Column, ColumnOf, DownMember, DownMemberOf, Packed, PackedOf, Recipe, Untouched, UpMember,
    UpMemberOf,
};
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
