//! Faults of a recipe, each with the numbers that show it.

use thiserror::Error;

/// A recipe that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("recipe {recipe}: {fault}")]
pub struct PackError {
    /// Its index.
    pub recipe: usize,
    /// The fault.
    pub fault: PackFault,
}

/// Why a recipe cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PackFault {
    /// The channels make no whole channel tiles.
    #[error("channels must be a multiple of 16, got {channels}")]
    Channels {
        /// The channels.
        channels: usize,
    },
    /// The destination is not as long as the columns say.
    #[error(
        "the destination has {got_bytes} bytes; {slots} slots of {channels} channels by {tiles} \
         fragments of {element_bytes}-byte elements take {want_bytes}"
    )]
    Dest {
        /// Length of the destination.
        got_bytes: usize,
        /// Length that the columns fill.
        want_bytes: usize,
        /// How many slots.
        slots: usize,
        /// Channels of the factor.
        channels: usize,
        /// Fragments of one channel tile.
        tiles: usize,
        /// Size of an element.
        element_bytes: usize,
    },
    /// The source is no whole factor, or has another size than its destination.
    #[error(
        "{got_bytes} bytes are unpacked into {dest_bytes}; {channels} channels of \
         {element_bytes}-byte elements take a multiple of {}, and as much",
        channels * 16 * element_bytes
    )]
    Unpacked {
        /// Length of the source.
        got_bytes: usize,
        /// Length of the destination.
        dest_bytes: usize,
        /// Channels of the factor.
        channels: usize,
        /// Size of an element.
        element_bytes: usize,
    },
    /// A source is not as long as its shape says.
    #[error(
        "column {column}{}: the source has {got_bytes} bytes; {slots} x {rows} x {columns} elements \
         of {element_bytes} bytes take {want_bytes}",
        OfMember(*.member)
    )]
    Source {
        /// Index of the column.
        column: usize,
        /// Index of the member, where the column has members.
        member: Option<usize>,
        /// Length of the source.
        got_bytes: usize,
        /// Length that its shape takes.
        want_bytes: usize,
        /// How many slots it holds.
        slots: usize,
        /// Rows of its shape.
        rows: usize,
        /// Columns of its shape.
        columns: usize,
        /// Size of an element.
        element_bytes: usize,
    },
    /// There is not one source for every slot.
    #[error("column {column}: {sources} sources for {slots} slots")]
    Slots {
        /// Index of the column.
        column: usize,
        /// How many sources.
        sources: usize,
        /// How many slots.
        slots: usize,
    },
    /// Elements that no table has an entry for.
    #[error("column {column}, member {member}: a table of elements of {element_bytes} bytes")]
    Table {
        /// Index of the column.
        column: usize,
        /// Index of the member.
        member: usize,
        /// Size of an element.
        element_bytes: usize,
    },
    /// Fragments are asked for that the source does not have.
    #[error(
        "column {column}: fragments {first} to {} of a source that has {source_tiles} in each \
         channel tile",
        .first.saturating_add(*.count)
    )]
    Fragments {
        /// Index of the column.
        column: usize,
        /// The first fragment.
        first: usize,
        /// How many.
        count: usize,
        /// How many there are.
        source_tiles: usize,
    },
    /// A member ends after its column does.
    #[error(
        "column {column}, member {member}: ranks {rank_begin} to {} of a column of {} ranks",
        .rank_begin.saturating_add(*.rank), .tiles.saturating_mul(super::TILE)
    )]
    Ranks {
        /// Index of the column.
        column: usize,
        /// Index of the member.
        member: usize,
        /// Its first rank.
        rank_begin: usize,
        /// Its ranks.
        rank: usize,
        /// Fragments of the column.
        tiles: usize,
    },
    /// A member ends after the channels do.
    #[error(
        "column {column}, member {member}: rows {row_begin} to {} of {channels} channels",
        .row_begin.saturating_add(*.row_count)
    )]
    Rows {
        /// Index of the column.
        column: usize,
        /// Index of the member.
        member: usize,
        /// Its first row.
        row_begin: usize,
        /// Its rows.
        row_count: usize,
        /// Channels of the factor.
        channels: usize,
    },
    /// Two members lie on the same elements.
    #[error("column {column}: members {earlier} and {later} overlap")]
    Overlap {
        /// Index of the column.
        column: usize,
        /// Index of the one.
        earlier: usize,
        /// Index of the other.
        later: usize,
    },
    /// A size is too large for memory to have.
    #[error("{what} of the recipe is too large for this machine's memory")]
    TooLarge {
        /// Which size.
        what: &'static str,
    },
}

/// `, member 3`, or nothing.
struct OfMember(Option<usize>);

impl std::fmt::Display for OfMember {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(member) => write!(f, ", member {member}"),
            None => Ok(()),
        }
    }
}
