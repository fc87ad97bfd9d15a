//! Packed factors against the element formula, and every fault of a recipe.

use std::num::NonZeroUsize;
use std::sync::LazyLock;

use insta::assert_snapshot;
use proptest::prelude::*;
use proptest::sample::select;
use qwenlora_core::packed::{
    Column, DownMember, ElementSize, FRAGMENT, PackError, PackFault, Packed, Recipe, Side, TILE,
    Table, Unpacking, Untouched, UpMember, fill, unpack,
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

/// What destinations hold before they are filled.
const BEFORE: u8 = 0xa5;

static ENTRIES: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(Table::LEN_BYTES, 77));

/// A column that owns its sources.
#[derive(Debug, Clone)]
enum Owned {
    Fragments {
        /// Of every slot, with its tiles.
        sources: Vec<(Vec<u8>, usize)>,
        first: usize,
        count: usize,
    },
    /// (source, rank, `rank_begin`).
    Down(usize, Vec<(Vec<u8>, usize, usize)>),
    Up(usize, Vec<OwnedUp>, Untouched),
    Zero(usize),
    Keep(usize),
}

/// An `up`, and whether `ENTRIES` stand for its elements.
#[derive(Debug, Clone)]
struct OwnedUp {
    source: Vec<u8>,
    is_replaced: bool,
    /// (`row_begin`, `row_count`, rank, `rank_begin`).
    place: [usize; 4],
}

impl Owned {
    fn borrow(&self) -> Column<'_> {
        match self {
            Self::Fragments {
                sources,
                first,
                count,
            } => Column::Fragments {
                sources: sources
                    .iter()
                    .map(|(source, tiles)| Packed {
                        source,
                        tiles: *tiles,
                    })
                    .collect(),
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
            Self::Up(tiles, members, untouched) => Column::Up {
                tiles: *tiles,
                members: members.iter().map(OwnedUp::borrow).collect(),
                untouched: *untouched,
            },
            Self::Zero(tiles) => Column::Zero { tiles: *tiles },
            Self::Keep(tiles) => Column::Keep { tiles: *tiles },
        }
    }
}

impl OwnedUp {
    fn borrow(&self) -> UpMember<'_> {
        let [row_begin, row_count, rank, rank_begin] = self.place;
        UpMember {
            source: &self.source,
            table: self
                .is_replaced
                .then(|| Table::from_bytes(&ENTRIES).expect("a table's size")),
            row_begin,
            row_count,
            rank,
            rank_begin,
        }
    }

    /// The bytes that its element becomes.
    fn element(&self, index: usize, bytes: usize) -> Vec<u8> {
        let element = &self.source[index * bytes..][..bytes];
        if !self.is_replaced {
            return element.to_vec();
        }
        let value = u16::from_ne_bytes(element.try_into().expect("two bytes"));
        ENTRIES[usize::from(value) * 2..][..2].to_vec()
    }

    fn touches(&self, channel_tile: usize, tile: usize) -> bool {
        let [row_begin, row_count, rank, rank_begin] = self.place;
        let mut rows = row_begin..row_begin + row_count;
        let mut ranks = rank_begin..rank_begin + rank;
        rows.any(|row| row / TILE == channel_tile) && ranks.any(|rank| rank / TILE == tile)
    }
}

/// One slot's factor by the formula, element by element.
struct Slow {
    dest: Vec<u8>,
    slot: usize,
    tiles: usize,
    bytes: usize,
}

impl Slow {
    fn put(&mut self, at: usize, element: &[u8]) {
        self.dest[at * self.bytes..][..self.bytes].copy_from_slice(element);
    }

    fn keep(&mut self, channel_tile: usize, tile: usize) {
        for at in 0..FRAGMENT {
            let at = (channel_tile * self.tiles + tile) * FRAGMENT + at;
            self.put(at, &vec![BEFORE; self.bytes]);
        }
    }

