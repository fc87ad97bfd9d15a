//! Everything that a recipe promises, checked before a byte moves.

use std::ops::Range;

use super::{Column, DownMember, ElementSize, FRAGMENT, PackFault, Packed, Recipe, TILE, UpMember};

/// Checks one recipe: after this no offset within it can overflow or lie outside its memory.
pub(super) fn check(recipe: &Recipe<'_>) -> Result<(), PackFault> {
    let (channels, element_bytes) = (recipe.channels, recipe.element.bytes());
    if !channels.is_multiple_of(TILE) {
        return Err(PackFault::Channels { channels });
    }
    let tiles = recipe
        .columns
        .iter()
        .try_fold(0_usize, |sum, column| sum.checked_add(column.tiles()));
    let tiles = tiles.ok_or(PackFault::TooLarge { what: "the rank" })?;
    let slot_bytes = size_bytes(channels / TILE, tiles, FRAGMENT * element_bytes)?;
    let want_bytes = size_bytes(recipe.slots, slot_bytes, 1)?;
    if recipe.dest.len() != want_bytes {
        return Err(PackFault::Dest {
            got_bytes: recipe.dest.len(),
            want_bytes,
            slots: recipe.slots,
            channels,
            tiles,
            element_bytes,
        });
    }
    for (index, column) in recipe.columns.iter().enumerate() {
        Checked {
            slots: recipe.slots,
            channels,
            element: recipe.element,
            column: index,
        }
        .column(column)?;
    }
    Ok(())
}

pub(super) fn size_bytes(
    rows: usize,
    columns: usize,
    each_bytes: usize,
) -> Result<usize, PackFault> {
    rows.checked_mul(columns)
        .and_then(|count| count.checked_mul(each_bytes))
        .ok_or(PackFault::TooLarge { what: "a tensor" })
}

/// A column being checked, by its index.
struct Checked {
    slots: usize,
    channels: usize,
    element: ElementSize,
    column: usize,
}

impl Checked {
    fn column(&self, column: &Column<'_>) -> Result<(), PackFault> {
        match column {
            Column::Fragments {
                sources,
                first,
                count,
            } => self.fragments(sources, *first, *count),
            Column::Down { tiles, members } => self.down(*tiles, members),
            Column::Up { tiles, members, .. } => self.up(*tiles, members),
            Column::Zero { .. } | Column::Keep { .. } => Ok(()),
        }
    }

    fn fragments(
        &self,
        sources: &[Packed<'_>],
        first: usize,
        count: usize,
    ) -> Result<(), PackFault> {
        if sources.len() != self.slots {
            return Err(PackFault::Slots {
                column: self.column,
                sources: sources.len(),
                slots: self.slots,
            });
        }
        for packed in sources {
            let source_tiles = packed.tiles;
            if first
                .checked_add(count)
                .is_none_or(|end| end > source_tiles)
            {
                return Err(PackFault::Fragments {
                    column: self.column,
                    first,
                    count,
                    source_tiles,
                });
            }
            let ranks = source_tiles.checked_mul(TILE);
            let ranks = ranks.ok_or(PackFault::TooLarge { what: "the rank" })?;
            self.source(packed.source, None, [1, self.channels, ranks])?;
        }
        Ok(())
    }

    fn down(&self, tiles: usize, members: &[DownMember<'_>]) -> Result<(), PackFault> {
        let mut taken = Vec::with_capacity(members.len());
        for (index, member) in members.iter().enumerate() {
            let shape = [self.slots, member.rank, self.channels];
            self.source(member.source, Some(index), shape)?;
            let ranks = self.ranks(index, member.rank_begin, member.rank, tiles)?;
            taken.push((ranks, 0..self.channels));
        }
        self.no_overlap(&taken)
    }

    fn up(&self, tiles: usize, members: &[UpMember<'_>]) -> Result<(), PackFault> {
        let mut taken = Vec::with_capacity(members.len());
        for (index, member) in members.iter().enumerate() {
            let shape = [self.slots, member.row_count, member.rank];
            self.source(member.source, Some(index), shape)?;
            let ranks = self.ranks(index, member.rank_begin, member.rank, tiles)?;
            if member.table.is_some() && self.element != ElementSize::Two {
                return Err(PackFault::Table {
                    column: self.column,
                    member: index,
                    element_bytes: self.element.bytes(),
                });
            }
            let (row_begin, row_count) = (member.row_begin, member.row_count);
            let row_end = row_begin.checked_add(row_count);
            let Some(row_end) = row_end.filter(|&end| end <= self.channels) else {
                return Err(PackFault::Rows {
                    column: self.column,
                    member: index,
                    row_begin,
                    row_count,
                    channels: self.channels,
                });
            };
            taken.push((ranks, row_begin..row_end));
        }
        self.no_overlap(&taken)
    }

    fn source(
        &self,
        source: &[u8],
        member: Option<usize>,
        shape: [usize; 3],
    ) -> Result<(), PackFault> {
        let [slots, rows, columns] = shape;
        let element_bytes = self.element.bytes();
        let slot_bytes = size_bytes(rows, columns, element_bytes)?;
        let want_bytes = size_bytes(slots, slot_bytes, 1)?;
        if source.len() == want_bytes {
            return Ok(());
        }
        Err(PackFault::Source {
            column: self.column,
            member,
            got_bytes: source.len(),
            want_bytes,
            slots,
            rows,
            columns,
            element_bytes,
        })
    }

    fn ranks(
        &self,
        member: usize,
        rank_begin: usize,
        rank: usize,
        tiles: usize,
    ) -> Result<Range<usize>, PackFault> {
        // The whole destination has been measured: this many ranks do not overflow.
        let end = rank_begin.checked_add(rank);
        match end.filter(|&end| end <= tiles.saturating_mul(TILE)) {
            Some(end) => Ok(rank_begin..end),
            None => Err(PackFault::Ranks {
                column: self.column,
                member,
                rank_begin,
                rank,
                tiles,
            }),
        }
    }

    /// Checks that no two blocks (ranks, rows) share an element; a column has few members.
    fn no_overlap(&self, blocks: &[(Range<usize>, Range<usize>)]) -> Result<(), PackFault> {
        for (later, (ranks, rows)) in blocks.iter().enumerate() {
            let earlier = blocks[..later]
                .iter()
                .position(|(other_ranks, other_rows)| {
                    overlap(ranks, other_ranks) && overlap(rows, other_rows)
                });
            if let Some(earlier) = earlier {
                return Err(PackFault::Overlap {
                    column: self.column,
                    earlier,
                    later,
                });
            }
        }
        Ok(())
    }
}

/// Whether two ranges share an entry.
pub(super) fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}
