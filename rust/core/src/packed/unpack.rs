//! Packed factors back in logical order.

use std::num::NonZeroUsize;

use super::check::size_bytes;
use super::fragment::{LINES, Row, lines, rows_mut, unweave};
use super::{ElementSize, FRAGMENT, PackFault, TILE};
use crate::work::drain;

/// Which factor of a pair it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// (rank, channels): fragments of 16 ranks follow each other along the channels.
    Down,
    /// (channels, rank): fragments of 16 channels follow each other along the ranks.
    Up,
}

/// A packed factor, and where its logical elements go.
#[derive(Debug)]
pub struct Unpacking<'a> {
    /// (channels/16, rank/16, 256) elements.
    pub source: &'a [u8],
    /// As many elements, row-major, of the shape that its side has.
    pub dest: &'a mut [u8],
    /// Which factor it is.
    pub side: Side,
    /// Its channels, a multiple of 16.
    pub channels: usize,
    /// Size of the elements.
    pub element: ElementSize,
}

/// Unpacks a factor, with up to `threads` threads.
pub fn unpack(unpacking: &mut Unpacking<'_>, threads: NonZeroUsize) -> Result<(), PackFault> {
    let tiles = check(unpacking)?;
    match unpacking.element {
        ElementSize::Two => unpack_units::<4>(unpacking, tiles, threads),
        ElementSize::Four => unpack_units::<8>(unpacking, tiles, threads),
    }
    Ok(())
}

/// Checks the sizes; returns how many fragments each channel tile has.
fn check(unpacking: &Unpacking<'_>) -> Result<usize, PackFault> {
    let (channels, element_bytes) = (unpacking.channels, unpacking.element.bytes());
    if !channels.is_multiple_of(TILE) {
        return Err(PackFault::Channels { channels });
    }
    let (got_bytes, dest_bytes) = (unpacking.source.len(), unpacking.dest.len());
    let column_bytes = size_bytes(channels / TILE, FRAGMENT, element_bytes)?;
    let tiles = got_bytes.checked_div(column_bytes).unwrap_or_default();
    if got_bytes != tiles * column_bytes || got_bytes != dest_bytes {
        return Err(PackFault::Unpacked {
            got_bytes,
            dest_bytes,
            channels,
            element_bytes,
        });
    }
    Ok(tiles)
}

fn unpack_units<const U: usize>(
    unpacking: &mut Unpacking<'_>,
    tiles: usize,
    threads: NonZeroUsize,
) {
    let channel_tiles = unpacking.channels / TILE;
    let source = lines::<U>(unpacking.source);
    // Fragments in a row of them, and where each lies in packed memory.
    let across = match unpacking.side {
        Side::Down => channel_tiles,
        Side::Up => tiles,
    };
    let place = |row, column| match unpacking.side {
        Side::Down => column * tiles + row,
        Side::Up => row * tiles + column,
    };
    let row_bytes = across * FRAGMENT * unpacking.element.bytes();
    let bands = drain::bands(unpacking.dest, row_bytes, 1).collect();
    drain::drain_apart(bands, threads, |(first, band)| {
        let rows = rows_mut::<U>(band).chunks_exact_mut(across * TILE);
        for (row, dest) in (first..).zip(rows) {
            for column in 0..across {
                let fragment = &source[place(row, column) * LINES..][..LINES];
                for (at, line) in fragment.iter().enumerate() {
                    let [upper, lower]: [Row<U>; 2] = unweave(line);
                    dest[at * across + column] = upper;
                    dest[(at + LINES) * across + column] = lower;
                }
            }
        }
    });
}
