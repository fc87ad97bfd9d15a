//! One thread's share of a factor: some of its channel tiles, filled column by column.

use std::sync::Arc;

use super::fragment::{LINES, Line, Row, clear, lines, lines_mut, rows, weave};
use super::up;
use super::{Column, DownMember, ElementSize, FRAGMENT, Recipe, TILE, Untouched, UpMember};
use crate::work::drain;

/// Channel tiles that are filled together where a column is a `down`: of each source row so many
/// fragments' width is read at once. Other columns read and write in the order of memory, and are
/// filled one channel tile after the other.
const GROUP: usize = 32;

/// Channel tiles of one slot.
#[derive(Debug)]
pub(super) struct Band<'a> {
    dest: &'a mut [u8],
    slot: usize,
    slots: usize,
    /// The first of its channel tiles.
    first: usize,
    /// Channel tiles of the whole factor.
    channel_tiles: usize,
    /// Fragments of each channel tile.
    tiles: usize,
    element: ElementSize,
    columns: Arc<[Column<'a>]>,
}

/// Cuts a checked recipe into bands.
pub(super) fn cut(recipe: Recipe<'_>) -> Vec<Band<'_>> {
    if recipe.dest.is_empty() {
        return Vec::new();
    }
    let (slots, element) = (recipe.slots, recipe.element);
    let columns: Arc<[Column<'_>]> = recipe.columns.into();
    let tiles: usize = columns.iter().map(Column::tiles).sum();
    let channel_tiles = recipe.channels / TILE;
    let tile_bytes = tiles * FRAGMENT * element.bytes();
    let mut bands = Vec::new();
    let factors = recipe.dest.chunks_mut(channel_tiles * tile_bytes);
    for (slot, dest) in factors.enumerate() {
        let own = drain::bands(dest, tile_bytes, GROUP).map(|(first, dest)| Band {
            dest,
            slot,
            slots,
            first,
            channel_tiles,
            tiles,
            element,
            columns: Arc::clone(&columns),
        });
        bands.extend(own);
    }
    bands
}

impl Band<'_> {
    /// Fills it.
    pub(super) fn fill(self) {
        match self.element {
            ElementSize::Two => self.fill_units::<4>(),
            ElementSize::Four => self.fill_units::<8>(),
        }
    }

    fn fill_units<const U: usize>(self) {
        let parts: Vec<Part<'_, U>> = self
            .columns
            .iter()
            .map(|column| Part::of(column, self.slot, self.slots, self.channel_tiles))
            .collect();
        let is_down = |column| matches!(column, &Column::Down { .. });
        let together = if self.columns.iter().any(is_down) {
            GROUP
        } else {
            1
        };
        let stride = self.tiles * LINES;
        let groups = lines_mut::<U>(self.dest).chunks_mut(together * stride);
        for (group, first) in groups.zip((self.first..).step_by(together)) {
            let mut begin = 0;
            for part in &parts {
                let end = begin + part.tiles * LINES;
                part.fill(Strip {
                    group,
                    stride,
                    begin,
                    end,
                    first,
                });
                begin = end;
            }
        }
    }
}

/// One column in some channel tiles: where it goes.
struct Strip<'g, const U: usize> {
    group: &'g mut [Line<U>],
    /// Lines of a whole channel tile.
    stride: usize,
    /// The column's first line within a channel tile, and one past its last.
    begin: usize,
    end: usize,
    /// The first channel tile.
    first: usize,
}

impl<const U: usize> Strip<'_, U> {
    /// The column's lines in each channel tile.
    fn tiles(&mut self) -> impl Iterator<Item = &mut [Line<U>]> {
        let (begin, end) = (self.begin, self.end);
        let tiles = self.group.chunks_exact_mut(self.stride);
        tiles.map(move |tile| &mut tile[begin..end])
    }

    /// The column's lines in each channel tile, with that tile's number.
    fn numbered(&mut self) -> impl Iterator<Item = (usize, &mut [Line<U>])> {
        (self.first..).zip(self.tiles())
    }
}

