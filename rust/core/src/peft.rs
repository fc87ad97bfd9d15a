//! The scale that PEFT keeps outside the tensors: `lora_adapter_metadata`, `adapter_config.json`.
//!
//! A pattern is a regular expression matched at the end of a module's path, after a dot or at its
//! start; the first that matches wins, so the order in the file is kept.

use std::fmt;
use std::marker::PhantomData;

use regex_lite::{Regex, RegexBuilder};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::header::Quoted;
use crate::role::Role;

/// Metadata key under which diffusers stores the adapter's configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";
/// Component prefix of the transformer's fields in that JSON.
const COMPONENT: &str = "transformer.";
/// Patterns beyond this many are not a trainer's work.
const MAX_PATTERNS: usize = 4096;
/// Compiled size of one pattern.
const MAX_PATTERN_BYTES: usize = 64 * 1024;

/// Faults of an adapter configuration.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not the JSON of a configuration.
    #[error("`{origin}` is not the JSON of a PEFT configuration: {detail}")]
    Json {
        /// Where the JSON stood.
        origin: String,
        /// What the parser says.
        detail: String,
    },
    /// A pattern table of absurd size.
    #[error("`{origin}` has {count} patterns in `{field}`, more than {MAX_PATTERNS}")]
    TooManyPatterns {
        /// Where the JSON stood.
        origin: String,
        /// The table.
        field: &'static str,
        /// Its length.
        count: usize,
    },
    /// A pattern that is no regular expression that is understood here: look-around and back
    /// references are not.
    #[error("`{origin}` has a pattern in `{field}` that is not understood: {pattern}")]
    Pattern {
        /// Where the JSON stood.
        origin: String,
        /// The table.
        field: &'static str,
        /// The pattern.
        pattern: Quoted,
    },
    /// An alpha that is not a number to scale with.
    #[error("`{origin}` has {field}: {value}, which is not a finite number")]
    NonFinite {
        /// Where the JSON stood.
        origin: String,
        /// The field.
        field: String,
        /// Its value.
        value: f64,
    },
}

/// What a PEFT configuration says about scale.
#[derive(Debug, Clone, Default)]
pub struct AdapterConfig {
    lora_alpha: Option<f64>,
    alpha_pattern: Vec<(Pattern, f64)>,
    rank: Option<u64>,
    rank_pattern: Vec<(Pattern, u64)>,
    use_rslora: bool,
}

impl AdapterConfig {
    /// Parses `lora_adapter_metadata` (fields prefixed by their component) or
    /// `adapter_config.json` (no prefix). Fields of other components are passed over.
    pub fn parse(origin: &str, json: &str) -> Result<Self, ConfigError> {
        let json_error = |e: serde_json::Error| ConfigError::Json {
            origin: origin.to_owned(),
            detail: e.to_string(),
        };
        let fields: Ordered<serde_json::Value> = serde_json::from_str(json).map_err(json_error)?;
        // The patterns are parsed a second time because only `Ordered` keeps their order.
        let ordered: Ordered<PatternField> = serde_json::from_str(json).map_err(json_error)?;
        let mut config = Self::default();
        for (name, value) in &fields.0 {
            match own_field(name) {
                Some("lora_alpha") => config.lora_alpha = value.as_f64(),
                Some("r") => config.rank = value.as_u64(),
                Some("use_rslora") => config.use_rslora = value.as_bool().unwrap_or(false),
                _ => {}
            }
        }
        for (name, table) in ordered.0 {
            let PatternField::Table(table) = table else {
                continue;
            };
            match own_field(&name) {
                Some("alpha_pattern") => {
                    config.alpha_pattern = patterns(origin, "alpha_pattern", table)?;
                }
                Some("rank_pattern") => {
                    let rows = patterns(origin, "rank_pattern", table)?;
                    config.rank_pattern = rows
                        .into_iter()
                        .filter_map(|(p, v)| Some((p, whole(v)?)))
                        .collect();
                }
                _ => {}
            }
        }
        Ok(config)
    }

