//! Packed factors against the element formula, and every fault of a recipe.

use std::num::NonZeroUsize;

use insta::assert_snapshot;
use proptest::prelude::*;
use proptest::sample::select;
use qwenlora_core::packed::{
    Column, DownMember, ElementSize, FRAGMENT, PackError, Recipe, TILE, UpMember, fill,
};

/// Where the formula of `docs/layout.md` puts an element, in elements.
fn position(rank: usize, channel: usize, tiles: usize, is_up: bool) -> usize {
    let (n, k) = if is_up {
        (channel % 16, rank % 16)
    } else {
        (rank % 16, channel % 16)
    };
    let fragment = channel / 16 * tiles + rank / 16;
    let within = n % 8 * 32 + k % 8 / 2 * 8 + n / 8 * 4 + k / 8 * 2 + k % 2;
    fragment * FRAGMENT + within
}

/// Bytes without period, so that a misplaced element shows.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    let mut state = u32::try_from(seed % (1 << 24)).expect("small");
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A column that owns its sources.
#[derive(Debug, Clone)]
enum Owned {
    Fragments {
        source: Vec<u8>,
        source_tiles: usize,
        first: usize,
        count: usize,
    },
    /// (source, rank, `rank_begin`).
    Down(usize, Vec<(Vec<u8>, usize, usize)>),
    /// (source, `row_begin`, `row_count`, rank, `rank_begin`).
    Up(usize, Vec<(Vec<u8>, [usize; 4])>),
    Zero(usize),
}

impl Owned {
    fn borrow(&self) -> Column<'_> {
        match self {
            Self::Fragments {
                source,
                source_tiles,
                first,
                count,
            } => Column::Fragments {
                source,
                source_tiles: *source_tiles,
                first: *first,
                count: *count,
            },
            Self::Down(tiles, members) => Column::Down {
                tiles: *tiles,
                members: members
                    .iter()
                    .map(|(source, rank, rank_begin)| DownMember {
                        source,
                        rank: *rank,
                        rank_begin: *rank_begin,
                    })
                    .collect(),
            },
            Self::Up(tiles, members) => Column::Up {
                tiles: *tiles,
                members: members
                    .iter()
                    .map(
                        |(source, [row_begin, row_count, rank, rank_begin])| UpMember {
                            source,
                            row_begin: *row_begin,
                            row_count: *row_count,
                            rank: *rank,
                            rank_begin: *rank_begin,
                        },
                    )
                    .collect(),
            },
            Self::Zero(tiles) => Column::Zero { tiles: *tiles },
        }
    }
}

/// One factor by the formula, element by element.
struct Slow {
    dest: Vec<u8>,
    tiles: usize,
    bytes: usize,
}

impl Slow {
    fn put(&mut self, at: usize, source: &[u8], from: usize) {
        let bytes = self.bytes;
        self.dest[at * bytes..][..bytes].copy_from_slice(&source[from * bytes..][..bytes]);
    }

    fn column(&mut self, column: &Owned, channels: usize, begin: usize) -> usize {
        let first_rank = begin * TILE;
        match column {
            Owned::Fragments {
                source,
                source_tiles,
                first,
                count,
            } => {
                for tile in 0..channels / TILE {
                    for element in 0..count * FRAGMENT {
                        let at = (tile * self.tiles + begin) * FRAGMENT + element;
                        let from = (tile * source_tiles + first) * FRAGMENT + element;
                        self.put(at, source, from);
                    }
                }
                *count
            }
            Owned::Down(tiles, members) => {
                for (source, rank, rank_begin) in members {
                    for r in 0..*rank {
                        for c in 0..channels {
                            let at = position(first_rank + rank_begin + r, c, self.tiles, false);
                            self.put(at, source, r * channels + c);
                        }
                    }
                }
                *tiles
            }
            Owned::Up(tiles, members) => {
                for (source, [row_begin, row_count, rank, rank_begin]) in members {
                    for c in 0..*row_count {
                        for r in 0..*rank {
                            let rank_at = first_rank + rank_begin + r;
                            let at = position(rank_at, row_begin + c, self.tiles, true);
                            self.put(at, source, c * rank + r);
                        }
                    }
                }
                *tiles
            }
            Owned::Zero(tiles) => *tiles,
        }
    }
}

