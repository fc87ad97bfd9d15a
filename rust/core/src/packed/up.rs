//! `up` factors in one channel tile: rows are channels, and blocks may begin anywhere.

use std::ops::Range;

use super::check::overlap;
use super::fragment::{LINES, Line, Row, Unit, clear, weave};
use super::{TILE, Table, Untouched, UpMember};

/// Fills the fragments of one channel tile.
pub(super) fn fill<const U: usize>(
    members: &[UpMember<'_>],
    untouched: Untouched,
    channel_tile: usize,
    lines: &mut [Line<U>],
) {
    let channels = channel_tile * TILE..(channel_tile + 1) * TILE;
    let tiles = lines.len() / LINES;
    let mut tile = 0;
    while tile < tiles {
        let ranks = tile * TILE..(tile + 1) * TILE;
        let mut touching = members.iter().filter(|member| {
            overlap(&member.channels(), &channels) && overlap(&member.ranks(), &ranks)
        });
        // Blocks do not overlap: what holds a whole fragment is alone in it.
        let end = match touching.next() {
            None => {
                if untouched == Untouched::Zero {
                    clear(&mut lines[tile * LINES..][..LINES]);
                }
                tile + 1
            }
            Some(member) if member.holds(&channels, &ranks) => {
                let end = (member.ranks().end / TILE).min(tiles);
                let rows = SourceRows::of(member, channels.start, ranks.start);
                rows.pack(&mut lines[tile * LINES..end * LINES]);
                end
            }
            Some(_) => {
                let block = assemble(members, &channels, &ranks);
                let (upper, lower) = block.split_at(LINES);
                let rows = upper.iter().zip(lower);
                for (line, (upper, lower)) in lines[tile * LINES..][..LINES].iter_mut().zip(rows) {
                    weave(upper, lower, line);
                }
                tile + 1
            }
        };
        tile = end;
    }
}

impl UpMember<'_> {
    fn channels(&self) -> Range<usize> {
        self.row_begin..self.row_begin + self.row_count
    }

    fn ranks(&self) -> Range<usize> {
        self.rank_begin..self.rank_begin + self.rank
    }

    /// Whether it holds a whole fragment, and its units lie as the fragment's do.
    fn holds(&self, channels: &Range<usize>, ranks: &Range<usize>) -> bool {
        let (own_channels, own_ranks) = (self.channels(), self.ranks());
        own_channels.start <= channels.start
            && channels.end <= own_channels.end
            && own_ranks.start <= ranks.start
            && ranks.end <= own_ranks.end
            && self.rank.is_multiple_of(2)
            && self.rank_begin.is_multiple_of(2)
    }
}

/// Sixteen rows of a source that fill whole fragments.
struct SourceRows<'a, const U: usize> {
    units: &'a [Unit<U>],
    /// Units from one row to the next.
    stride: usize,
    /// The first unit of the first row.
    begin: usize,
    table: Option<Table<'a>>,
}

impl<'a, const U: usize> SourceRows<'a, U> {
    fn of(member: &UpMember<'a>, channel: usize, rank: usize) -> Self {
        let stride = member.rank / 2;
        Self {
            units: member.source.as_chunks().0,
            stride,
            begin: (channel - member.row_begin) * stride + (rank - member.rank_begin) / 2,
            table: member.table,
        }
    }

    fn row(&self, row: usize, fragments: usize) -> &'a [Row<U>] {
        let begin = self.begin + row * self.stride;
        self.units[begin..begin + fragments * TILE / 2]
            .as_chunks()
            .0
    }

    /// Packs consecutive fragments.
    fn pack(&self, lines: &mut [Line<U>]) {
        match self.table {
            None => self.pack_rows(lines, |row| *row),
            Some(table) => self.pack_rows(lines, |row| table.row(row)),
        }
    }

    #[inline]
    fn pack_rows(&self, lines: &mut [Line<U>], form: impl Fn(&Row<U>) -> Row<U>) {
        let fragments = lines.len() / LINES;
        for line in 0..LINES {
            let (upper, lower) = (self.row(line, fragments), self.row(line + LINES, fragments));
            let fragments = lines.chunks_exact_mut(LINES);
            for ((upper, lower), fragment) in upper.iter().zip(lower).zip(fragments) {
                weave(&form(upper), &form(lower), &mut fragment[line]);
            }
        }
    }
}

/// The logical rows of one fragment, from whatever blocks touch it.
fn assemble<const U: usize>(
    members: &[UpMember<'_>],
    channels: &Range<usize>,
    ranks: &Range<usize>,
) -> [Row<U>; TILE] {
    let element = U / 2;
    let mut block = [[[0; U]; TILE / 2]; TILE];
    for member in members {
        let (own_channels, own_ranks) = (member.channels(), member.ranks());
        let begin = own_ranks.start.max(ranks.start);
        let end = own_ranks.end.min(ranks.end);
        if begin >= end {
            continue;
        }
        let channels_begin = own_channels.start.max(channels.start);
        for channel in channels_begin..own_channels.end.min(channels.end) {
            let row = block[channel - channels.start].as_flattened_mut();
            let at = (channel - own_channels.start) * member.rank + begin - own_ranks.start;
            let row = &mut row[(begin - ranks.start) * element..(end - ranks.start) * element];
            row.copy_from_slice(&member.source[at * element..(at + end - begin) * element]);
            if let Some(table) = member.table {
                table.replace(row);
            }
        }
    }
    block
}
