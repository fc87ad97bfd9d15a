//! A header as tools write it, read in one pass.
//!
//! This only ever says yes: what is unusual or wrong in any way is left to the careful reading,
//! which takes the text apart level by level, and says what is wrong.

use std::borrow::Cow;

use super::tensor::{Data, Fields, MAX_NAME_BYTES, MAX_RANK};
use super::{MAX_TENSORS, METADATA, TensorInfo};
use crate::dtype::Dtype;

/// Bytes of a tensor's entry as trainers' names make it: a guess for how many tensors there are.
const ENTRY_BYTES: usize = 128;

/// The tensors and the metadata of a header, names not compared with each other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) metadata: Option<Vec<(String, String)>>,
}

/// Reads the whole text; nothing where the careful reading has to judge.
pub(super) fn read(text: &str, data: Data) -> Option<Plain> {
    let mut scanner = Scanner { text, at: 0 };
    let likely = (text.len() / ENTRY_BYTES).min(MAX_TENSORS);
    let mut plain = Plain {
        tensors: Vec::with_capacity(likely),
        metadata: None,
    };
    scanner.members(|scanner, name| {
        if name == METADATA {
            let metadata = scanner.metadata()?;
            return plain.metadata.replace(metadata).is_none().then_some(());
        }
        let fields = scanner.fields()?;
        if name.len() > MAX_NAME_BYTES || plain.tensors.len() >= MAX_TENSORS {
            return None;
        }
        let tensor = TensorInfo::checked(name.into_owned(), fields, data).ok()?;
        plain.tensors.push(tensor);
        Some(())
    })?;
    scanner.skip_space();
    (scanner.at == text.len()).then_some(plain)
}

/// A place in JSON text.
struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn step(&mut self) {
        self.at = self.at.saturating_add(1);
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.step();
        }
    }

    /// Takes the next byte that is no space, if it is this one.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let is_next = self.peek() == Some(byte);
        if is_next {
            self.step();
        }
        is_next
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    /// An object; `member` is given each name, and reads the value.
    fn members(
        &mut self,
        mut member: impl FnMut(&mut Self, Cow<'t, str>) -> Option<()>,
    ) -> Option<()> {
        self.expect(b'{')?;
        if self.take(b'}') {
            return Some(());
        }
        loop {
            let name = self.string()?;
            self.expect(b':')?;
            member(self, name)?;
            if !self.take(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// A tensor's entry, which has the three fields that every tool writes.
    fn fields(&mut self) -> Option<Fields> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        self.members(|scanner, name| {
            let is_first = match name.as_ref() {
                "dtype" => dtype.replace(Dtype::parse(&scanner.string()?)?).is_none(),
                "shape" => {
                    let sides = scanner.counts::<MAX_RANK>()?;
                    shape.replace(sides.as_slice().into()).is_none()
                }
                "data_offsets" => offsets.replace(scanner.counts::<2>()?).is_none(),
                _ => false,
            };
            is_first.then_some(())
        })?;
        let offsets = offsets?;
        let &[begin, end] = offsets.as_slice() else {
            return None;
        };
        Some(Fields {
            dtype: dtype?,
            shape: shape?,
            begin,
            end,
        })
    }

    /// The entries of `__metadata__`, in order.
    fn metadata(&mut self) -> Option<Vec<(String, String)>> {
        let mut entries = Vec::new();
        self.members(|scanner, key| {
            let value = scanner.string()?;
            entries.push((key.into_owned(), value.into_owned()));
            (entries.len() <= MAX_TENSORS).then_some(())
        })?;
        Some(entries)
    }

    fn string(&mut self) -> Option<Cow<'t, str>> {
        self.expect(b'"')?;
        let rest = self.text.get(self.at..)?;
        let plain = rest.get(..plain_bytes(rest.as_bytes()))?;
        self.at = self.at.saturating_add(plain.len());
        match self.peek()? {
            b'"' => {
                self.step();
                Some(Cow::Borrowed(plain))
            }
            b'\\' => self.escaped(plain).map(Cow::Owned),
            _ => None,
        }
    }

    /// The string that begins with `plain`, which an escape follows.
    fn escaped(&mut self, plain: &str) -> Option<String> {
        let begin = self.at.checked_sub(plain.len())?.checked_sub(1)?;
        loop {
            match self.peek()? {
                b'"' => break,
                b'\\' => self.step(),
                _ => {}
            }
            self.step();
        }
        self.step();
        serde_json::from_str(self.text.get(begin..self.at)?).ok()
    }

    /// An array of at most `MAX` counts.
    fn counts<const MAX: usize>(&mut self) -> Option<Counts<MAX>> {
        let mut counts = Counts {
            values: [0; MAX],
            len: 0,
        };
        self.expect(b'[')?;
        if self.take(b']') {
            return Some(counts);
        }
        loop {
            *counts.values.get_mut(counts.len)? = self.count()?;
            counts.len = counts.len.saturating_add(1);
            if !self.take(b',') {
                return self.expect(b']').map(|()| counts);
            }
        }
    }

    /// A number without sign, fraction and exponent.
    fn count(&mut self) -> Option<u64> {
        self.skip_space();
        let begin = self.at;
        let mut count = 0_u64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            let digit = u64::from(digit.saturating_sub(b'0'));
            count = count.checked_mul(10)?.checked_add(digit)?;
            self.step();
        }
        let digits = self.at.saturating_sub(begin);
        let is_padded = digits > 1 && self.text.as_bytes().get(begin) == Some(&b'0');
        (digits > 0 && !is_padded).then_some(count)
    }
}