fn slow(columns: &[Owned], channels: usize, bytes: usize) -> Vec<u8> {
    let tiles: usize = columns.iter().map(|column| column.borrow().tiles()).sum();
    let mut slow = Slow {
        dest: vec![0; channels * bytes * tiles.saturating_mul(TILE)],
        tiles,
        bytes,
    };
    let mut begin = 0;
    for column in columns {
        begin += slow.column(column, channels, begin);
    }
    slow.dest
}

fn filled(
    columns: &[Owned],
    channels: usize,
    element: ElementSize,
    threads: usize,
) -> Result<Vec<u8>, PackError> {
    // Whatever was there before must not shine through.
    let len = slow(columns, channels, element.bytes()).len();
    let mut dest = vec![0xa5; len];
    let mut recipes = [Recipe {
        dest: &mut dest,
        channels,
        element,
        columns: columns.iter().map(Owned::borrow).collect(),
    }];
    fill(&mut recipes, NonZeroUsize::new(threads).expect("some"))?;
    Ok(dest)
}

fn assert_filled(columns: &[Owned], channels: usize, element: ElementSize) {
    let expected = slow(columns, channels, element.bytes());
    for threads in [1, 3] {
        let got = filled(columns, channels, element, threads).expect("a right recipe");
        assert!(got == expected, "{channels} channels, {threads} threads");
    }
}

const ELEMENTS: [ElementSize; 2] = [ElementSize::Two, ElementSize::Four];

#[test]
fn a_composed_slot_of_several_bands() {
    for element in ELEMENTS {
        let (channels, bytes) = (3072, element.bytes());
        let base = Owned::Fragments {
            source: pattern(channels * 128 * bytes, 1),
            source_tiles: 8,
            first: 0,
            count: 8,
        };
        let downs = [(64, 0, 2), (20, 64, 3), (64, 84, 4)]
            .map(|(rank, begin, seed)| (pattern(rank * channels * bytes, seed), rank, begin));
        let down = [
            base.clone(),
            Owned::Down(10, downs.to_vec()),
            Owned::Zero(2),
        ];
        assert_filled(&down, channels, element);
        let ups = [
            ([0, 1024, 64, 0], 5),
            ([1024, 1024, 20, 64], 6),
            ([2048, 1024, 64, 84], 7),
        ]
        .map(|(place, seed)| (pattern(place[1] * place[2] * bytes, seed), place));
        let up = [base, Owned::Up(10, ups.to_vec()), Owned::Zero(2)];
        assert_filled(&up, channels, element);
    }
}

#[test]
fn projections_that_share_a_down_share_its_ranks() {
    let ups = [0, 32, 64].map(|row| (pattern(32 * 16 * 2, 9 + row), [row, 32, 16, 0]));
    assert_filled(&[Owned::Up(1, ups.to_vec())], 96, ElementSize::Two);
}

#[test]
fn nothing_to_fill() {
    assert_filled(&[], 32, ElementSize::Two);
    assert_filled(
        &[Owned::Zero(0), Owned::Down(0, vec![])],
        32,
        ElementSize::Two,
    );
    assert_filled(
        &[Owned::Up(2, vec![]), Owned::Down(1, vec![])],
        32,
        ElementSize::Four,
    );
    assert_filled(&[Owned::Down(1, vec![(vec![], 3, 2)])], 0, ElementSize::Two);
    assert_filled(&[Owned::Zero(usize::MAX / TILE)], 0, ElementSize::Two);
    let empty = [Owned::Up(
        1,
        vec![(vec![], [16, 0, 3, 2]), (vec![], [0, 5, 0, 16])],
    )];
    assert_filled(&empty, 16, ElementSize::Two);
}

#[test]
fn many_recipes_into_one_buffer() {
    let (channels, tiles) = (64, 2);
    let size = channels * tiles * TILE * 2;
    let source = pattern(channels * tiles * TILE * 2, 3);
    let mut arena = vec![0xa5; 5 * size];
    let mut recipes: Vec<Recipe<'_>> = arena
        .chunks_mut(size)
        .map(|dest| Recipe {
            dest,
            channels,
            element: ElementSize::Two,
            columns: vec![Column::Fragments {
                source: &source,
                source_tiles: tiles,
                first: 0,
                count: tiles,
            }],
        })
        .collect();
    fill(&mut recipes, NonZeroUsize::MIN).expect("right recipes");
    assert!(arena.chunks(size).all(|factor| factor == source));
}