    fn column(&mut self, column: &Owned, channels: usize, begin: usize) {
        let (first_rank, bytes) = (begin * TILE, self.bytes);
        match column {
            Owned::Fragments {
                sources,
                first,
                count,
            } => {
                let (source, source_tiles) = &sources[self.slot];
                for tile in 0..channels / TILE {
                    for element in 0..count * FRAGMENT {
                        let at = (tile * self.tiles + begin) * FRAGMENT + element;
                        let from = (tile * source_tiles + first) * FRAGMENT + element;
                        self.put(at, &source[from * bytes..][..bytes]);
                    }
                }
            }
            Owned::Down(_, members) => {
                for (source, rank, rank_begin) in members {
                    let own = self.slot * rank * channels;
                    for r in 0..*rank {
                        for c in 0..channels {
                            let at = position(first_rank + rank_begin + r, c, self.tiles, false);
                            let from = own + r * channels + c;
                            self.put(at, &source[from * bytes..][..bytes]);
                        }
                    }
                }
            }
            Owned::Up(tiles, members, untouched) => {
                for member in members {
                    let [row_begin, row_count, rank, rank_begin] = member.place;
                    let own = self.slot * row_count * rank;
                    for c in 0..row_count {
                        for r in 0..rank {
                            let rank_at = first_rank + rank_begin + r;
                            let at = position(rank_at, row_begin + c, self.tiles, true);
                            self.put(at, &member.element(own + c * rank + r, bytes));
                        }
                    }
                }
                for channel_tile in 0..channels / TILE {
                    for tile in 0..*tiles {
                        let mut members = members.iter();
                        let is_touched = members.any(|m| m.touches(channel_tile, tile));
                        if *untouched == Untouched::Keep && !is_touched {
                            self.keep(channel_tile, begin + tile);
                        }
                    }
                }
            }
            Owned::Zero(_) => {}
            Owned::Keep(tiles) => {
                for channel_tile in 0..channels / TILE {
                    for tile in 0..*tiles {
                        self.keep(channel_tile, begin + tile);
                    }
                }
            }
        }
    }
}

/// The factors of some slots, one after the other.
fn slow(columns: &[Owned], slots: usize, channels: usize, bytes: usize) -> Vec<u8> {
    let tiles: usize = columns.iter().map(|column| column.borrow().tiles()).sum();
    let factors = (0..slots).flat_map(|slot| {
        let mut slow = Slow {
            dest: vec![0; channels * bytes * tiles.saturating_mul(TILE)],
            slot,
            tiles,
            bytes,
        };
        let mut begin = 0;
        for column in columns {
            slow.column(column, channels, begin);
            begin += column.borrow().tiles();
        }
        slow.dest
    });
    factors.collect()
}

fn filled(
    columns: &[Owned],
    slots: usize,
    channels: usize,
    element: ElementSize,
    threads: usize,
) -> Result<Vec<u8>, PackError> {
    let len = slow(columns, slots, channels, element.bytes()).len();
    let mut dest = vec![BEFORE; len];
    let recipe = Recipe {
        dest: &mut dest,
        slots,
        channels,
        element,
        columns: columns.iter().map(Owned::borrow).collect(),
    };
    fill(vec![recipe], NonZeroUsize::new(threads).expect("some"))?;
    Ok(dest)
}

fn assert_filled(columns: &[Owned], channels: usize, element: ElementSize) {
    let expected = slow(columns, 1, channels, element.bytes());
    for threads in [1, 3] {
        let got = filled(columns, 1, channels, element, threads).expect("a right recipe");
        assert!(got == expected, "{channels} channels, {threads} threads");
    }
}

const ELEMENTS: [ElementSize; 2] = [ElementSize::Two, ElementSize::Four];

fn plain(source: Vec<u8>, place: [usize; 4]) -> OwnedUp {
    OwnedUp {
        source,
        is_replaced: false,
        place,
    }
}

#[test]
fn a_composed_slot_of_several_bands() {
    for element in ELEMENTS {
        let (channels, bytes) = (3072, element.bytes());
        let base = Owned::Fragments {
            sources: vec![(pattern(channels * 128 * bytes, 1), 8)],
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
        .map(|(place, seed)| plain(pattern(place[1] * place[2] * bytes, seed), place));
        let up = [
            base,
            Owned::Up(10, ups.to_vec(), Untouched::Zero),
            Owned::Zero(2),
        ];
        assert_filled(&up, channels, element);
    }
}

#[test]
fn projections_that_share_a_down_share_its_ranks() {
    let ups = [0, 32, 64].map(|row| plain(pattern(32 * 16 * 2, 9 + row), [row, 32, 16, 0]));
    let column = Owned::Up(1, ups.to_vec(), Untouched::Zero);
    assert_filled(&[column], 96, ElementSize::Two);
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
        &[
            Owned::Up(2, vec![], Untouched::Zero),
            Owned::Down(1, vec![]),
        ],
        32,
        ElementSize::Four,
    );
    assert_filled(&[Owned::Down(1, vec![(vec![], 3, 2)])], 0, ElementSize::Two);
    assert_filled(&[Owned::Zero(usize::MAX / TILE)], 0, ElementSize::Two);
    let empty = [Owned::Up(
        1,
        vec![plain(vec![], [16, 0, 3, 2]), plain(vec![], [0, 5, 0, 16])],
        Untouched::Zero,
    )];
    assert_filled(&empty, 16, ElementSize::Two);
}

