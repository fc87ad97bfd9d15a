//! What the values of low-rank factors tell before they are packed: which modules share a `down`,
//! which slots have no delta, and how large the largest value is.
//!
//! Values are compared as bit patterns, so that all of it runs at the speed of memory.

use std::ops::BitOr;

use thiserror::Error;

use crate::dtype::Dtype;
use crate::source::scalar;

/// Values of a part, after which it is asked whether the answer is known.
const PART_VALUES: usize = 32;

/// One factor of one module in all slots of a buffer, slot after slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Its first byte in the buffer.
    pub begin: usize,
    /// Bytes of one slot.
    pub slot_bytes: usize,
    /// Type of the values: `F16`, `BF16` or `F32`.
    pub dtype: Dtype,
}

/// What the factors of some modules tell, slot by slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// For each module the index of the first one with an equal `down`; once where all slots share
    /// alike, else slot by slot.
    pub sharing: Vec<Vec<usize>>,
    /// Slots, ascending, in which every `down` or every `up` is all zero.
    pub zero: Vec<usize>,
}

/// Why a buffer cannot be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FindingsError {
    /// A `down` without its `up`.
    #[error("blocks come in pairs of down and up, got {count}")]
    Unpaired {
        /// How many blocks there are.
        count: usize,
    },
    /// Values of a type that no factor is packed in.
    #[error("block {block} holds {dtype}: only F16, BF16 and F32 are looked at")]
    Dtype {
        /// Index of the block.
        block: usize,
        /// Its type.
        dtype: Dtype,
    },
    /// A slot of a block ends within a value.
    #[error("block {block} has {slot_bytes} bytes per slot, which are no whole values of {dtype}")]
    PartialValue {
        /// Index of the block.
        block: usize,
        /// Its bytes per slot.
        slot_bytes: usize,
        /// Its type.
        dtype: Dtype,
    },
    /// A block that does not lie in the buffer.
    #[error(
        "block {block} begins at byte {begin} and has {slots} slots of {slot_bytes} bytes, beyond \
         the buffer of {buffer_bytes}"
    )]
    Outside {
        /// Index of the block.
        block: usize,
        /// Its first byte.
        begin: usize,
        /// Its slots.
        slots: usize,
        /// Its bytes per slot.
        slot_bytes: usize,
        /// Length of the buffer.
        buffer_bytes: usize,
    },
}

/// The factors of some modules in a buffer, every bound checked.
#[derive(Debug, Clone)]
pub struct Factors<'b> {
    /// (down, up) of each module.
    pairs: Vec<(Factor<'b>, Factor<'b>)>,
    slots: usize,
}

impl<'b> Factors<'b> {
    /// Finds the factors of `slots` slots in a buffer.
    ///
    /// # Arguments
    /// `blocks` alternate: the `down` of a module, its `up`, the `down` of the next one.
    pub fn new(buffer: &'b [u8], blocks: &[Block], slots: usize) -> Result<Self, FindingsError> {
        let mut factors = Vec::with_capacity(blocks.len());
        for (index, block) in blocks.iter().enumerate() {
            factors.push(Factor::new(buffer, index, *block, slots)?);
        }
        let (pairs, rest) = factors.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(FindingsError::Unpaired {
                count: factors.len(),
            });
        }
        let pairs = pairs.iter().map(|&[down, up]| (down, up)).collect();
        Ok(Self { pairs, slots })
    }

    /// Who shares a `down`, and who has no delta.
    pub fn look(&self) -> Findings {
        let mut all: Vec<Vec<usize>> = (0..self.slots).map(|slot| self.sharing(slot)).collect();
        if all.windows(2).all(|two| two[0] == two[1]) {
            all.truncate(1);
        }
        Findings {
            sharing: all,
            zero: (0..self.slots).filter(|&slot| self.is_zero(slot)).collect(),
        }
    }

    /// The largest magnitude of all values; NaN where there is one, 0 where there are no values.
    pub fn peak(&self) -> f64 {
        let factors = self.pairs.iter().flat_map(|(down, up)| [down, up]);
        factors.map(Factor::peak).fold(0.0, |largest: f64, own| {
            // `max` would drop a NaN.
            if largest.is_nan() || own <= largest {
                largest
            } else {
                own
            }
        })
    }

    fn sharing(&self, slot: usize) -> Vec<usize> {
        let downs = || self.pairs.iter().map(|(down, _)| down);
        downs()
            .enumerate()
            .map(|(at, own)| {
                let earlier = downs().take(at);
                let mut equal = earlier.enumerate().filter(|(_, e)| own.equals(e, slot));
                equal.next().map_or(at, |(first, _)| first)
            })
            .collect()
    }

    fn is_zero(&self, slot: usize) -> bool {
        self.pairs.iter().all(|(down, _)| down.is_zero(slot))
            || self.pairs.iter().all(|(_, up)| up.is_zero(slot))
    }
}

