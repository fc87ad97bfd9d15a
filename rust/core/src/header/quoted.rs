//! Text from a file, made fit for a message: whatever it holds, it stays one short line.

use std::fmt;
use std::path::Path;

/// Longer texts show this many characters of their beginning …
const HEAD_CHARS: usize = 56;
/// … and this many of their end, where tensor names carry their role.
const TAIL_CHARS: usize = 32;

/// Foreign text for use in a message: escaped, shortened, in backticks.
///
/// Control characters, invisible and direction-changing characters and backticks are escaped, so
/// that a hostile name can neither drive a terminal nor pose as part of the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quoted(Box<str>);

impl Quoted {
    /// Quotes `text`; past about 90 characters its middle is left out and its length told.
    pub fn new(text: &str) -> Self {
        let short = HEAD_CHARS.saturating_add(TAIL_CHARS);
        if text.chars().nth(short).is_none() {
            return Self(format!("`{}`", escape(text)).into());
        }
        let head: String = text.chars().take(HEAD_CHARS).collect();
        let mut tail: Vec<char> = text.chars().rev().take(TAIL_CHARS).collect();
        tail.reverse();
        let tail: String = tail.into_iter().collect();
        let len_bytes = text.len();
        Self(format!("`{}…{}` ({len_bytes} bytes)", escape(&head), escape(&tail)).into())
    }

    /// Quotes a path at full length.
    pub fn path(path: &Path) -> Self {
        Self(format!("`{}`", escape(&path.to_string_lossy())).into())
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character == '`' || is_deceptive(character) {
            escaped.extend(character.escape_unicode());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Whether a reader would not see the character as what it is: control, invisible and
/// direction-changing characters.
pub fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}