#[test]
fn many_recipes_into_one_buffer() {
    let (channels, tiles) = (64, 2);
    let size = channels * tiles * TILE * 2;
    let source = pattern(channels * tiles * TILE * 2, 3);
    let mut arena = vec![0xa5; 5 * size];
    let recipes: Vec<Recipe<'_>> = arena
        .chunks_mut(size)
        .map(|dest| Recipe {
            dest,
            slots: 1,
            channels,
            element: ElementSize::Two,
            columns: vec![Column::Fragments {
                sources: vec![Packed {
                    source: &source,
                    tiles,
                }],
                first: 0,
                count: tiles,
            }],
        })
        .collect();
    fill(recipes, NonZeroUsize::MIN).expect("right recipes");
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

fn column(slots: usize, channels: usize, bytes: usize) -> impl Strategy<Value = Owned> {
    let after = prop::collection::vec(0..3_usize, slots);
    let fragments = (0..4_usize, 0..4_usize, after, any::<usize>()).prop_map(
        move |(first, count, after, seed)| {
            let sources = after.iter().enumerate().map(|(slot, after)| {
                let tiles = first + count + after;
                let len = channels * tiles * TILE * bytes;
                (pattern(len, seed ^ slot), tiles)
            });
            Owned::Fragments {
                sources: sources.collect(),
                first,
                count,
            }
        },
    );
    let down = (0..5_usize, any::<usize>()).prop_flat_map(move |(tiles, seed)| {
        ranges(tiles * TILE).prop_map(move |ranges| {
            let members = ranges.into_iter().map(|(begin, rank)| {
                let len = slots * rank * channels * bytes;
                (pattern(len, seed ^ begin), rank, begin)
            });
            Owned::Down(tiles, members.collect())
        })
    });
    let untouched = select(&[Untouched::Zero, Untouched::Keep][..]);
    let up =
        (0..5_usize, any::<usize>(), untouched).prop_flat_map(move |(tiles, seed, untouched)| {
            // Blocks of every range of rows by every range of ranks, some left out.
            let blocks = (ranges(channels), ranges(tiles * TILE));
            (blocks, any::<u16>(), any::<u16>()).prop_map(move |((rows, ranks), kept, replaced)| {
                let places = rows.iter().flat_map(|&(row_begin, row_count)| {
                    let places = ranks.iter();
                    places.map(move |&(begin, rank)| [row_begin, row_count, rank, begin])
                });
                let has = |marks: u16, i: usize| marks >> (i % 16) & 1 == 1;
                let places = places.enumerate().filter(|&(i, _)| has(kept, i));
                let members = places.map(|(i, place)| {
                    let seed = seed ^ (place[0] * 1000 + place[3]);
                    OwnedUp {
                        source: pattern(slots * place[1] * place[2] * bytes, seed),
                        is_replaced: bytes == 2 && has(replaced, i),
                        place,
                    }
                });
                Owned::Up(tiles, members.collect(), untouched)
            })
        });
    prop_oneof![
        fragments,
        down,
        up,
        (0..3_usize).prop_map(Owned::Zero),
        (0..3_usize).prop_map(Owned::Keep)
    ]
}

fn factors() -> impl Strategy<Value = (usize, usize, ElementSize, Vec<Owned>)> {
    (0..4_usize, 0..20_usize, select(&ELEMENTS[..])).prop_flat_map(|(slots, tiles, element)| {
        let channels = tiles * TILE;
        let columns = prop::collection::vec(column(slots, channels, element.bytes()), 0..4);
        (Just(slots), Just(channels), Just(element), columns)
    })
}

proptest! {
    #[test]
    fn any_factors_equal_the_formula(
        (slots, channels, element, columns) in factors(),
        threads in 1..4_usize,
    ) {
        let expected = slow(&columns, slots, channels, element.bytes());
        let got = filled(&columns, slots, channels, element, threads).expect("a right recipe");
        prop_assert!(got == expected);
    }

    /// Whatever the numbers are, there is an answer: no panic, no write outside.
    #[test]
    fn any_numbers_are_judged(
        numbers in prop::array::uniform7(prop_oneof![
            0..40_usize, any::<usize>(), (0..9_usize).prop_map(|n| usize::MAX - n)
        ]),
        lens in prop::array::uniform2(select(&[0_usize, 32, 512, 1024][..])),
        kind in 0..4,
    ) {
        let [slots, channels, tiles, a, b, c, d] = numbers;
        let source = vec![1; lens[0]];
        let column = match kind {
            0 => {
                let packed = Packed { source: &source, tiles };
                Column::Fragments { sources: vec![packed; slots.min(3)], first: a, count: b }
            }
            1 => {
                let member = DownMember { source: &source, rank: a, rank_begin: b };
                Column::Down { tiles, members: vec![member, member] }
            }
            2 => {
                let member = UpMember {
                    source: &source,
                    table: Table::from_bytes(&ENTRIES),
                    row_begin: a,
                    row_count: b,
                    rank: c,
                    rank_begin: d,
                };
                Column::Up { tiles, members: vec![member], untouched: Untouched::Zero }
            }
            _ => Column::Zero { tiles },
        };
        let mut dest = vec![0; lens[1]];
        let columns = vec![column, Column::Zero { tiles: a }];
        let recipe = Recipe { dest: &mut dest, slots, channels, element: ElementSize::Two, columns };
        let answer = fill(vec![recipe], NonZeroUsize::MIN);
        prop_assert!(answer.is_ok() || dest.iter().all(|&byte| byte == 0));
    }
}

// ---- faults ----

/// The message of a factor of 2-byte elements in one slot with this column.
fn fault(dest_len: usize, channels: usize, column: Column<'_>) -> String {
    fault_of(dest_len, 1, channels, ElementSize::Two, column)
}

fn fault_of(
    dest_len: usize,
    slots: usize,
    channels: usize,
    element: ElementSize,
    column: Column<'_>,
) -> String {
    let mut dest = vec![7; dest_len];
    let right = Recipe {
        dest: &mut [],
        slots: 1,
        channels: 0,
        element,
        columns: vec![],
    };
    let wrong = Recipe {
        dest: &mut dest,
        slots,
        channels,
        element,
        columns: vec![column],
    };
    let error = fill(vec![right, wrong], NonZeroUsize::MIN).expect_err("a wrong recipe");
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
            table: None,
            row_begin,
            row_count,
            rank,
            rank_begin,
        });
    Column::Up {
        tiles: 2,
        members: members.collect(),
        untouched: Untouched::Zero,
    }
}

