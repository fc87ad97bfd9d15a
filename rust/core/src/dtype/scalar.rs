//! One element's bytes as the number they stand for.

use crate::dtype::Dtype;

/// Decodes one little-endian element; nothing when its type is no real number.
#[expect(
    clippy::cast_precision_loss,
    reason = "64-bit integers are rounded, as documented"
)]
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<f64> {
    let value = match dtype {
        Dtype::Bool => f64::from(u8::from(u8::from_le_bytes(exactly(bytes)?) != 0)),
        Dtype::U8 => u8::from_le_bytes(exactly(bytes)?).into(),
        Dtype::I8 => i8::from_le_bytes(exactly(bytes)?).into(),
        Dtype::U16 => u16::from_le_bytes(exactly(bytes)?).into(),
        Dtype::I16 => i16::from_le_bytes(exactly(bytes)?).into(),
        Dtype::U32 => u32::from_le_bytes(exactly(bytes)?).into(),
        Dtype::I32 => i32::from_le_bytes(exactly(bytes)?).into(),
        Dtype::U64 => u64::from_le_bytes(exactly(bytes)?) as f64,
        Dtype::I64 => i64::from_le_bytes(exactly(bytes)?) as f64,
        Dtype::F32 => f32::from_le_bytes(exactly(bytes)?).into(),
        Dtype::F64 => f64::from_le_bytes(exactly(bytes)?),
        Dtype::BF16 => f32::from_bits(u32::from(u16::from_le_bytes(exactly(bytes)?)) << 16).into(),
        Dtype::F16 => F16.decode(u16::from_le_bytes(exactly(bytes)?)),
        Dtype::F8E5M2 => F8_E5M2.decode(u8::from_le_bytes(exactly(bytes)?).into()),
        Dtype::F8E4M3 => F8_E4M3.decode(u8::from_le_bytes(exactly(bytes)?).into()),
        Dtype::F8E5M2Fnuz => F8_E5M2_FNUZ.decode(u8::from_le_bytes(exactly(bytes)?).into()),
        Dtype::F8E4M3Fnuz => F8_E4M3_FNUZ.decode(u8::from_le_bytes(exactly(bytes)?).into()),
        Dtype::F8E8M0 => match u8::from_le_bytes(exactly(bytes)?) {
            u8::MAX => f64::NAN,
            exponent => 2_f64.powi(i32::from(exponent) - 127),
        },
        // A single element of these does not fill whole bytes, or is no real number.
        Dtype::F4 | Dtype::F6E2M3 | Dtype::F6E3M2 | Dtype::C64 => return None,
    };
    Some(value)
}

fn exactly<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

/// The meaning of a small float's topmost bit patterns.
#[derive(Debug, Clone, Copy)]
enum Specials {
    /// The highest exponent holds infinity and NaN, as in IEEE 754.
    InfinityAndNan,
    /// Only the pattern of ones is NaN, of either sign; there is no infinity.
    NanOnly,
    /// Only the pattern of negative zero is NaN; there is no infinity.
    NanIsNegativeZero,
}

/// A float of up to 16 bits: sign, exponent, mantissa.
#[derive(Debug, Clone, Copy)]
struct SmallFloat {
    exponent_bits: u32,
    mantissa_bits: u32,
    exponent_bias: i32,
    specials: Specials,
}

const F16: SmallFloat = SmallFloat {
    exponent_bits: 5,
    mantissa_bits: 10,
    exponent_bias: 15,
    specials: Specials::InfinityAndNan,
};
const F8_E5M2: SmallFloat = SmallFloat {
    mantissa_bits: 2,
    ..F16
};
const F8_E4M3: SmallFloat = SmallFloat {
    exponent_bits: 4,
    mantissa_bits: 3,
    exponent_bias: 7,
    specials: Specials::NanOnly,
};
const F8_E5M2_FNUZ: SmallFloat = SmallFloat {
    exponent_bias: 16,
    specials: Specials::NanIsNegativeZero,
    ..F8_E5M2
};
const F8_E4M3_FNUZ: SmallFloat = SmallFloat {
    exponent_bias: 8,
    specials: Specials::NanIsNegativeZero,
    ..F8_E4M3
};

impl SmallFloat {
    /// Exact: each such value has few significant bits and a small exponent.
    fn decode(self, bits: u16) -> f64 {
        let ones = |count: u32| (1_u16 << count) - 1;
        let mantissa = bits & ones(self.mantissa_bits);
        let exponent = (bits >> self.mantissa_bits) & ones(self.exponent_bits);
        let is_negative = bits >> (self.mantissa_bits + self.exponent_bits) != 0;
        let is_highest = exponent == ones(self.exponent_bits);
        let is_nan = match self.specials {
            Specials::InfinityAndNan => is_highest && mantissa != 0,
            Specials::NanOnly => is_highest && mantissa == ones(self.mantissa_bits),
            Specials::NanIsNegativeZero => is_negative && exponent == 0 && mantissa == 0,
        };
        if is_nan {
            return f64::NAN;
        }
        let is_infinite = is_highest && matches!(self.specials, Specials::InfinityAndNan);
        // Subnormals have no implied one, but the exponent of the smallest normal numbers.
        let implied_one = u16::from(exponent != 0) << self.mantissa_bits;
        let scale =
            i32::from(exponent.max(1)) - self.exponent_bias - self.mantissa_bits.cast_signed();
        let magnitude = if is_infinite {
            f64::INFINITY
        } else {
            f64::from(implied_one | mantissa) * 2_f64.powi(scale)
        };
        if is_negative { -magnitude } else { magnitude }
    }
}
