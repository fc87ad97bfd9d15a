//! What is found in factors against a slow search value by value, and every fault of a block.

use std::cmp::Ordering;

use insta::assert_snapshot;
use proptest::prelude::*;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::packed::findings::{Block, Factors};

/// The values of one slot's factor as f64, decoded from their definition.
fn values(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("4")).into())
            .collect(),
        Dtype::BF16 => bytes
            .chunks(2)
            .map(|b| f32::from_le_bytes([0, 0, b[0], b[1]]).into())
            .collect(),
        _ => bytes.chunks(2).map(|b| half([b[0], b[1]])).collect(),
    }
}

fn half(bytes: [u8; 2]) -> f64 {
    let bits = u16::from_le_bytes(bytes);
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    sign * match exponent {
        0 => mantissa * 2_f64.powi(-14),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + mantissa) * 2_f64.powi(exponent - 15),
    }
}

/// Contents of a slot's factor: mostly of few kinds, so that equals and zeros are common.
#[derive(Debug, Clone, Copy)]
enum Content {
    Zeros,
    NegativeZeros,
    Late(u8),
    Any(u8),
    Extreme(u8),
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        3 => Just(Content::Zeros),
        1 => Just(Content::NegativeZeros),
        2 => (0..2_u8).prop_map(Content::Late),
        4 => (0..3_u8).prop_map(Content::Any),
        1 => (0..4_u8).prop_map(Content::Extreme),
    ]
}

fn filled(content: Content, len: usize, dtype: Dtype) -> Vec<u8> {
    let width = if dtype == Dtype::F32 { 4 } else { 2 };
    let mut bytes = vec![0_u8; len];
    match content {
        Content::Zeros => {}
        Content::NegativeZeros => {
            for value in bytes.chunks_mut(width) {
                value[width - 1] = 0x80;
            }
        }
        Content::Late(seed) => {
            if let Some(last) = bytes.last_mut() {
                *last = 0x30 + seed;
            }
        }
        Content::Any(seed) => {
            for (byte, at) in bytes.iter_mut().zip(1_usize..) {
                *byte = u8::try_from((at * 37 + usize::from(seed) * 91) % 120).expect("a byte");
            }
        }
        Content::Extreme(kind) => {
            let top: [u8; 2] = match (kind, dtype) {
                (0, Dtype::F16) => [0x00, 0x7c],
                (1, Dtype::F16) => [0x00, 0xfc],
                (2, Dtype::F16) => [0x01, 0xfc],
                (0, _) => [0x80, 0x7f],
                (1, _) => [0x80, 0xff],
                (2, _) => [0xc0, 0xff],
                _ => [0xff, 0xfb],
            };
            let middle = len / width / 2 * width;
            if let Some(value) = bytes.get_mut(middle..middle + width) {
                value[width - 2..].copy_from_slice(&top);
            }
        }
    }
    bytes
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F16, Dtype::BF16, Dtype::F32])
}

/// (type, values of a slot of its down, and of its up, contents of these slot by slot).
type Member = (Dtype, usize, usize, Vec<(Content, Content)>);

fn members(slots: usize) -> impl Strategy<Value = Vec<Member>> {
    let size = || prop::sample::select(vec![0_usize, 1, 31, 32, 33, 100]);
    let contents = prop::collection::vec((content(), content()), slots);
    prop::collection::vec((dtype(), size(), size(), contents), 1..5)
}

