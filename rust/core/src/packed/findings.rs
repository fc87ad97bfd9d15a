//! Findings on the values of low-rank factors before they are packed: which modules share a `down`,
//! which slots have no delta, and how large the largest value is.
//!
//! Values are compared as bit patterns, so that all of it runs at the speed of memory.

use thiserror::Error;

use crate::dtype::Dtype;
use crate::packed::magnitude::Magnitudes;

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

/// Findings on the factors of some modules, slot by slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// For each module the index of the first one with an equal `down`; once where all slots share
    /// alike, else slot by slot.
    pub sharing: Vec<Vec<usize>>,
    /// Slots, ascending, in which each module has a `down` or an `up` that is all zero.
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
        let mut pairs = self.pairs.iter();
        pairs.all(|(down, up)| down.is_zero(slot) || up.is_zero(slot))
    }
}

/// One factor of one module: its values in all slots.
#[derive(Debug, Clone, Copy)]
struct Factor<'b> {
    bytes: &'b [u8],
    slot_bytes: usize,
    magnitudes: Magnitudes,
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
        let magnitudes = Magnitudes::of(dtype).ok_or(FindingsError::Dtype {
            block: index,
            dtype,
        })?;
        if !slot_bytes.is_multiple_of(magnitudes.value_bytes()) {
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
            magnitudes,
        })
    }

    fn slot(&self, slot: usize) -> &'b [u8] {
        // Of a checked block: neither product overflows.
        &self.bytes[slot * self.slot_bytes..][..self.slot_bytes]
    }

    /// Whether both hold the same bits; slices of other lengths end the comparison at once, as does
    /// the first difference.
    fn equals(&self, other: &Self, slot: usize) -> bool {
        self.magnitudes == other.magnitudes && self.slot(slot) == other.slot(slot)
    }

    /// Whether no value differs from zero, of either sign.
    fn is_zero(&self, slot: usize) -> bool {
        self.magnitudes.are_zero(self.slot(slot))
    }

    fn peak(&self) -> f64 {
        self.magnitudes.value(self.magnitudes.largest(self.bytes))
    }
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