#[test]
fn sizes_that_do_not_fit() {
    assert_snapshot!(fault(0, 24, Column::Zero { tiles: 2 }), @"recipe 1: channels must be a multiple of 16, got 24");
    assert_snapshot!(fault(2000, 32, Column::Zero { tiles: 2 }), @"recipe 1: the destination has 2000 bytes; 1 slots of 32 channels by 2 fragments of 2-byte elements take 2048");
    assert_snapshot!(fault(0, 32, Column::Zero { tiles: usize::MAX / 64 }), @"recipe 1: a tensor of the recipe is too large for this machine's memory");
    let huge = fault_of(
        0,
        usize::MAX / 64,
        32,
        ElementSize::Two,
        Column::Zero { tiles: 2 },
    );
    assert_snapshot!(huge, @"recipe 1: a tensor of the recipe is too large for this machine's memory");
    let fragments = |source, tiles, first, count| Column::Fragments {
        sources: vec![Packed { source, tiles }],
        first,
        count,
    };
    let source = [0; 4096];
    assert_snapshot!(fault(2048, 32, fragments(&source[..3072], 3, 2, 2)), @"recipe 1: column 0: fragments 2 to 4 of a source that has 3 in each channel tile");
    assert_snapshot!(fault(2048, 32, fragments(&source[..3000], 3, 1, 2)), @"recipe 1: column 0: the source has 3000 bytes; 1 x 32 x 48 elements of 2 bytes take 3072");
    let two_slots = fault_of(
        4096,
        2,
        32,
        ElementSize::Two,
        fragments(&source[..3072], 3, 0, 2),
    );
    assert_snapshot!(two_slots, @"recipe 1: column 0: 1 sources for 2 slots");
    let member = DownMember {
        source: &source[..128],
        rank: 2,
        rank_begin: 0,
    };
    let column = Column::Down {
        tiles: 2,
        members: vec![member],
    };
    assert_snapshot!(fault_of(4096, 2, 32, ElementSize::Two, column), @"recipe 1: column 0, member 0: the source has 128 bytes; 2 x 2 x 32 elements of 2 bytes take 256");
}