/// Cuts `0..end` at random into ranges with gaps between them: (begin, length).
fn ranges(end: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    // Cuts on every step, on even ones and on whole fragments.
    (
        select(&[1, 2, 16][..]),
        prop::collection::vec(0..=end, 0..8),
    )
        .prop_map(move |(step, mut cuts)| {
            for cut in &mut cuts {
                *cut = *cut / step * step;
            }
            cuts.sort_unstable();
            cuts.chunks_exact(2)
                .map(|cut| (cut[0], cut[1] - cut[0]))
                .collect()
        })
}

fn column(channels: usize, bytes: usize) -> impl Strategy<Value = Owned> {
    let fragments = (0..4_usize, 0..4_usize, 0..3_usize, any::<usize>()).prop_map(
        move |(first, count, after, seed)| {
            let source_tiles = first + count + after;
            Owned::Fragments {
                source: pattern(channels * source_tiles * TILE * bytes, seed),
                source_tiles,
                first,
                count,
            }
        },
    );
    let down = (0..5_usize, any::<usize>()).prop_flat_map(move |(tiles, seed)| {
        ranges(tiles * TILE).prop_map(move |ranges| {
            let members = ranges
                .into_iter()
                .map(|(begin, rank)| (pattern(rank * channels * bytes, seed ^ begin), rank, begin));
            Owned::Down(tiles, members.collect())
        })
    });
    let up = (0..5_usize, any::<usize>()).prop_flat_map(move |(tiles, seed)| {
        // Blocks of every range of rows by every range of ranks, some left out.
        (ranges(channels), ranges(tiles * TILE), any::<u16>()).prop_map(
            move |(rows, ranks, kept)| {
                let blocks = rows.iter().flat_map(|&(row_begin, row_count)| {
                    ranks.iter().map(move |&(begin, rank)| {
                        let seed = seed ^ (row_begin * 1000 + begin);
                        let source = pattern(row_count * rank * bytes, seed);
                        (source, [row_begin, row_count, rank, begin])
                    })
                });
                let members = (0..).zip(blocks).filter(|(i, _)| kept >> (i % 16) & 1 == 1);
                Owned::Up(tiles, members.map(|(_, member)| member).collect())
            },
        )
    });
    prop_oneof![fragments, down, up, (0..3_usize).prop_map(Owned::Zero)]
}

fn factor() -> impl Strategy<Value = (usize, ElementSize, Vec<Owned>)> {
    (0..20_usize, select(&ELEMENTS[..])).prop_flat_map(|(tiles, element)| {
        let channels = tiles * TILE;
        let columns = prop::collection::vec(column(channels, element.bytes()), 0..4);
        (Just(channels), Just(element), columns)
    })
}

proptest! {
    #[test]
    fn any_factor_equals_the_formula((channels, element, columns) in factor(), threads in 1..4_usize) {
        let expected = slow(&columns, channels, element.bytes());
        let got = filled(&columns, channels, element, threads).expect("a right recipe");
        prop_assert!(got == expected);
    }

    /// Whatever the numbers are, there is an answer: no panic, no write outside.
    #[test]
    fn any_numbers_are_judged(
        numbers in prop::array::uniform6(prop_oneof![
            0..40_usize, any::<usize>(), (0..9_usize).prop_map(|n| usize::MAX - n)
        ]),
        lens in prop::array::uniform2(select(&[0_usize, 32, 512, 1024][..])),
        kind in 0..4,
    ) {
        let [channels, tiles, a, b, c, d] = numbers;
        let source = vec![1; lens[0]];
        let column = match kind {
            0 => Column::Fragments { source: &source, source_tiles: tiles, first: a, count: b },
            1 => {
                let member = DownMember { source: &source, rank: a, rank_begin: b };
                Column::Down { tiles, members: vec![member, member] }
            }
            2 => {
                let member = UpMember {
                    source: &source, row_begin: a, row_count: b, rank: c, rank_begin: d,
                };
                Column::Up { tiles, members: vec![member] }
            }
            _ => Column::Zero { tiles },
        };
        let mut dest = vec![0; lens[1]];
        let columns = vec![column, Column::Zero { tiles: a }];
        let recipe = Recipe { dest: &mut dest, channels, element: ElementSize::Two, columns };
        let answer = fill(&mut [recipe], NonZeroUsize::MIN);
        prop_assert!(answer.is_ok() || dest.iter().all(|&byte| byte == 0));
    }
}