    /// The scale of a LoRA of this rank at this path, or `None` where the file names no alpha.
    ///
    /// alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
    #[allow(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
    pub fn scale(&self, path: &str, rank: u64) -> Option<f64> {
        let alpha = first_match(&self.alpha_pattern, path).or(self.lora_alpha)?;
        let rank = rank as f64;
        // An alpha of 0 means alpha = r to every trainer that writes one.
        if alpha == 0.0 {
            return Some(1.0);
        }
        Some(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// The rank that the configuration promises for a path.
    pub fn promised_rank(&self, path: &str) -> Option<u64> {
        first_match(&self.rank_pattern, path).or(self.rank)
    }

    /// Whether the configuration asks for rsLoRA.
    pub fn use_rslora(&self) -> bool {
        self.use_rslora
    }
}

/// Whether a metadata scale applies to a module that has this role.
pub(crate) fn governs(role: Role) -> bool {
    matches!(role, Role::Down | Role::Up)
}

fn own_field(name: &str) -> Option<&str> {
    match name.strip_prefix(COMPONENT) {
        Some(field) => Some(field),
        None if name.contains('.') => None,
        None => Some(name),
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a whole number in range"
)]
fn whole(value: f64) -> Option<u64> {
    (value.fract() == 0.0 && (0.0..=1e9).contains(&value)).then_some(value as u64)
}

fn first_match<V: Copy>(rows: &[(Pattern, V)], path: &str) -> Option<V> {
    rows.iter()
        .find(|(pattern, _)| pattern.matches(path))
        .map(|(_, value)| *value)
}

fn patterns(
    origin: &str,
    field: &'static str,
    table: Vec<(String, f64)>,
) -> Result<Vec<(Pattern, f64)>, ConfigError> {
    if table.len() > MAX_PATTERNS {
        let (origin, count) = (origin.to_owned(), table.len());
        return Err(ConfigError::TooManyPatterns {
            origin,
            field,
            count,
        });
    }
    table
        .into_iter()
        .map(|(text, value)| {
            let origin = origin.to_owned();
            if !value.is_finite() {
                let field = format!("{field}.{}", Quoted::new(&text));
                return Err(ConfigError::NonFinite {
                    origin,
                    field,
                    value,
                });
            }
            let pattern = Pattern::new(&text).ok_or_else(|| {
                let pattern = Quoted::new(&text);
                ConfigError::Pattern {
                    origin,
                    field,
                    pattern,
                }
            })?;
            Ok((pattern, value))
        })
        .collect()
}

/// A pattern of PEFT: `(.*\.)?({pattern})$` from the start of the path.
#[derive(Debug, Clone)]
enum Pattern {
    /// Letters, digits, `_` and `.` only (`.` matches any character): compared without a regex,
    /// since files list one full path per module.
    Plain(String),
    /// Any other expression.
    Regex(Regex),
}

impl Pattern {
    fn new(text: &str) -> Option<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if text.chars().all(plain) {
            return Some(Self::Plain(text.to_owned()));
        }
        RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"))
            .size_limit(MAX_PATTERN_BYTES)
            .build()
            .ok()
            .map(Self::Regex)
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Regex(regex) => regex.is_match(path),
            Self::Plain(text) => {
                let Some(start) = path.len().checked_sub(text.len()) else {
                    return false;
                };
                let (before, tail) = (path.get(..start), path.get(start..));
                let after_a_dot = before.is_some_and(|b| b.is_empty() || b.ends_with('.'));
                after_a_dot
                    && tail.is_some_and(|tail| {
                        tail.bytes()
                            .zip(text.bytes())
                            .all(|(c, p)| c == p || p == b'.')
                    })
            }
        }
    }
}

/// A JSON object whose order is kept.
struct Ordered<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rows<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Rows<V> {
            type Value = Ordered<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut rows = Vec::new();
                while let Some(row) = map.next_entry()? {
                    rows.push(row);
                }
                Ok(Ordered(rows))
            }
        }
        deserializer.deserialize_map(Rows(PhantomData))
    }
}

/// A field that may be a pattern table.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum PatternField {
    Table(#[serde(deserialize_with = "table_rows")] Vec<(String, f64)>),
    Other(serde::de::IgnoredAny),
}

fn table_rows<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, f64)>, D::Error> {
    Ordered::deserialize(deserializer).map(|rows| rows.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> AdapterConfig {
        AdapterConfig::parse("test", json).unwrap()
    }

    #[test]
    fn patterns_match_the_end_after_a_dot_and_the_first_wins() {
        let config = config(
            r#"{"transformer.r": 16, "transformer.lora_alpha": 16,
                "transformer.alpha_pattern": {"to_v": 8, "0.attn.to_v": 99, "attn.to_(q|k)": 64},
                "text_encoder.lora_alpha": 1000}"#,
        );
        assert_eq!(
            config.scale("transformer_blocks.0.attn.to_v", 32),
            Some(0.25)
        );
        assert_eq!(
            config.scale("transformer_blocks.0.attn.to_k", 64),
            Some(1.0)
        );
        assert_eq!(
            config.scale("transformer_blocks.0.attn.add_v_proj", 16),
            Some(1.0)
        );
        assert_eq!(
            config.scale("transformer_blocks.0.attn.xto_v", 16),
            Some(1.0)
        );
    }

    #[test]
    fn rslora_divides_by_the_root() {
        let config = config(r#"{"lora_alpha": 8, "use_rslora": true}"#);
        assert_eq!(config.scale("img_in", 16), Some(2.0));
    }

    #[test]
    fn no_alpha_no_scale() {
        assert_eq!(config("{}").scale("img_in", 16), None);
        assert_eq!(
            config(r#"{"lora_alpha": 0}"#).scale("img_in", 16),
            Some(1.0)
        );
    }

    #[test]
    fn faults_are_named() {
        let error = AdapterConfig::parse("adapter_config.json", "[1]").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("`adapter_config.json` is not the JSON"),
            "{error}"
        );
    }

    #[test]
    fn an_expression_that_is_not_understood_is_refused() {
        let json = r#"{"lora_alpha": 8, "alpha_pattern": {"(?!x)to_q": 4}}"#;
        let error = AdapterConfig::parse("adapter_config.json", json).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`adapter_config.json` has a pattern in `alpha_pattern` that is not understood: \
             `(?!x)to_q`"
        );
    }
}
