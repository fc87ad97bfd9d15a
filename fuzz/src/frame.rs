//! Mutations that keep a safetensors file in its frame.
//!
//! The first eight bytes say how long the text after them is, and the text says how long the data
//! after it is. A blind mutation breaks the frame nearly always, and what lies behind it is never
//! reached; these set it right again.

/// Most bytes of data that a text is given.
const MAX_DATA_BYTES: usize = 4096;

/// Which part a mutation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The file as it is, its frame included.
    Whole,
    /// The data after the header.
    Data,
    /// The header's text; the frame follows it.
    Text,
}

impl Part {
    fn of_seed(seed: u32) -> Self {
        match seed % 8 {
            0 => Self::Whole,
            1 => Self::Data,
            _ => Self::Text,
        }
    }
}

/// Mutates the file in `buffer[..len]` to one of at most `max_len` bytes; the new length. `mutate`
/// does the same to any bytes, of which there must be room for one.
pub fn mutate(
    buffer: &mut [u8],
    len: usize,
    max_len: usize,
    seed: u32,
    mutate: impl Fn(&mut [u8], usize, usize) -> usize,
) -> usize {
    let framed = split(&buffer[..len]).filter(|_| len <= max_len);
    let Some((text, data)) = framed else {
        return mutate(buffer, len, max_len);
    };
    let (mut text, mut data) = (text.to_vec(), data.to_vec());
    match Part::of_seed(seed) {
        Part::Data if !data.is_empty() => {
            let len = data.len();
            mutate(&mut data, len, len);
        }
        Part::Text if !text.is_empty() => {
            let room = max_len.saturating_sub(8 + MAX_DATA_BYTES).max(text.len());
            let len = text.len();
            text.resize(room, 0);
            let len = mutate(&mut text, len, room);
            text.truncate(len);
            if let Some(end) = last_offset(&text) {
                data.resize(end.min(MAX_DATA_BYTES), 0);
            }
        }
        Part::Whole | Part::Data | Part::Text => return mutate(buffer, len, max_len),
    }
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.extend(data);
    file.truncate(max_len);
    buffer[..file.len()].copy_from_slice(&file);
    file.len()
}

/// Text and data of a file whose frame holds.
fn split(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    let len = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    rest.split_at_checked(len)
}

/// The largest number that ends a pair of offsets.
fn last_offset(text: &[u8]) -> Option<usize> {
    let text = String::from_utf8_lossy(text);
    text.split("\"data_offsets\"")
        .skip(1)
        .filter_map(|rest| {
            let pair = rest.split_once('[')?.1.split_once(']')?.0;
            pair.split_once(',')?.1.trim().parse().ok()
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = br#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;

    fn file(text: &[u8], data: &[u8]) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text, data].concat()
    }

    #[test]
    fn a_longer_text_gets_its_length_and_its_data() {
        let start = file(TEXT, &[1, 2, 3]);
        let mut buffer = start.clone();
        buffer.resize(8192, 0);
        let grown = mutate(&mut buffer, start.len(), 8192, 2, |bytes, len, _| {
            let text = String::from_utf8_lossy(&bytes[..len]).replace("[3]", "[16]");
            let text = text.replace("[0,3]", "[0,16]");
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            text.len()
        });
        let text = String::from_utf8_lossy(TEXT)
            .replace("[3]", "[16]")
            .replace(",3]", ",16]");
        let data = [&[1, 2, 3][..], &[0; 13]].concat();
        assert_eq!(buffer[..grown], file(text.as_bytes(), &data));
    }

    #[test]
    fn what_has_no_frame_is_mutated_as_it_is() {
        let mut buffer = vec![255; 16];
        assert_eq!(mutate(&mut buffer, 9, 16, 2, |_, len, max| len + max), 25);
        // Nor is nothing: a file without data.
        let mut buffer = file(TEXT, &[]);
        let len = buffer.len();
        assert_eq!(mutate(&mut buffer, len, len, 1, |_, len, _| len), len);
    }
}
