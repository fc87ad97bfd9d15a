//! A header as tools write it, read in one pass.
//!
//! This only ever says yes: what is unusual or wrong in any way is left to the careful reading,
//! which takes the text apart level by level, and says what is wrong.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::tensor::{Data, Fields, MAX_NAME_BYTES, MAX_RANK};
use super::{MAX_TENSORS, METADATA, TensorInfo};
use crate::dtype::Dtype;

/// The tensors and the metadata of a header, names not compared with each other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) metadata: Option<Vec<(String, String)>>,
}

/// Reads the whole text; nothing where the careful reading has to judge.
pub(super) fn read(text: &str, data: Data) -> Option<Plain> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let plain = PlainVisitor(data).deserialize(&mut deserializer).ok()?;
    deserializer.end().ok()?;
    Some(plain)
}

/// Any fault: it is never told, the careful reading finds it again.
fn unusual<E: Error>() -> E {
    E::custom("unusual")
}

struct PlainVisitor(Data);

impl<'de> DeserializeSeed<'de> for PlainVisitor {
    type Value = Plain;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Plain, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for PlainVisitor {
    type Value = Plain;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Plain, A::Error> {
        let mut plain = Plain::default();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                let Metadata(metadata) = map.next_value()?;
                if plain.metadata.replace(metadata).is_some() {
                    return Err(unusual());
                }
                continue;
            }
            let fields = map.next_value::<Fields>()?;
            if name.len() > MAX_NAME_BYTES || plain.tensors.len() >= MAX_TENSORS {
                return Err(unusual());
            }
            let tensor = TensorInfo::checked(name, fields, self.0).map_err(|_| unusual())?;
            plain.tensors.push(tensor);
        }
        Ok(plain)
    }
}

/// The entries of `__metadata__`, in order.
struct Metadata(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MetadataVisitor)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            if entries.len() >= MAX_TENSORS {
                return Err(unusual());
            }
            entries.push(entry);
        }
        Ok(Metadata(entries))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<Field>()? {
            let is_repeated = match field {
                Field::Dtype => dtype.replace(map.next_value::<Name>()?.0).is_some(),
                Field::Shape => {
                    let Counts::<MAX_RANK>(sides) = map.next_value()?;
                    shape.replace(sides).is_some()
                }
                Field::Offsets => {
                    let Counts::<2>(ends) = map.next_value()?;
                    offsets.replace(ends).is_some()
                }
            };
            if is_repeated {
                return Err(unusual());
            }
        }
        let (Some(dtype), Some(shape), Some(offsets)) = (dtype, shape, offsets) else {
            return Err(unusual());
        };
        let [begin, end] = *offsets.as_slice() else {
            return Err(unusual());
        };
        Ok(Fields {
            dtype,
            shape: shape.into(),
            begin,
            end,
        })
    }
}

/// A field that every tool writes.
enum Field {
    Dtype,
    Shape,
    Offsets,
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Word(|name| match name {
            "dtype" => Some(Self::Dtype),
            "shape" => Some(Self::Shape),
            "data_offsets" => Some(Self::Offsets),
            _ => None,
        }))
    }
}

/// A dtype by its name.
struct Name(Dtype);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Word(|name| Dtype::parse(name).map(Self)))
    }
}

/// A string of few.
struct Word<T>(fn(&str) -> Option<T>);

impl<T> Visitor<'_> for Word<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a known word")
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<T, E> {
        self.0(word).ok_or_else(unusual)
    }
}

/// At most `MAX` counts.
struct Counts<const MAX: usize>(Vec<u64>);

impl<'de, const MAX: usize> Deserialize<'de> for Counts<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(CountsVisitor(PhantomData))
    }
}

struct CountsVisitor<const MAX: usize>(PhantomData<[(); MAX]>);

impl<'de, const MAX: usize> Visitor<'de> for CountsVisitor<MAX> {
    type Value = Counts<MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Counts<MAX>, A::Error> {
        let mut counts = Vec::with_capacity(2);
        while let Some(count) = seq.next_element()? {
            if counts.len() >= MAX {
                return Err(unusual());
            }
            counts.push(count);
        }
        Ok(Counts(counts))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Header;
    use super::*;

    const DATA: Data = Data {
        start_bytes: 100,
        len_bytes: 8,
    };

    #[test]
    fn what_tools_write_is_read_as_the_careful_reading_reads_it() {
        for text in [
            "{}",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            r#"{ "\u0061" : {"data_offsets":[0,8],"shape":[],"dtype":"F\u00364"} }  "#,
            r#"{"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},
                "__metadata__":{"format":"pt","n":"\n"},
                "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
        ] {
            let plain = read(text, DATA).expect("plain");
            let careful = Header::parse(text, DATA).expect("well-formed");
            let metadata = plain.metadata.unwrap_or_default();
            assert_eq!((plain.tensors, metadata), careful, "{text}");
        }
    }

    #[test]
    fn whatever_is_unusual_is_left_to_the_careful_reading() {
        let entry = |fields: &str| format!(r#"{{"a":{{{fields}}}}}"#);
        let good = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
        assert!(read(&entry(good), DATA).is_some());
        for fields in [
            r#""dtype":"f32","shape":[2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":1,"shape":[2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[2.0],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[-0],"data_offsets":[0,0]"#.to_owned(),
            r#""dtype":"F32","shape":[2],"data_offsets":[0,8,8]"#.to_owned(),
            r#""dtype":"F32","shape":[2],"data_offsets":[0]"#.to_owned(),
            r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#.to_owned(),
            r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#.to_owned(),
            r#""dtype":"F32","shape":[4],"data_offsets":[0,16]"#.to_owned(),
            r#""dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","data_offsets":[0,8]"#.to_owned(),
            format!(r#"{good},"shape":[2]"#),
            format!(r#"{good},"more":null"#),
        ] {
            assert_eq!(read(&entry(&fields), DATA), None, "{fields}");
        }
        let long = format!(r#"{{"{}":{{{good}}}}}"#, "x".repeat(MAX_NAME_BYTES + 1));
        for text in [
            "[]",
            "{} x",
            r#"{"a":[]}"#,
            r#"{"__metadata__":null}"#,
            r#"{"__metadata__":{"a":1}}"#,
            r#"{"__metadata__":{},"__metadata__":{}}"#,
            &long,
        ] {
            assert_eq!(read(text, DATA), None, "{text}");
        }
    }
}
