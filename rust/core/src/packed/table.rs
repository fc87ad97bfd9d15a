//! Elements replaced by what stands for them: Rust looks up, whoever made the table did the sums.

use super::fragment::Row;

/// How many values two bytes have.
const ENTRIES: usize = 1 << 16;

/// For every value of two bytes, as this machine orders them, the two bytes that stand for it.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a>(&'a [[u8; 2]; ENTRIES]);

impl<'a> Table<'a> {
    /// Its size.
    pub const LEN_BYTES: usize = 2 * ENTRIES;

    /// A table of just that size.
    pub fn from_bytes(bytes: &'a [u8]) -> Option<Self> {
        let (entries, rest) = bytes.as_chunks();
        let entries = entries.try_into().ok()?;
        rest.is_empty().then_some(Self(entries))
    }

    /// Replaces elements of two bytes.
    pub(super) fn replace(self, bytes: &mut [u8]) {
        for element in bytes.as_chunks_mut().0 {
            *element = self.0[usize::from(u16::from_ne_bytes(*element))];
        }
    }

    /// One row of a fragment, its elements replaced.
    #[inline]
    pub(super) fn row<const U: usize>(self, row: &Row<U>) -> Row<U> {
        let mut replaced = *row;
        self.replace(replaced.as_flattened_mut());
        replaced
    }
}
