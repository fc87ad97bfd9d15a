//! Text from files, made fit for a terminal: it can neither drive it nor pose as our own lines.

use std::fmt::Write;

use qwenlora_core::header::is_deceptive;
use unicode_width::UnicodeWidthChar;

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

/// Columns that text takes up on a terminal: wide characters take two, combining ones none.
pub(crate) fn columns(text: &str) -> usize {
    text.chars().map(width).sum()
}

fn width(character: char) -> usize {
    character.width().unwrap_or(0)
}

/// `text` as [`line`], at most `max_columns` wide: the middle goes, since the end of a key says
/// what the tensor is.
pub(crate) fn short(text: &str, max_columns: usize) -> String {
    let safe = line(text);
    if columns(&safe) <= max_columns {
        return safe;
    }
    let kept = max_columns.saturating_sub(1);
    let head = prefix(&safe, kept / 2);
    let tail = suffix(&safe, kept - columns(head));
    format!("{head}…{tail}")
}

/// `text` as [`line`], at most `max_columns` wide: the end goes.
pub(crate) fn start(text: &str, max_columns: usize) -> String {
    let safe = line(text);
    if columns(&safe) <= max_columns {
        return safe;
    }
    let head = prefix(&safe, max_columns.saturating_sub(1));
    format!("{}…", head.trim_end_matches([' ', ',', ':']))
}

/// The longest start of `text` in so many columns, with all that combines with its last character.
fn prefix(text: &str, max_columns: usize) -> &str {
    let mut used = 0;
    let end = text.char_indices().find(|(_, character)| {
        used += width(*character);
        used > max_columns
    });
    end.map_or(text, |(at, _)| text.get(..at).unwrap_or_default())
}

/// The longest end of `text` in so many columns; it begins with no combining character.
fn suffix(text: &str, max_columns: usize) -> &str {
    let mut used = 0;
    let mut start = text.len();
    for (at, character) in text.char_indices().rev() {
        used += width(character);
        if used > max_columns {
            break;
        }
        if width(character) > 0 {
            start = at;
        }
    }
    text.get(start..).unwrap_or_default()
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
    fn wide_and_combining_characters_are_measured_in_columns() {
        assert_eq!(columns("画像 a\u{308}"), 6);
        // Half of a wide character cannot be shown.
        assert_eq!(short("画像画像画像", 8), "画…画像");
        assert_eq!(short("画像画像", 8), "画像画像");
        assert_eq!(short("abc\u{301}d\u{308}efg\u{308}", 5), "ab…fg\u{308}");
        for width in 0..12 {
            for text in [
                "画像画像画像",
                "e\u{301}e\u{301}e\u{301}e\u{301}",
                "a\x1bb画c\u{202e}d",
            ] {
                assert!(
                    columns(&short(text, width)) <= width.max(1),
                    "{text} {width}"
                );
                assert!(
                    columns(&start(text, width)) <= width.max(1),
                    "{text} {width}"
                );
            }
        }
    }

    #[test]
    fn the_end_goes() {
        assert_eq!(start("text encoder", 12), "text encoder");
        assert_eq!(start("text encoder", 6), "text…");
        assert_eq!(start("画像画像", 6), "画像…");
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