/// How many bytes stand before the first that does not stand for itself in a string: a quote, a
/// backslash or a control character.
fn plain_bytes(text: &[u8]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);
    let (words, _) = text.as_chunks::<8>();
    // Eight at a time; above the first byte that is meant, a borrow may mark others.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES.wrapping_mul(limit)) & !word;
    let equal = |word: u64, byte: u8| below(word ^ ONES.wrapping_mul(byte.into()), 1);
    let marks = words.iter().map(|word| {
        let word = u64::from_le_bytes(*word);
        (below(word, 0x20) | equal(word, b'"') | equal(word, b'\\')) & HIGHS
    });
    let mut at = 0_usize;
    for marks in marks {
        if marks != 0 {
            let bits = usize::try_from(marks.trailing_zeros()).unwrap_or_default();
            return at.saturating_add(bits / 8);
        }
        at = at.saturating_add(8);
    }
    let rest = text.get(at..).unwrap_or_default();
    let special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
    at.saturating_add(rest.iter().position(special).unwrap_or(rest.len()))
}

/// At most `MAX` counts.
struct Counts<const MAX: usize> {
    values: [u64; MAX],
    len: usize,
}

impl<const MAX: usize> Counts<MAX> {
    fn as_slice(&self) -> &[u64] {
        self.values.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::super::{Header, HeaderError, repeats};
    use super::*;

    const DATA: Data = Data {
        start_bytes: 100,
        len_bytes: 8,
    };
    const WRITTEN: &str = r#"{"__metadata__":{"a":"b","c":"\"\u00e9"},
        "a": {"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},
        "b":{"dtype":"U8","shape":[],"data_offsets":[7,8]}}"#;
    const ALPHABET: &[char] = &[
        '"', '\\', '{', '}', '[', ']', ':', ',', ' ', '\n', '\t', '\u{1}', '\u{a0}', 'a', 'b', 'u',
        'n', 'é', '0', '1', '7', '8', '-', '+', '.', 'e', 't', '/',
    ];

    #[test]
    fn what_tools_write_is_read_as_the_careful_reading_reads_it() {
        for text in [
            "{}",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            r#"{ "\u0061" : {"data_offsets":[0,8],"shape":[],"dtype":"F\u00364"} }  "#,
            r#"{"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},
                "__metadata__" :{"format":"pt","n":"\n","q":"{\"\\\u00e9é\ud83d\ude00\"}","":""},
                "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
        ] {
            let plain = read(text, DATA).expect("plain");
            let careful = Header::parse(text, DATA).expect("well-formed");
            let metadata = plain.metadata.unwrap_or_default();
            assert_eq!((plain.tensors, metadata), careful, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn whatever_is_read_the_careful_reading_reads_alike(
            changes in vec((any::<Index>(), 0..3, select(ALPHABET)), 0..4),
        ) {
            let mut text: Vec<char> = WRITTEN.chars().collect();
            for (place, kind, character) in changes {
                let at = place.index(text.len());
                match kind {
                    0 => text.insert(at, character),
                    1 => drop(text.remove(at)),
                    _ => drop(text.splice(at..=at, [character])),
                }
            }
            let text: String = text.into_iter().collect();
            let careful = Header::parse(&text, DATA);
            if let Some(plain) = read(&text, DATA) {
                let twice = repeats(&plain.tensors, TensorInfo::name);
                prop_assert_eq!(twice, matches!(careful, Err(HeaderError::DuplicateTensor { .. })));
                let metadata = plain.metadata.unwrap_or_default();
                if !twice && !repeats(&metadata, |(key, _)| key) {
                    prop_assert_eq!((plain.tensors, metadata), careful.unwrap());
                }
            }
        }
    }

    #[test]
    fn every_special_byte_ends_what_is_plain() {
        for len in 0..40 {
            for place in 0..=len {
                for byte in 0..=u8::MAX {
                    // Neighbours of the special bytes, and those whose borrow could hide one.
                    let around = [b'!', b'#', b'[', b']', 0x20, 0x7f, 0x80, 0xff];
                    let mut text: Vec<u8> = around.into_iter().cycle().take(len).collect();
                    if let Some(own) = text.get_mut(place) {
                        *own = byte;
                    }
                    let special = |byte: &u8| *byte < 0x20 || *byte == b'"' || *byte == b'\\';
                    let expected = text.iter().position(special).unwrap_or(len);
                    assert_eq!(plain_bytes(&text), expected, "{text:?}");
                }
            }
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
            r#""dtype":"F32","shape":[02],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[+2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[2 2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[2,],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[,2],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[2e0],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":["2"],"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":2,"data_offsets":[0,8]"#.to_owned(),
            r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]"#.to_owned(),
            format!("{good},"),
            format!(",{good}"),
            good.replace(':', ""),
            good.replacen(',', "", 1),
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
            r#"{"__metadata__":{"a":"b"#,
            r#"{"__metadata__":{"a":"\"#,
            r#"{"__metadata__":{"a":"\x"}}"#,
            r#"{"__metadata__":{"a":"\ud800"}}"#,
            "{\"__metadata__\":{\"a\":\"\n\"}}",
            r#"{"__metadata__":{'a':"b"}}"#,
            "",
            "{",
            "}",
            "{}{}",
            "\u{a0}{}",
            &long,
        ] {
            assert_eq!(read(text, DATA), None, "{text}");
        }
    }
}
