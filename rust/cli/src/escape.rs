//! Text from files, made fit for a terminal: it can neither drive it nor pose as our own lines.

use std::fmt::Write;

use qwenlora_core::header::is_deceptive;

/// `text` on one line: control, invisible and direction-changing characters are spelled out.
pub(crate) fn line(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if is_deceptive(character) {
            safe.extend(character.escape_unicode());
        } else {
            safe.push(character);
        }
    }
    safe
}

/// `text` as [`line`], at most `max_chars` long: the middle goes, since the end of a key says what
/// the tensor is.
pub(crate) fn short(text: &str, max_chars: usize) -> String {
    let safe = line(text);
    let count = safe.chars().count();
    if count <= max_chars {
        return safe;
    }
    let kept = max_chars.saturating_sub(1);
    let (head, tail) = (kept / 2, kept - kept / 2);
    let mut short: String = safe.chars().take(head).collect();
    short.push('…');
    short.extend(safe.chars().skip(count - tail));
    short
}

/// JSON text with the same meaning and nothing in it that a terminal obeys.
///
/// Such characters stand inside strings only, where `\u` means the same.
pub(crate) fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if is_deceptive(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(character);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_drives_the_terminal() {
        assert_eq!(
            line("a\x1b[2J\n\u{9b}b\u{202e}c"),
            r"a\u{1b}[2J\u{a}\u{9b}b\u{202e}c"
        );
        assert_eq!(line("größe 画像 `x`"), "größe 画像 `x`");
    }

    #[test]
    fn the_middle_goes() {
        assert_eq!(short("abcdefghij", 10), "abcdefghij");
        assert_eq!(short("abcdefghijk", 6), "ab…ijk");
        assert_eq!(short("\x1b\x1b", 9), r"\u{1…{1b}");
    }

    #[test]
    fn json_keeps_its_meaning() {
        let hostile = "\"\u{7f}\u{9b}\u{e0041}ü\"";
        let safe = json(hostile);
        assert_eq!(safe, r#""\u007f\u009b\udb40\udc41ü""#);
        let meaning = |text: &str| serde_json::from_str::<String>(text).unwrap();
        assert_eq!(meaning(&safe), meaning(hostile));
    }
}
