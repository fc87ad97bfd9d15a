//! Patterns over module paths, each with its value, as PEFT writes them.

use regex_lite::{Regex, RegexBuilder};

use super::ConfigError;
use super::needed::Needed;
use crate::header::Quoted;
use crate::key;
use crate::model;

/// Patterns beyond this many are not a trainer's work.
pub(super) const MAX_PATTERNS: usize = 4096;
/// Regular expressions beyond this many are not either: a model has as many modules.
pub(super) const MAX_EXPRESSIONS: usize = 1024;
/// Compiled size of one expression; of usual ones it is about 1 KiB.
const MAX_EXPRESSION_BYTES: usize = 128 * 1024;
/// Compiled sizes that are told apart: in steps as long as they are small, then by doubling.
const SIZE_STEP_BYTES: usize = 256;
const SMALL_BYTES: usize = 4096;
/// Length of one expression.
const MAX_TEXT_BYTES: usize = 16 * 1024;
/// Compiled size of a table's expressions in all: a bound of the memory, and of the time that
/// compiling takes.
const MAX_TABLE_BYTES: usize = 2 * 1024 * 1024;
/// Compiled size of expressions, times the paths of the known models on which each has to be tried:
/// a bound of the time that matching takes, four seconds at most.
const MAX_WORK_BYTES: usize = 160 * 1024 * 1024;

/// A table of patterns; the first that matches wins.
#[derive(Debug, Clone)]
pub(super) struct PatternTable<V>(Vec<(Pattern, V)>);

impl<V> Default for PatternTable<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V: Copy> PatternTable<V> {
    /// Builds the table of a field from its patterns, in order.
    pub(super) fn new(
        origin: &str,
        field: &'static str,
        rows: Vec<(String, V)>,
    ) -> Result<Self, ConfigError> {
        let count = rows.len();
        if count > MAX_PATTERNS {
            return Err(ConfigError::TooManyPatterns {
                origin: origin.to_owned(),
                field,
                count,
            });
        }
        let count = rows.iter().filter(|(text, _)| !is_plain(text)).count();
        if count > MAX_EXPRESSIONS {
            return Err(ConfigError::TooManyExpressions {
                origin: origin.to_owned(),
                field,
                count,
            });
        }
        let (mut size_bytes, mut work_bytes) = (0_usize, 0_usize);
        let mut table = Vec::with_capacity(rows.len());
        for (text, value) in rows {
            let pattern =
                Pattern::new(&key::unwrap_pattern(&text)).ok_or_else(|| ConfigError::Pattern {
                    origin: origin.to_owned(),
                    field,
                    pattern: Quoted::new(&text),
                })?;
            size_bytes = size_bytes.saturating_add(pattern.size_bytes());
            work_bytes = work_bytes.saturating_add(pattern.work_bytes());
            if size_bytes > MAX_TABLE_BYTES || work_bytes > MAX_WORK_BYTES {
                return Err(ConfigError::SlowExpressions {
                    origin: origin.to_owned(),
                    field,
                });
            }
            table.push((pattern, value));
        }
        Ok(Self(table))
    }

    /// The value of the first pattern that matches.
    pub(super) fn first_match(&self, path: &str) -> Option<V> {
        self.0
            .iter()
            .find(|(pattern, _)| pattern.matches(path))
            .map(|(_, value)| *value)
    }
}

/// A pattern of PEFT: `(.*\.)?({pattern})$` from the start of the path.
#[derive(Debug, Clone)]
enum Pattern {
    /// Compared without an expression, since files list one full path per module.
    Plain(Plain),
    /// Any other expression.
    Regex(Expression),
}

/// A regular expression.
#[derive(Debug, Clone)]
struct Expression {
    regex: Regex,
    /// The text that a path must have before it is worth a try.
    needed: Needed,
    /// A bound of its compiled size.
    size_bytes: usize,
}

