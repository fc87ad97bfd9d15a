//! JSON as a header needs it: checked as a whole, then taken apart level by level in file order.
//!
//! [`check`] parses everything once, as strictly as the safetensors crate does. [`members`] and
//! [`items`] then look at one level, and leave what lies below as raw text, so that the caller
//! judges each value knowing whose it is. They keep no more entries than asked for, but count all:
//! a small file cannot claim much memory.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::value::RawValue;

/// One level of an object: its members in file order, equal names kept.
#[derive(Debug)]
pub(super) struct Members<'a> {
    /// The first members, at most as many as were asked for.
    pub(super) kept: Vec<(String, &'a str)>,
    /// How many there are.
    pub(super) count: usize,
}

/// One level of an array.
#[derive(Debug)]
pub(super) struct Items<'a> {
    /// The first items, at most as many as were asked for.
    pub(super) kept: Vec<&'a str>,
    /// How many there are.
    pub(super) count: usize,
}

/// Checks that `text` is one JSON value: escapes, number ranges, depth, nothing after it.
pub(super) fn check(text: &str) -> serde_json::Result<()> {
    serde_json::from_str::<Checked>(text).map(|Checked| ())
}

/// The members of the object `text`; nothing when it is no object.
pub(super) fn members(text: &str, max: usize) -> Option<Members<'_>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Level::<Members<'_>>::keep(max)
        .deserialize(&mut deserializer)
        .ok()
}

/// The items of the array `text`; nothing when it is no array.
pub(super) fn items(text: &str, max: usize) -> Option<Items<'_>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Level::<Items<'_>>::keep(max)
        .deserialize(&mut deserializer)
        .ok()
}

/// The string `text`, decoded; nothing when it is no string.
pub(super) fn string(text: &str) -> Option<String> {
    serde_json::from_str(text).ok()
}

/// Visits one level and keeps at most `max` of its entries.
struct Level<T> {
    max: usize,
    result: PhantomData<T>,
}

impl<T> Level<T> {
    fn keep(max: usize) -> Self {
        Self {
            max,
            result: PhantomData,
        }
    }
}

impl<'de> DeserializeSeed<'de> for Level<Members<'de>> {
    type Value = Members<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Level<Members<'de>> {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Members {
            kept: Vec::new(),
            count: 0,
        };
        while members.kept.len() < self.max {
            let Some((name, value)) = map.next_entry::<String, &RawValue>()? else {
                members.count = members.kept.len();
                return Ok(members);
            };
            members.kept.push((name, value.get()));
        }
        members.count = members.kept.len();
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            members.count = members.count.saturating_add(1);
        }
        Ok(members)
    }
}

impl<'de> DeserializeSeed<'de> for Level<Items<'de>> {
    type Value = Items<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Level<Items<'de>> {
    type Value = Items<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Items {
            kept: Vec::new(),
            count: 0,
        };
        while items.kept.len() < self.max {
            let Some(item) = seq.next_element::<&RawValue>()? else {
                items.count = items.kept.len();
                return Ok(items);
            };
            items.kept.push(item.get());
        }
        items.count = items.kept.len();
        while seq.next_element::<IgnoredAny>()?.is_some() {
            items.count = items.count.saturating_add(1);
        }
        Ok(items)
    }
}

/// Any JSON value, decoded and dropped.
///
/// `IgnoredAny` and `RawValue` skip without decoding: lone surrogates, numbers out of range and
/// any depth pass them, which the safetensors crate refuses.
struct Checked;

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CheckedVisitor)
    }
}

struct CheckedVisitor;

impl<'de> Visitor<'de> for CheckedVisitor {
    type Value = Checked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_str<E>(self, _: &str) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Checked, A::Error> {
        while seq.next_element::<Checked>()?.is_some() {}
        Ok(Checked)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Checked, A::Error> {
        while map.next_entry::<Checked, Checked>()?.is_some() {}
        Ok(Checked)
    }
}