// ---- faults ----

/// The message of a factor of 32 channels of 2-byte elements with this column.
fn fault(dest_len: usize, channels: usize, column: Column<'_>) -> String {
    let mut dest = vec![7; dest_len];
    let right = Recipe {
        dest: &mut [],
        channels: 0,
        element: ElementSize::Two,
        columns: vec![],
    };
    let wrong = Recipe {
        dest: &mut dest,
        channels,
        element: ElementSize::Two,
        columns: vec![column],
    };
    let error = fill(&mut [right, wrong], NonZeroUsize::MIN).expect_err("a wrong recipe");
    assert!(dest.iter().all(|&byte| byte == 7), "nothing may be written");
    error.to_string()
}

fn down<'a>(source: &'a [u8], members: &[(usize, usize)]) -> Column<'a> {
    let members = members.iter().map(|&(rank, rank_begin)| DownMember {
        source: &source[..rank.min(48) * 64],
        rank,
        rank_begin,
    });
    Column::Down {
        tiles: 2,
        members: members.collect(),
    }
}

fn up<'a>(source: &'a [u8], members: &[[usize; 4]]) -> Column<'a> {
    let members = members
        .iter()
        .map(|&[row_begin, row_count, rank, rank_begin]| UpMember {
            source: &source[..row_count * rank * 2],
            row_begin,
            row_count,
            rank,
            rank_begin,
        });
    Column::Up {
        tiles: 2,
        members: members.collect(),
    }
}

#[test]
fn sizes_that_do_not_fit() {
    assert_snapshot!(fault(0, 24, Column::Zero { tiles: 2 }), @"recipe 1: channels must be a multiple of 16, got 24");
    assert_snapshot!(fault(2000, 32, Column::Zero { tiles: 2 }), @"recipe 1: the destination has 2000 bytes; 32 channels by 2 fragments of 2-byte elements take 2048");
    assert_snapshot!(fault(0, 32, Column::Zero { tiles: usize::MAX / 64 }), @"recipe 1: a tensor of the recipe is too large for this machine's memory");
    let fragments = |source, source_tiles, first, count| Column::Fragments {
        source,
        source_tiles,
        first,
        count,
    };
    let source = [0; 4096];
    assert_snapshot!(fault(2048, 32, fragments(&source[..3072], 3, 2, 2)), @"recipe 1: column 0: fragments 2 to 4 of a source that has 3 in each channel tile");
    assert_snapshot!(fault(2048, 32, fragments(&source[..3000], 3, 1, 2)), @"recipe 1: column 0: the source has 3000 bytes; 32 x 48 elements of 2 bytes take 3072");
    let member = DownMember {
        source: &source[..64],
        rank: 2,
        rank_begin: 0,
    };
    let column = Column::Down {
        tiles: 2,
        members: vec![member],
    };
    assert_snapshot!(fault(2048, 32, column), @"recipe 1: column 0, member 0: the source has 64 bytes; 2 x 32 elements of 2 bytes take 128");
}

#[test]
fn places_that_do_not_fit() {
    let source = [0; 4096];
    assert_snapshot!(fault(2048, 32, down(&source, &[(20, 0), (13, 20)])), @"recipe 1: column 0, member 1: ranks 20 to 33 of a column of 32 ranks");
    assert_snapshot!(fault(2048, 32, down(&source, &[(20, 0), (10, 20), (2, 29)])), @"recipe 1: column 0: members 1 and 2 overlap");
    assert_snapshot!(fault(2048, 32, up(&source, &[[0, 16, 20, 13]])), @"recipe 1: column 0, member 0: ranks 13 to 33 of a column of 32 ranks");
    assert_snapshot!(fault(2048, 32, up(&source, &[[17, 16, 20, 0]])), @"recipe 1: column 0, member 0: rows 17 to 33 of 32 channels");
    let overlapping = [[0, 16, 8, 0], [16, 16, 8, 0], [15, 2, 8, 7]];
    assert_snapshot!(fault(2048, 32, up(&source, &overlapping)), @"recipe 1: column 0: members 0 and 2 overlap");
}
