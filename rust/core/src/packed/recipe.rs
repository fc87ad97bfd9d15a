//! The content of composed factors, column by column.
//!
//! Columns are generic in what holds their sources: bytes, or what bytes can be borrowed from.

use super::{ElementSize, Table};

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

/// A column of bytes.
pub type Column<'a> = ColumnOf<&'a [u8], Table<'a>>;
/// A packed tensor of bytes.
pub type Packed<'a> = PackedOf<&'a [u8]>;
/// A logical `down` factor of bytes.
pub type DownMember<'a> = DownMemberOf<&'a [u8]>;
/// A logical `up` factor of bytes.
pub type UpMember<'a> = UpMemberOf<&'a [u8], Table<'a>>;

/// Consecutive fragments of every channel tile, of sources `S` and tables `T`.
#[derive(Debug, Clone)]
pub enum ColumnOf<S, T> {
    /// Fragments of a tensor that is packed already.
    Fragments {
        /// One tensor for every slot.
        sources: Vec<PackedOf<S>>,
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
        members: Vec<DownMemberOf<S>>,
    },
    /// Logical `up` factors, each a block of channels by ranks; zero where none lies.
    Up {
        /// Fragments that they fill.
        tiles: usize,
        /// The factors; their blocks must not overlap.
        members: Vec<UpMemberOf<S, T>>,
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
pub struct PackedOf<S> {
    /// (channels/16, `tiles`, 256) elements.
    pub source: S,
    /// Fragments of each channel tile.
    pub tiles: usize,
}

/// A logical `down` factor and its place in a column.
#[derive(Debug, Clone, Copy)]
pub struct DownMemberOf<S> {
    /// (slots, `rank`, channels) elements, row-major.
    pub source: S,
    /// Its ranks.
    pub rank: usize,
    /// Its first rank within the column.
    pub rank_begin: usize,
}

/// A logical `up` factor and its place in a column.
#[derive(Debug, Clone, Copy)]
pub struct UpMemberOf<S, T> {
    /// (slots, `row_count`, `rank`) elements, row-major.
    pub source: S,
    /// Values that stand for its elements; without it, they themselves do.
    pub table: Option<T>,
    /// Its first channel.
    pub row_begin: usize,
    /// Its channels.
    pub row_count: usize,
    /// Its ranks.
    pub rank: usize,
    /// Its first rank within the column.
    pub rank_begin: usize,
}

impl<S, T> ColumnOf<S, T> {
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

    /// All sources, and the tables.
    pub fn holders(&self) -> (Vec<&S>, Vec<&T>) {
        match self {
            Self::Fragments { sources, .. } => {
                (sources.iter().map(|own| &own.source).collect(), Vec::new())
            }
            Self::Down { members, .. } => {
                (members.iter().map(|own| &own.source).collect(), Vec::new())
            }
            Self::Up { members, .. } => (
                members.iter().map(|own| &own.source).collect(),
                members
                    .iter()
                    .filter_map(|own| own.table.as_ref())
                    .collect(),
            ),
            Self::Zero { .. } | Self::Keep { .. } => (Vec::new(), Vec::new()),
        }
    }

    /// The same column of other sources and tables; the first error ends it.
    pub fn try_map<'s, R, U, E>(
        &'s self,
        source_of: impl Fn(&'s S) -> Result<R, E>,
        table_of: impl Fn(&'s T) -> Result<U, E>,
    ) -> Result<ColumnOf<R, U>, E> {
        Ok(match self {
            Self::Fragments {
                sources,
                first,
                count,
            } => {
                let sources = sources.iter().map(|own| own.try_map(&source_of));
                ColumnOf::Fragments {
                    sources: sources.collect::<Result<_, E>>()?,
                    first: *first,
                    count: *count,
                }
            }
            Self::Down { tiles, members } => {
                let members = members.iter().map(|own| own.try_map(&source_of));
                ColumnOf::Down {
                    tiles: *tiles,
                    members: members.collect::<Result<_, E>>()?,
                }
            }
            Self::Up {
                tiles,
                members,
                untouched,
            } => {
                let members = members.iter().map(|own| own.try_map(&source_of, &table_of));
                ColumnOf::Up {
                    tiles: *tiles,
                    members: members.collect::<Result<_, E>>()?,
                    untouched: *untouched,
                }
            }
            Self::Zero { tiles } => ColumnOf::Zero { tiles: *tiles },
            Self::Keep { tiles } => ColumnOf::Keep { tiles: *tiles },
        })
    }
}

impl<S> PackedOf<S> {
    fn try_map<'s, R, E>(
        &'s self,
        source_of: impl Fn(&'s S) -> Result<R, E>,
    ) -> Result<PackedOf<R>, E> {
        Ok(PackedOf {
            source: source_of(&self.source)?,
            tiles: self.tiles,
        })
    }
}

impl<S> DownMemberOf<S> {
    fn try_map<'s, R, E>(
        &'s self,
        source_of: impl Fn(&'s S) -> Result<R, E>,
    ) -> Result<DownMemberOf<R>, E> {
        Ok(DownMemberOf {
            source: source_of(&self.source)?,
            rank: self.rank,
            rank_begin: self.rank_begin,
        })
    }
}

impl<S, T> UpMemberOf<S, T> {
    fn try_map<'s, R, U, E>(
        &'s self,
        source_of: impl Fn(&'s S) -> Result<R, E>,
        table_of: impl Fn(&'s T) -> Result<U, E>,
    ) -> Result<UpMemberOf<R, U>, E> {
        Ok(UpMemberOf {
            source: source_of(&self.source)?,
            table: self.table.as_ref().map(table_of).transpose()?,
            row_begin: self.row_begin,
            row_count: self.row_count,
            rank: self.rank,
            rank_begin: self.rank_begin,
        })
    }
}