/// Size of the values of a factor.
#[derive(Debug, Clone, Copy)]
enum Width {
    Two,
    Four,
}

/// One factor of one module: its values in all slots.
#[derive(Debug, Clone, Copy)]
struct Factor<'b> {
    bytes: &'b [u8],
    slot_bytes: usize,
    dtype: Dtype,
    width: Width,
}

impl<'b> Factor<'b> {
    fn new(
        buffer: &'b [u8],
        index: usize,
        block: Block,
        slots: usize,
    ) -> Result<Self, FindingsError> {
        let Block {
            begin,
            slot_bytes,
            dtype,
        } = block;
        let width = match dtype {
            Dtype::F16 | Dtype::BF16 => Width::Two,
            Dtype::F32 => Width::Four,
            _ => {
                return Err(FindingsError::Dtype {
                    block: index,
                    dtype,
                });
            }
        };
        let value_bytes = match width {
            Width::Two => 2,
            Width::Four => 4,
        };
        if !slot_bytes.is_multiple_of(value_bytes) {
            return Err(FindingsError::PartialValue {
                block: index,
                slot_bytes,
                dtype,
            });
        }
        let end = slot_bytes
            .checked_mul(slots)
            .and_then(|len| begin.checked_add(len));
        let bytes = end.and_then(|end| buffer.get(begin..end));
        let bytes = bytes.ok_or(FindingsError::Outside {
            block: index,
            begin,
            slots,
            slot_bytes,
            buffer_bytes: buffer.len(),
        })?;
        Ok(Self {
            bytes,
            slot_bytes,
            dtype,
            width,
        })
    }

    fn slot(&self, slot: usize) -> &'b [u8] {
        // Of a checked block: neither product overflows.
        &self.bytes[slot * self.slot_bytes..][..self.slot_bytes]
    }

    /// Whether both hold the same bits; slices of other lengths end the comparison at once, as does
    /// the first difference.
    fn equals(&self, other: &Self, slot: usize) -> bool {
        self.dtype == other.dtype && self.slot(slot) == other.slot(slot)
    }

    /// Whether no value differs from zero, of either sign.
    fn is_zero(&self, slot: usize) -> bool {
        let bytes = self.slot(slot);
        match self.width {
            Width::Two => all_zero(bytes.as_chunks::<2>().0, magnitude_16),
            Width::Four => all_zero(bytes.as_chunks::<4>().0, magnitude_32),
        }
    }

    /// The largest magnitude: the order of bit patterns without a sign is that of magnitudes, NaN
    /// above infinity.
    fn peak(&self) -> f64 {
        let decoded = match self.width {
            Width::Two => {
                let bits = largest(self.bytes.as_chunks::<2>().0, magnitude_16);
                scalar::decode(self.dtype, &bits.to_le_bytes())
            }
            Width::Four => {
                let bits = largest(self.bytes.as_chunks::<4>().0, magnitude_32);
                scalar::decode(self.dtype, &bits.to_le_bytes())
            }
        };
        // A checked dtype is one of real numbers.
        decoded.unwrap_or(f64::NAN)
    }
}

/// The bits of a value without its sign. Signed: every x86-64 compares those eight at a time.
fn magnitude_16(bytes: [u8; 2]) -> i16 {
    i16::from_le_bytes(bytes) & i16::MAX
}

/// The bits of a value without its sign.
fn magnitude_32(bytes: [u8; 4]) -> i32 {
    i32::from_le_bytes(bytes) & i32::MAX
}

/// Whether all values are zero: most often the first part tells that they are not.
fn all_zero<T: Copy, B>(values: &[T], magnitude: fn(T) -> B) -> bool
where
    B: Default + PartialEq + BitOr<Output = B>,
{
    let bits_of = |part: &[T]| {
        let all = part.iter().map(|value| magnitude(*value));
        all.fold(B::default(), |bits, own| bits | own)
    };
    values
        .chunks(PART_VALUES)
        .all(|part| bits_of(part) == B::default())
}

/// The largest magnitude. A plain fold: that is what compilers vectorise.
fn largest<T: Copy, B: Default + Ord>(values: &[T], magnitude: impl Fn(T) -> B) -> B {
    let all = values.iter().map(|value| magnitude(*value));
    all.fold(B::default(), B::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_of_one_block_outweighs_infinity_of_the_next() {
        let bytes = [0, 0, 0xc0, 0x7f, 0, 0, 0x80, 0xff];
        let block = |begin| Block {
            begin,
            slot_bytes: 4,
            dtype: Dtype::F32,
        };
        for blocks in [[block(0), block(4)], [block(4), block(0)]] {
            let factors = Factors::new(&bytes, &blocks, 1).expect("in bounds");
            assert!(factors.peak().is_nan());
        }
        let infinite = Factors::new(&bytes, &[block(4), block(4)], 1).expect("in bounds");
        assert_eq!(
            infinite.peak().total_cmp(&f64::INFINITY),
            std::cmp::Ordering::Equal
        );
    }
}