/// A column, its sources seen in the units of the fragments.
struct Part<'a, const U: usize> {
    tiles: usize,
    content: Content<'a, U>,
}

enum Content<'a, const U: usize> {
    Fragments {
        source: &'a [Line<U>],
        stride: usize,
        first: usize,
    },
    /// The source row of every rank, cut into the rows of fragments.
    Down(Vec<Option<&'a [Row<U>]>>),
    Up(Vec<UpMember<'a>>, Untouched),
    Zero,
    Keep,
}

impl<'a, const U: usize> Part<'a, U> {
    fn of(column: &'a Column<'a>, slot: usize, slots: usize, channel_tiles: usize) -> Self {
        let own = |source: &'a [u8]| {
            let len_bytes = source.len() / slots;
            &source[slot * len_bytes..][..len_bytes]
        };
        let content = match column {
            Column::Fragments { sources, first, .. } => Content::Fragments {
                source: lines(sources[slot].source),
                stride: sources[slot].tiles * LINES,
                first: first * LINES,
            },
            Column::Down { tiles, members } => {
                let members = members.iter().map(|member| DownMember {
                    source: own(member.source),
                    ..*member
                });
                Content::Down(ranks(*tiles, members, channel_tiles))
            }
            Column::Up {
                members, untouched, ..
            } => {
                let members = members.iter().map(|member| UpMember {
                    source: own(member.source),
                    ..*member
                });
                Content::Up(members.collect(), *untouched)
            }
            Column::Zero { .. } => Content::Zero,
            Column::Keep { .. } => Content::Keep,
        };
        Self {
            tiles: column.tiles(),
            content,
        }
    }

    fn fill(&self, mut strip: Strip<'_, U>) {
        match &self.content {
            Content::Fragments {
                source,
                stride,
                first,
            } => {
                for (number, tile) in strip.numbered() {
                    let begin = number * stride + first;
                    tile.copy_from_slice(&source[begin..begin + tile.len()]);
                }
            }
            Content::Down(ranks) => fill_down(ranks, &mut strip),
            Content::Up(members, untouched) => {
                for (number, tile) in strip.numbered() {
                    up::fill(members, *untouched, number, tile);
                }
            }
            Content::Zero => strip.tiles().for_each(clear),
            Content::Keep => {}
        }
    }
}

/// The source row of each rank of a column.
fn ranks<'a, const U: usize>(
    tiles: usize,
    members: impl Iterator<Item = DownMember<'a>>,
    channel_tiles: usize,
) -> Vec<Option<&'a [Row<U>]>> {
    let mut ranks = vec![None; tiles * TILE];
    for member in members {
        let sources = rows(member.source).chunks_exact(channel_tiles);
        for (rank, source) in ranks[member.rank_begin..].iter_mut().zip(sources) {
            *rank = Some(source);
        }
    }
    ranks
}

/// Reads each source row as far as the strip goes, and scatters it over the channel tiles.
fn fill_down<const U: usize>(ranks: &[Option<&[Row<U>]>], strip: &mut Strip<'_, U>) {
    let nothing = [[[0; U]; TILE / 2]; GROUP];
    let count = strip.group.len() / strip.stride;
    let width = strip.first..strip.first + count;
    for (fragment, ranks) in ranks.chunks_exact(TILE).enumerate() {
        let (upper, lower) = ranks.split_at(LINES);
        for (line, (upper, lower)) in (fragment * LINES..).zip(upper.iter().zip(lower)) {
            let upper = upper.map_or(&nothing[..count], |row| &row[width.clone()]);
            let lower = lower.map_or(&nothing[..count], |row| &row[width.clone()]);
            for ((upper, lower), tile) in upper.iter().zip(lower).zip(strip.tiles()) {
                weave(upper, lower, &mut tile[line]);
            }
        }
    }
}