proptest! {
    #[test]
    fn findings_equal_a_search_value_by_value(
        (slots, members) in (0..5_usize).prop_flat_map(|slots| (Just(slots), members(slots))),
        gap in 0..70_usize,
    ) {
        let (mut buffer, mut blocks, mut parts) = (vec![0xff_u8; 3], Vec::new(), Vec::new());
        for (dtype, down, up, contents) in &members {
            let width = if *dtype == Dtype::F32 { 4 } else { 2 };
            let downs: Vec<Vec<u8>> =
                contents.iter().map(|c| filled(c.0, down * width, *dtype)).collect();
            let ups: Vec<Vec<u8>> =
                contents.iter().map(|c| filled(c.1, up * width, *dtype)).collect();
            for (own, count) in [(&downs, down), (&ups, up)] {
                let (begin, slot_bytes) = (buffer.len(), count * width);
                blocks.push(Block { begin, slot_bytes, dtype: *dtype });
                buffer.extend(own.concat());
                // A gap holds NaN, which must not be seen.
                buffer.extend(vec![0xff; gap]);
            }
            parts.push((*dtype, downs, ups));
        }
        let factors = Factors::new(&buffer, &blocks, slots).expect("in bounds");
        let found = factors.look();

        let sharing: Vec<Vec<usize>> = (0..slots).map(|slot| {
            (0..parts.len()).map(|later| {
                let (dtype, downs, _) = &parts[later];
                (0..later)
                    .find(|&e| parts[e].0 == *dtype && parts[e].1[slot] == downs[slot])
                    .unwrap_or(later)
            }).collect()
        }).collect();
        let told = |slot: usize| found.sharing.get(slot).or(found.sharing.first()).expect("one");
        prop_assert!([slots.min(1), slots].contains(&found.sharing.len()));
        for (slot, own) in sharing.iter().enumerate() {
            prop_assert_eq!(told(slot), own);
        }
        let is_zero = |bytes: &Vec<u8>, dtype| values(bytes, dtype).iter().all(|v| *v == 0.0);
        let zero: Vec<usize> = (0..slots).filter(|&slot| {
            parts.iter().all(|(dtype, downs, ups)| {
                is_zero(&downs[slot], *dtype) || is_zero(&ups[slot], *dtype)
            })
        }).collect();
        prop_assert_eq!(found.zero, zero);
        let all: Vec<f64> = parts.iter().flat_map(|(dtype, downs, ups)| {
            let both = downs.iter().chain(ups);
            both.flat_map(|bytes| values(bytes, *dtype)).collect::<Vec<_>>()
        }).collect();
        let peak = if all.iter().any(|v| v.is_nan()) {
            f64::NAN
        } else {
            all.iter().fold(0.0, |a: f64, b| a.max(b.abs()))
        };
        let got = factors.peak();
        prop_assert!(got.total_cmp(&peak) == Ordering::Equal || got.is_nan() && peak.is_nan(),
            "{} is not {}", got, peak);
    }
}

#[test]
fn every_fault_names_its_block() {
    let buffer = [0; 64];
    let fault = |blocks: &[(usize, usize, Dtype)], slots| {
        let of = |&(begin, slot_bytes, dtype)| Block {
            begin,
            slot_bytes,
            dtype,
        };
        let blocks: Vec<Block> = blocks.iter().map(of).collect();
        Factors::new(&buffer, &blocks, slots)
            .expect_err("a fault")
            .to_string()
    };
    let good = (0, 8, Dtype::BF16);
    assert_snapshot!(fault(&[good], 1), @"blocks come in pairs of down and up, got 1");
    assert_snapshot!(fault(&[good, (0, 8, Dtype::F8E4M3)], 1), @"block 1 holds F8_E4M3: only F16, BF16 and F32 are looked at");
    assert_snapshot!(fault(&[good, (0, 6, Dtype::F32)], 1), @"block 1 has 6 bytes per slot, which are no whole values of F32");
    assert_snapshot!(fault(&[good, (50, 8, Dtype::F32)], 2), @"block 1 begins at byte 50 and has 2 slots of 8 bytes, beyond the buffer of 64");
    assert_snapshot!(fault(&[good, (0, usize::MAX - 1, Dtype::F16)], 2), @"block 1 begins at byte 0 and has 2 slots of 18446744073709551614 bytes, beyond the buffer of 64");
    assert_snapshot!(fault(&[good, (usize::MAX, 8, Dtype::F16)], 1), @"block 1 begins at byte 18446744073709551615 and has 1 slots of 8 bytes, beyond the buffer of 64");
    assert!(Factors::new(&buffer, &[], 3).is_ok());
}
