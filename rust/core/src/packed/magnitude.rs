//! The largest magnitude among values, found in their bit patterns.
//!
//! Without its sign, a pattern is an integer, and the order of integers is that of magnitudes, NaN
//! above infinity: so all of it runs at the speed of memory.

use std::ops::BitOr;

use crate::dtype::Dtype;
use crate::dtype::scalar;
use crate::packed::ElementSize;

/// Values of a part, after which it is asked whether the answer is known.
const PART_VALUES: usize = 32;

/// Floats whose magnitudes are compared: `F16`, `BF16` or `F32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Magnitudes {
    dtype: Dtype,
    size: ElementSize,
}

impl Magnitudes {
    /// Magnitudes of a type; none where it is another.
    pub fn of(dtype: Dtype) -> Option<Self> {
        let size = match dtype {
            Dtype::F16 | Dtype::BF16 => ElementSize::Two,
            Dtype::F32 => ElementSize::Four,
            _ => return None,
        };
        Some(Self { dtype, size })
    }

    /// The type of the values.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Bytes of a value.
    pub fn value_bytes(self) -> usize {
        self.size.bytes()
    }

    /// The pattern of the largest magnitude; that of zero where there are no values.
    ///
    /// The largest pattern of several places is that of all of them. Bytes at the end that are no
    /// whole value are not looked at.
    pub(crate) fn largest(self, bytes: &[u8]) -> Pattern {
        Pattern(match self.size {
            ElementSize::Two => largest(bytes.as_chunks::<2>().0, magnitude_16)
                .unsigned_abs()
                .into(),
            ElementSize::Four => largest(bytes.as_chunks::<4>().0, magnitude_32).unsigned_abs(),
        })
    }

    /// Whether no value differs from zero, of either sign.
    pub(crate) fn are_zero(self, bytes: &[u8]) -> bool {
        match self.size {
            ElementSize::Two => all_zero(bytes.as_chunks::<2>().0, magnitude_16),
            ElementSize::Four => all_zero(bytes.as_chunks::<4>().0, magnitude_32),
        }
    }

    /// The magnitude that a pattern stands for.
    pub(crate) fn value(self, Pattern(bits): Pattern) -> f64 {
        let bytes = bits.to_le_bytes();
        let own = bytes.get(..self.value_bytes());
        // A type of this kind is one of real numbers.
        own.and_then(|own| scalar::decode(self.dtype, own))
            .unwrap_or(f64::NAN)
    }
}

/// A magnitude of some type as an integer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pattern(pub(crate) u32);

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
