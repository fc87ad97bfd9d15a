//! A screen of labelled rows, as text: wrapped, escaped, and coloured at the very end.
//!
//! All text passes [`escape::line`] on its way out, wherever it came from.

use crate::color::Palette;
use crate::escape;

/// Columns of a screen.
const WIDTH: usize = 80;
/// Columns before the text of a row: the label's.
const LABEL_WIDTH: usize = 13;
/// Columns for the text of a row.
pub(crate) const TEXT_WIDTH: usize = WIDTH - LABEL_WIDTH;

/// Columns that a single word may stand out over the line.
const OVERHANG: usize = 10;

/// How a word stands out where there is colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Not at all.
    Plain,
    /// Stands back: labels.
    Faint,
    /// All is well.
    Good,
    /// Something is lost.
    Warning,
    /// Nothing is left.
    Bad,
}

impl Tone {
    pub(crate) fn sequence(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Faint => "\x1b[2m",
            Self::Good => "\x1b[1;32m",
            Self::Warning => "\x1b[1;33m",
            Self::Bad => "\x1b[1;31m",
        }
    }
}

/// One line: a label in its tone, then text.
#[derive(Debug)]
struct Line {
    tone: Tone,
    label: String,
    text: String,
}

/// Lines, in order.
#[derive(Debug, Default)]
pub(crate) struct Screen {
    lines: Vec<Line>,
}

impl Screen {
    /// The first line: a word, and the file's name, which stays whole so that it can be copied.
    pub(crate) fn headline(&mut self, tone: Tone, word: &str, name: &str) {
        self.push(tone, word, name);
    }

    /// An empty line.
    pub(crate) fn blank(&mut self) {
        self.push(Tone::Plain, "", "");
    }

    /// A labelled row; longer text goes on below itself.
    pub(crate) fn row(&mut self, tone: Tone, label: &str, text: &str) {
        let mut label = format!("  {label}");
        for line in wrap(text, TEXT_WIDTH) {
            self.push(tone, &std::mem::take(&mut label), &line);
        }
    }

    /// Text below a row.
    pub(crate) fn below(&mut self, text: &str) {
        for line in wrap(text, TEXT_WIDTH) {
            self.push(Tone::Plain, "", &line);
        }
    }

    /// One line of a long list, as wide as it is.
    pub(crate) fn item(&mut self, text: &str) {
        self.lines.push(Line {
            tone: Tone::Plain,
            label: String::new(),
            text: format!("  {}", escape::line(text)),
        });
    }

    fn push(&mut self, tone: Tone, label: &str, text: &str) {
        let label = if text.is_empty() {
            escape::line(label)
        } else {
            format!("{:LABEL_WIDTH$}", escape::line(label))
        };
        self.lines.push(Line {
            tone,
            label,
            text: escape::line(text),
        });
    }

    /// The whole as text, each line ended.
    pub(crate) fn paint(&self, palette: Palette) -> String {
        let mut out = String::new();
        for line in &self.lines {
            let word = line.label.trim_end();
            out.push_str(&palette.paint(line.tone, word));
            // The padding stays outside the colour, and away where nothing follows it.
            if !line.text.is_empty() {
                out.push_str(line.label.get(word.len()..).unwrap_or_default());
            }
            out.push_str(&line.text);
            out.push('\n');
        }
        out
    }
}

/// Breaks text at spaces. A word that is a little wider than the line stays whole, so that a key can
/// be copied; the middle of a monster goes.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut used = 0;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let word = escape::short(word, width + OVERHANG);
        let columns = escape::columns(&word);
        match lines.last_mut() {
            Some(line) if used + 1 + columns <= width => {
                line.push(' ');
                line.push_str(&word);
                used += 1 + columns;
            }
            _ => {
                lines.push(word);
                used = columns;
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_wraps_below_itself() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("unbreakable  a", 5), ["unbreakable", "a"]);
        assert_eq!(wrap("a-word-without-end", 5), ["a-word-…out-end"]);
        assert_eq!(wrap("", 5), [""; 0]);
    }

    #[test]
    fn colour_adds_sequences_and_nothing_else() {
        let mut screen = Screen::default();
        screen.headline(Tone::Good, "APPLY", "a\x1b[31m.safetensors");
        screen.row(Tone::Faint, "model", "Qwen-Image");
        let plain = screen.paint(Palette::Plain);
        assert_eq!(
            plain,
            "APPLY        a\\u{1b}[31m.safetensors\n  model      Qwen-Image\n"
        );
        let painted = screen.paint(Palette::Ansi);
        assert!(
            painted.starts_with("\x1b[1;32mAPPLY\x1b[0m        a\\u{1b}[31m"),
            "{painted:?}"
        );
        let mut stripped = painted;
        for sequence in ["\x1b[1;32m", "\x1b[2m", "\x1b[0m"] {
            stripped = stripped.replace(sequence, "");
        }
        assert_eq!(stripped, plain);
    }
}
