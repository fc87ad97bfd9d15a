//! Everything that a recipe promises, checked before a byte moves.

use std::ops::Range;

use super::{Column, DownMember, FRAGMENT, PackFault, Recipe, TILE, UpMember};

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
    let want_bytes = size_bytes(channels / TILE, tiles, FRAGMENT * element_bytes)?;
    if recipe.dest.len() != want_bytes {
        return Err(PackFault::Dest {
            got_bytes: recipe.dest.len(),
            want_bytes,
            channels,
            tiles,
            element_bytes,
        });
    }
    for (index, column) in recipe.columns.iter().enumerate() {
        Checked {
            channels,
            element_bytes,
            column: index,
        }
        .column(column)?;
    }
    Ok(())
}

fn size_bytes(rows: usize, columns: usize, each_bytes: usize) -> Result<usize, PackFault> {
    rows.checked_mul(columns)
        .and_then(|count| count.checked_mul(each_bytes))
        .ok_or(PackFault::TooLarge { what: "a tensor" })
}

/// A column being checked, by its index.
struct Checked {
    channels: usize,
    element_bytes: usize,
    column: usize,
}

impl Checked {
    fn column(&self, column: &Column<'_>) -> Result<(), PackFault> {
        match column {
            Column::Fragments {
                source,
                source_tiles,
                first,
                count,
            } => self.fragments(source, *source_tiles, *first, *count),
            Column::Down { tiles, members } => self.down(*tiles, members),
            Column::Up { tiles, members } => self.up(*tiles, members),
            Column::Zero { .. } | Column::Keep { .. } => Ok(()),
        }
    }

    fn fragments(
        &self,
        source: &[u8],
        source_tiles: usize,
        first: usize,
        count: usize,
    ) -> Result<(), PackFault> {
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
        self.source(source, None, self.channels, ranks)
    }

    fn down(&self, tiles: usize, members: &[DownMember<'_>]) -> Result<(), PackFault> {
        let mut taken = Vec::with_capacity(members.len());
        for (index, member) in members.iter().enumerate() {
            self.source(member.source, Some(index), member.rank, self.channels)?;
            let ranks = self.ranks(index, member.rank_begin, member.rank, tiles)?;
            taken.push((ranks, 0..self.channels));
        }
        self.no_overlap(&taken)
    }

    fn up(&self, tiles: usize, members: &[UpMember<'_>]) -> Result<(), PackFault> {
        let mut taken = Vec::with_capacity(members.len());
        for (index, member) in members.iter().enumerate() {
            self.source(member.source, Some(index), member.row_count, member.rank)?;
            let ranks = self.ranks(index, member.rank_begin, member.rank, tiles)?;
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
        rows: usize,
        columns: usize,
    ) -> Result<(), PackFault> {
        let want_bytes = size_bytes(rows, columns, self.element_bytes)?;
        if source.len() == want_bytes {
            return Ok(());
        }
        Err(PackFault::Source {
            column: self.column,
            member,
            got_bytes: source.len(),
            want_bytes,
            rows,
            columns,
            element_bytes: self.element_bytes,
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