#[test]
fn tables_have_an_entry_for_every_two_bytes() {
    assert!(Table::from_bytes(&ENTRIES).is_some());
    assert!(Table::from_bytes(&ENTRIES[1..]).is_none());
    assert!(Table::from_bytes(&[ENTRIES.as_slice(), &[0]].concat()).is_none());
    let member = UpMember {
        source: &[0; 64],
        table: Table::from_bytes(&ENTRIES),
        row_begin: 0,
        row_count: 1,
        rank: 16,
        rank_begin: 0,
    };
    let column = Column::Up {
        tiles: 2,
        members: vec![member],
        untouched: Untouched::Zero,
    };
    assert_snapshot!(fault_of(4096, 1, 32, ElementSize::Four, column), @"recipe 1: column 0, member 0: a table of elements of 4 bytes");
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

// ---- back in logical order ----

fn unpacked(
    source: &[u8],
    side: Side,
    channels: usize,
    element: ElementSize,
    count: usize,
) -> Vec<u8> {
    let mut dest = vec![BEFORE; source.len()];
    let mut unpacking = Unpacking {
        source,
        dest: &mut dest,
        side,
        channels,
        element,
    };
    let threads = NonZeroUsize::new(count).expect("tests employ somebody");
    unpack(&mut unpacking, threads).expect("it fits");
    dest
}

proptest! {
    #[test]
    fn every_element_comes_back_from_its_position(
        channel_tiles in 1_usize..40,
        tiles in 1_usize..6,
        is_up in any::<bool>(),
        element in select(vec![ElementSize::Two, ElementSize::Four]),
        count in select(vec![1_usize, 2, 5]),
        seed in any::<u16>(),
    ) {
        let (channels, ranks, each) = (channel_tiles * TILE, tiles * TILE, element.bytes());
        let source = pattern(channels * ranks * each, seed.into());
        let side = if is_up { Side::Up } else { Side::Down };
        let found = unpacked(&source, side, channels, element, count);
        for channel in 0..channels {
            for rank in 0..ranks {
                let from = position(rank, channel, tiles, is_up) * each;
                let to = if is_up { channel * ranks + rank } else { rank * channels + channel };
                prop_assert_eq!(&found[to * each..][..each], &source[from..][..each]);
            }
        }
    }
}

#[test]
fn large_factors_come_back() {
    // Several bands, of which threads take some each.
    let (channels, tiles) = (12_288, 5);
    let source = pattern(channels * tiles * TILE * 2, 3);
    for side in [Side::Down, Side::Up] {
        let one = unpacked(&source, side, channels, ElementSize::Two, 1);
        assert!(one == unpacked(&source, side, channels, ElementSize::Two, 4));
        for at in [0, 77 * 80 + 3, channels * 80 - 1] {
            let (rank, channel) = match side {
                Side::Down => (at / channels, at % channels),
                Side::Up => (at % 80, at / 80),
            };
            let from = position(rank, channel, tiles, side == Side::Up) * 2;
            assert_eq!(one[at * 2..][..2], source[from..][..2], "{side:?}, {at}");
        }
    }
}

#[test]
fn nothing_comes_back_of_nothing() {
    for channels in [0, 16] {
        assert!(unpacked(&[], Side::Up, channels, ElementSize::Two, 2).is_empty());
    }
}

#[test]
fn what_is_no_whole_factor_is_refused() {
    let refused = |source_bytes: usize, dest_bytes: usize, channels: usize| {
        let (source, mut dest) = (vec![0; source_bytes], vec![BEFORE; dest_bytes]);
        let mut unpacking = Unpacking {
            source: &source,
            dest: &mut dest,
            side: Side::Down,
            channels,
            element: ElementSize::Two,
        };
        let fault = unpack(&mut unpacking, NonZeroUsize::MIN).expect_err("it does not fit");
        assert!(dest.iter().all(|byte| *byte == BEFORE));
        fault
    };
    assert_eq!(refused(512, 512, 8), PackFault::Channels { channels: 8 });
    for (source, dest, channels) in [(512, 1024, 16), (1024, 512, 16), (512, 512, 32), (2, 2, 0)] {
        let fault = refused(source, dest, channels);
        assert!(matches!(fault, PackFault::Unpacked { .. }), "{fault:?}");
    }
    assert_snapshot!(
        refused(1536, 1536, 32).to_string(),
        @"1536 bytes are unpacked into 1536; 32 channels of 2-byte elements take a multiple of 1024, and as much"
    );
    assert!(matches!(
        refused(32, 32, usize::MAX - 15),
        PackFault::TooLarge { .. }
    ));
}
