//! Fillers: memory that threads fill while whoever asked for that does something else.

#![expect(clippy::unwrap_used, reason = "the helpers belong to the tests")]

mod pattern;

use std::num::NonZeroUsize;
use std::time::Duration;

use pattern::pattern;
use proptest::prelude::*;
use qwenlora_core::packed::{
    Column, DownMember, ElementSize, FRAGMENT, Fillers, Filling, Packed, Recipe, TILE, fill,
};

/// What memory holds before it is filled.
const BEFORE: u8 = 0xaa;
/// Longer than anything here takes: a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(60);

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// Slots of a base fragment and a `down` of 16 ranks each, of two bytes.
#[derive(Debug, Clone, Copy)]
struct Shape {
    slots: usize,
    channels: usize,
    seed: u32,
}

impl Shape {
    fn column_len(self) -> usize {
        self.slots * self.channels / TILE * FRAGMENT * 2
    }

    fn sources(self) -> [Vec<u8>; 2] {
        [self.seed, self.seed + 1].map(|seed| pattern(self.column_len(), seed))
    }

    fn recipe<'a>(self, dest: &'a mut [u8], base: &'a [u8], down: &'a [u8]) -> Recipe<'a> {
        let each = base.len() / self.slots.max(1);
        let packed = |slot| Packed {
            source: &base[slot * each..][..each],
            tiles: 1,
        };
        Recipe {
            dest,
            slots: self.slots,
            channels: self.channels,
            element: ElementSize::Two,
            columns: vec![
                Column::Fragments {
                    sources: (0..self.slots).map(packed).collect(),
                    first: 0,
                    count: 1,
                },
                Column::Down {
                    tiles: 1,
                    members: vec![DownMember {
                        source: down,
                        rank: TILE,
                        rank_begin: 0,
                    }],
                },
            ],
        }
    }

    /// What the call that waits for it fills.
    fn expected(self) -> Vec<u8> {
        let [base, down] = self.sources();
        let mut dest = vec![BEFORE; 2 * self.column_len()];
        fill(vec![self.recipe(&mut dest, &base, &down)], threads(1)).unwrap();
        dest
    }
}

/// Memory that is being filled.
struct Lent {
    filling: Filling,
    dest: *mut [u8],
    sources: [*mut [u8]; 2],
}

impl Lent {
    #[expect(unsafe_code, reason = "memory is lent, and taken back")]
    fn begin(fillers: &Fillers, shape: Shape) -> Self {
        let leaked = |bytes: Vec<u8>| -> *mut [u8] { Box::leak(bytes.into_boxed_slice()) };
        let dest = leaked(vec![BEFORE; 2 * shape.column_len()]);
        let sources = shape.sources().map(leaked);
        // SAFETY: leaked a line ago, and not used by anybody else before they are taken back.
        let recipe = unsafe { shape.recipe(&mut *dest, &*sources[0], &*sources[1]) };
        Self {
            filling: fillers.fill(vec![recipe]).unwrap(),
            dest,
            sources,
        }
    }

    /// The memory, when nobody uses it any more.
    #[expect(unsafe_code, reason = "memory is lent, and taken back")]
    fn taken_back(self) -> Box<[u8]> {
        self.filling.settle();
        assert!(self.filling.is_done());
        // SAFETY: they were boxes before, and become some this once. Nobody uses memory of a
        // filling that is settled: so `Filling` promises.
        unsafe {
            for source in self.sources {
                drop(Box::from_raw(source));
            }
            Box::from_raw(self.dest)
        }
    }
}

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = (0_usize..5, 0_usize..40, 0_u32..1_000);
    let shape = shape.prop_map(|(slots, tiles, seed)| Shape {
        slots,
        channels: tiles * TILE,
        seed,
    });
    prop::collection::vec(shape, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_is_filled_as_by_a_call_that_waits(shapes in shapes(), workers in 1_usize..9) {
        let fillers = Fillers::new(threads(workers));
        let begun: Vec<_> = shapes.iter().map(|&s| (s, Lent::begin(&fillers, s))).collect();
        for (shape, lent) in begun {
            prop_assert_eq!(lent.filling.wait(LONG), Ok(true));
            prop_assert_eq!(&*lent.taken_back(), &shape.expected()[..]);
        }
    }

    #[test]
    fn all_that_was_begun_is_done_when_they_are_dropped(shapes in shapes(), workers in 1_usize..9) {
        let fillers = Fillers::new(threads(workers));
        let begun: Vec<_> = shapes.iter().map(|&s| (s, Lent::begin(&fillers, s))).collect();
        drop(fillers);
        for (shape, lent) in begun {
            prop_assert!(lent.filling.is_done());
            prop_assert_eq!(&*lent.taken_back(), &shape.expected()[..]);
        }
    }
}

#[test]
fn many_threads_share_large_memory() {
    let fillers = Fillers::new(threads(16));
    for seed in 0..8 {
        let shape = Shape {
            slots: 3,
            channels: 12_288,
            seed,
        };
        let lent = Lent::begin(&fillers, shape);
        assert_eq!(lent.filling.wait(LONG), Ok(true));
        assert!(lent.taken_back().iter().eq(&shape.expected()));
    }
}

#[test]
fn what_comes_first_is_done_first() {
    let fillers = Fillers::new(threads(4));
    let shape = |channels| Shape {
        slots: 2,
        channels,
        seed: 5,
    };
    let begun: Vec<_> = [49_152, 16, 16_384, 16]
        .map(|channels| Lent::begin(&fillers, shape(channels)))
        .into();
    assert_eq!(begun[3].filling.wait(LONG), Ok(true));
    assert!(begun.iter().all(|lent| lent.filling.is_done()));
    for lent in begun {
        lent.taken_back();
    }
}

#[test]
fn nothing_to_do_is_done_when_all_before_it_is() {
    let fillers = Fillers::new(threads(1));
    let shape = |slots| Shape {
        slots,
        channels: 49_152,
        seed: 5,
    };
    let nothing = Lent::begin(&fillers, shape(0));
    assert!(nothing.filling.is_done());
    let large = Lent::begin(&fillers, shape(8));
    let behind = Lent::begin(&fillers, shape(0));
    assert_eq!(behind.filling.wait(LONG), Ok(true));
    assert!(large.filling.is_done());
    for lent in [nothing, large, behind] {
        lent.taken_back();
    }
}

#[test]
fn a_wrong_recipe_is_refused_before_anything_is_begun() {
    let fillers = Fillers::new(threads(2));
    let wrong = Recipe {
        dest: &mut [],
        slots: 1,
        channels: 16,
        element: ElementSize::Two,
        columns: vec![Column::Zero { tiles: 1 }],
    };
    let error = fillers.fill(vec![wrong]).unwrap_err();
    assert!(error.to_string().contains("the destination has 0 bytes"));
}