impl Pattern {
    fn new(text: &str) -> Option<Self> {
        if let Some(plain) = Plain::new(text) {
            return Some(Self::Plain(plain));
        }
        if text.len() > MAX_TEXT_BYTES {
            return None;
        }
        // The size cannot be asked for: the least limit that suffices bounds it.
        let next = |bytes: &usize| match *bytes {
            SMALL_BYTES.. => Some(bytes * 2),
            _ => Some(bytes + SIZE_STEP_BYTES),
        };
        let limits = std::iter::successors(Some(SIZE_STEP_BYTES), next);
        let mut limits = limits.take_while(|bytes| *bytes <= MAX_EXPRESSION_BYTES);
        limits.find_map(|size_bytes| {
            let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"))
                .size_limit(size_bytes)
                .build()
                .ok()?;
            Some(Self::Regex(Expression {
                regex,
                needed: Needed::of(text),
                size_bytes,
            }))
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Regex(expression) => expression.matches(path),
            Self::Plain(plain) => plain.matches(path.as_bytes()),
        }
    }

    fn size_bytes(&self) -> usize {
        match self {
            Self::Regex(expression) => expression.size_bytes,
            Self::Plain(_) => 0,
        }
    }

    /// The work of matching it on every path of the known models.
    fn work_bytes(&self) -> usize {
        let Self::Regex(expression) = self else {
            return 0;
        };
        let paths = model::table().modules().iter();
        let tried = paths.filter(|module| expression.needed.is_in(&module.path));
        tried.count().saturating_mul(expression.size_bytes)
    }
}

impl Expression {
    fn matches(&self, path: &str) -> bool {
        self.needed.is_in(path) && self.regex.is_match(path)
    }
}

/// Whether a pattern is compared without an expression.
pub(super) fn is_plain(text: &str) -> bool {
    Plain::new(text).is_some()
}

/// Letters, digits, `_`, `\.` and `.` (any character) between an optional `^` and `$`.
#[derive(Debug, Clone)]
struct Plain {
    /// The characters; `None` is any.
    bytes: Vec<Option<u8>>,
    /// Whether it is the whole path.
    whole: bool,
}

impl Plain {
    fn new(text: &str) -> Option<Self> {
        let (text, whole) = match text.strip_prefix('^') {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let mut rest = text.strip_suffix('$').unwrap_or(text).bytes();
        let mut bytes = Vec::with_capacity(text.len());
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'.' => None,
                b'\\' => Some(rest.next().filter(|b| *b == b'.')?),
                _ if byte.is_ascii_alphanumeric() || byte == b'_' => Some(byte),
                _ => return None,
            });
        }
        Some(Self { bytes, whole })
    }

    fn matches(&self, path: &[u8]) -> bool {
        let start = path.len().checked_sub(self.bytes.len());
        let Some((before, tail)) = start.and_then(|at| path.split_at_checked(at)) else {
            return false;
        };
        (before.is_empty() || (!self.whole && before.ends_with(b".")))
            && tail
                .iter()
                .zip(&self.bytes)
                .all(|(found, wanted)| wanted.is_none_or(|w| w == *found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_patterns_match_as_their_expressions() {
        let paths = [
            "attn.to_q",
            "x.attn.to_q",
            "attnxto_q",
            "xattn.to_q",
            "to_q",
            "",
        ];
        for text in [
            "to_q",
            "attn.to_q",
            r"attn\.to_q",
            "^attn.to_q",
            "attn.to_q$",
            r"^x\.attn\.to_q$",
            "",
        ] {
            assert!(is_plain(text), "{text}");
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).unwrap();
            for path in paths {
                let matches = Pattern::new(text).unwrap().matches(path);
                assert_eq!(matches, regex.is_match(path), "{text} on {path}");
            }
        }
        for text in ["to_(q|k)", r"\d", "a^", "a$b", r"a\", "to-q"] {
            assert!(!is_plain(text), "{text}");
        }
    }
}
