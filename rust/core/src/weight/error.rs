//! Faults of weights that cannot be read, each with the numbers that show it.

use thiserror::Error;

/// Why rows cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WeightFault {
    /// A size is no multiple of what the layout takes.
    #[error("{what} must be a multiple of {multiple}, got {size}")]
    Multiple {
        /// Which size.
        what: &'static str,
        /// Its value.
        size: usize,
        /// What it should be a multiple of.
        multiple: usize,
    },
    /// Memory is not as long as its shape says.
    #[error("{what} has {got_bytes} bytes{}", Wanted(*.want_bytes))]
    Length {
        /// Which memory.
        what: &'static str,
        /// Its length.
        got_bytes: usize,
        /// Length that its shape takes; none where no memory has as much.
        want_bytes: Option<usize>,
    },
    /// Rows are asked for that the weight does not have.
    #[error("rows {begin} to {} of a weight of {rows}", .begin.saturating_add(*.count))]
    Rows {
        /// The first row.
        begin: usize,
        /// How many.
        count: usize,
        /// How many there are.
        rows: usize,
    },
}

/// `, of 12 that it takes`.
struct Wanted(Option<usize>);

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, ", its shape takes {bytes}"),
            None => write!(f, ", its shape takes more than memory has"),
        }
    }
}
