//! Faults of an adapter configuration.

use super::pattern::{MAX_EXPRESSIONS, MAX_PATTERNS};
use crate::header::Quoted;

/// Faults of an adapter configuration.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not the JSON of a configuration.
    #[error("`{origin}` is not the JSON of a PEFT configuration: {detail}")]
    Json {
        /// The origin of the JSON.
        origin: String,
        /// The parser's message.
        detail: String,
    },
    /// A pattern table of absurd size.
    #[error("`{origin}` has {count} patterns in `{field}`, more than {MAX_PATTERNS}")]
    TooManyPatterns {
        /// The origin of the JSON.
        origin: String,
        /// The table.
        field: &'static str,
        /// Its length.
        count: usize,
    },
    /// More regular expressions than can be matched in reasonable time.
    #[error("`{origin}` has {count} regular expressions in `{field}`, more than {MAX_EXPRESSIONS}")]
    TooManyExpressions {
        /// The origin of the JSON.
        origin: String,
        /// The table.
        field: &'static str,
        /// How many.
        count: usize,
    },
    /// Regular expressions that would take too long to match.
    #[error(
        "`{origin}` has regular expressions in `{field}` that would take too long to match\n\
         hint: name modules by their paths, or by parts of them"
    )]
    SlowExpressions {
        /// The origin of the JSON.
        origin: String,
        /// The table.
        field: &'static str,
    },
    /// A pattern that is no regular expression that is understood here (look-around and back
    /// references are not), or one of absurd size.
    #[error("`{origin}` has a pattern in `{field}` that is not understood: {pattern}")]
    Pattern {
        /// The origin of the JSON.
        origin: String,
        /// The table.
        field: &'static str,
        /// The pattern.
        pattern: Quoted,
    },
    /// A field that the scale depends on, of another type than it has.
    #[error("`{origin}` has {value} in {field}, which is not {expected}")]
    WrongType {
        /// The origin of the JSON.
        origin: String,
        /// The field.
        field: String,
        /// Its JSON.
        value: Quoted,
        /// The type that belongs there.
        expected: &'static str,
    },
}
