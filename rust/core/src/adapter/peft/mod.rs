//! The scale that PEFT keeps outside the tensors: `lora_adapter_metadata`, `adapter_config.json`.
//!
//! A pattern is a regular expression matched at the end of a module's path, after a dot or at its
//! start; the first that matches wins, so the order in the file is kept.

mod error;
mod needed;
mod pattern;

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::adapter::rotation::Cayley;
use crate::adapter::{Adapter, oft};
use crate::header::Quoted;

pub use error::ConfigError;
use pattern::{PatternTable, is_plain};

/// Metadata key under which diffusers stores the adapter's configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";
/// Component prefix of the transformer's fields in that JSON.
const COMPONENT: &str = "transformer.";
/// How components are called that have a configuration of their own.
const OTHER_COMPONENTS: [&str; 3] = ["text_encoder", "image_encoder", "vae"];

/// The kind of adapter that a configuration is of, as far as scales depend on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ConfiguredKind {
    /// Alpha is `lora_alpha`; also where nothing is said, as diffusers' metadata does not.
    #[default]
    Lora,
    /// LoKr: alpha is `alpha`, and divided by the configured rank even where no tensor has one.
    Lokr,
    /// LoHa: alpha is `alpha`.
    Loha,
    /// Any other: no scale is taken from it.
    Other,
}

impl ConfiguredKind {
    /// By its name, in any case and as Python prints it.
    fn of(peft_type: &str) -> Self {
        let name = peft_type.trim().to_ascii_uppercase();
        match name.rsplit('.').next().unwrap_or_default() {
            "LORA" | "" => Self::Lora,
            "LOKR" => Self::Lokr,
            "LOHA" => Self::Loha,
            _ => Self::Other,
        }
    }

    /// The field that holds the adapter's alpha.
    fn alpha_field(self) -> Option<&'static str> {
        match self {
            Self::Lora => Some("lora_alpha"),
            Self::Lokr | Self::Loha => Some("alpha"),
            Self::Other => None,
        }
    }
}

/// The vectors that an HRA reflects by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reflections {
    AsStored,
    /// Made orthogonal first (`apply_GS`).
    Orthogonalised,
}

/// Initialisations of PEFT's that change the base weight, so that the pair is no delta of it:
/// beginnings of `init_lora_weights`, in lower case.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// A PEFT configuration: its scale, and the rest that tensors do not tell.
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    kind: ConfiguredKind,
    lora_alpha: Option<f64>,
    alpha_pattern: PatternTable<f64>,
    rank: Option<u64>,
    /// `None` where expressions are among the patterns: ranks are only checked, and a fault in
    /// one of these is no reason to refuse a file.
    rank_pattern: Option<PatternTable<f64>>,
    use_rslora: bool,
    /// The initialisation that changed the base weight, where it did.
    changed_base: Option<String>,
    trains_biases: bool,
    use_dora: bool,
    /// Terms of the Cayley-Neumann series of an OFT; none where it solves instead.
    neumann_terms: Option<u64>,
    reflections: Reflections,
    /// The fields about the scale that are not used.
    unused: Option<String>,
}

impl AdapterConfig {
    /// Parses a file's `lora_adapter_metadata`; one that says nothing is as good as none.
    pub fn parse_embedded(origin: &str, json: &str) -> Result<Option<Self>, ConfigError> {
        // What trainers write for a configuration that they do not have.
        if matches!(json.trim(), "" | "null" | "None" | "{}") {
            return Ok(None);
        }
        Self::parse(origin, json).map(Some)
    }

    /// Parses `lora_adapter_metadata` (fields prefixed by their component, or in an object of its
    /// name) or `adapter_config.json` (no prefix). Fields of other components are passed over;
    /// `null` is as good as no field.
    pub fn parse(origin: &str, json: &str) -> Result<Self, ConfigError> {
        let rows = serde_json::from_str::<Ordered<&RawValue>>(json)
            .map_err(|e| json_error(origin, &e))?
            .0;
        let fields = Fields::new(origin, rows)?;
        let name = fields.typed("peft_type", "a name", text)?;
        let kind = name
            .as_deref()
            .map_or_else(ConfiguredKind::default, ConfiguredKind::of);
        let ranks = fields.rows("rank_pattern")?;
        // A LoKr's scale depends on the rank that only the configuration knows.
        let is_needed = kind == ConfiguredKind::Lokr;
        let rank_pattern = (is_needed || ranks.iter().all(|(text, _)| is_plain(text)))
            .then(|| PatternTable::new(origin, "rank_pattern", ranks))
            .transpose()?;
        let alpha = kind.alpha_field().map_or(Ok(None), |field| {
            fields.typed(field, "a number", Value::as_f64)
        })?;
        // Written as `true` by PEFT once the pair has been made a delta of the unchanged base.
        let init = fields.value("init_lora_weights")?.as_ref().and_then(text);
        let changes_base = |init: &String| {
            let lower = init.to_lowercase();
            BASE_CHANGING.iter().any(|name| lower.starts_with(name))
        };
        let flag = |name: &str, default| {
            let value = fields.typed(name, "true or false", Value::as_bool)?;
            Ok::<_, ConfigError>(value.unwrap_or(default))
        };
        let bias = fields.value("bias")?.as_ref().and_then(text);
        Ok(Self {
            kind,
            lora_alpha: alpha,
            alpha_pattern: PatternTable::new(
                origin,
                "alpha_pattern",
                fields.rows("alpha_pattern")?,
            )?,
            rank: fields.value("r")?.and_then(|value| value.as_u64()),
            rank_pattern,
            use_rslora: flag("use_rslora", false)?,
            changed_base: init.filter(changes_base),
            trains_biases: matches!(bias.as_deref(), Some("all" | "lora_only")),
            use_dora: flag("use_dora", false)?,
            neumann_terms: if flag("use_cayley_neumann", true)? {
                let terms = "num_cayley_neumann_terms";
                let terms = fields.typed(terms, "a whole number", Value::as_u64)?;
                Some(terms.unwrap_or(oft::NEUMANN_TERMS))
            } else {
                None
            },
            reflections: if flag("apply_GS", false)? {
                Reflections::Orthogonalised
            } else {
                Reflections::AsStored
            },
            unused: unused(kind, name.as_deref(), &fields),
        })
    }

    /// Whether it says the scale of this kind of adapter.
    pub(crate) fn governs(&self, adapter: Adapter) -> bool {
        match self.kind {
            ConfiguredKind::Lora => matches!(adapter, Adapter::Lora | Adapter::Dora),
            ConfiguredKind::Lokr => adapter == Adapter::Lokr,
            ConfiguredKind::Loha => adapter == Adapter::Loha,
            ConfiguredKind::Other => false,
        }
    }

    /// The name of the initialisation that changed the base weight before training, if one did:
    /// the trained pair is then no delta of the base that people have.
    pub fn changed_base(&self) -> Option<&str> {
        self.changed_base.as_deref()
    }

    /// Whether the pairs were trained as DoRA: each has a magnitude, without which it would be
    /// another LoRA.
    pub fn use_dora(&self) -> bool {
        self.use_dora
    }

    /// How an OFT's blocks become rotations; of a series of other terms than PEFT's default, how many
    /// those are.
    pub(crate) fn cayley(&self) -> Result<Cayley, u64> {
        match self.neumann_terms {
            Some(oft::NEUMANN_TERMS) => Ok(Cayley::Neumann),
            Some(terms) => Err(terms),
            None => Ok(Cayley::Solve),
        }
    }

    /// Whether an HRA makes its vectors orthogonal before it reflects by them.
    pub(crate) fn orthogonalises_hra(&self) -> bool {
        self.reflections == Reflections::Orthogonalised
    }

    /// The unused fields about the scale, in words.
    pub(crate) fn unused(&self) -> Option<&str> {
        self.unused.as_deref()
    }

    /// Whether biases were trained: they are saved whole, beside the pairs.
    pub fn trains_biases(&self) -> bool {
        self.trains_biases
    }

    /// The scale of a LoRA of this rank at this path, or `None` where the file names no alpha.
    ///
    /// alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
    #[allow(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
    pub fn scale(&self, path: &str, rank: u64) -> Option<f64> {
        let alpha = self.alpha(path)?;
        let rank = rank as f64;
        // An alpha of 0 means alpha = r to every trainer that writes one.
        if alpha == 0.0 {
            return Some(1.0);
        }
        Some(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// The alpha for a path: that of the first pattern which matches, else the adapter's.
    pub fn alpha(&self, path: &str) -> Option<f64> {
        self.alpha_pattern.first_match(path).or(self.lora_alpha)
    }

    /// The rank that the configuration promises for a path, if that can be told.
    pub fn promised_rank(&self, path: &str) -> Option<u64> {
        let promised = self.rank_pattern.as_ref()?.first_match(path);
        promised.and_then(whole).or(self.rank)
    }

    /// Whether the configuration asks for rsLoRA.
    pub fn use_rslora(&self) -> bool {
        self.use_rslora
    }
}

/// The fields about the scale that are not used, in words: an alpha of a kind of adapter whose scale
/// is not known, or of a component that is not the transformer.
fn unused(kind: ConfiguredKind, peft_type: Option<&str>, fields: &Fields<'_>) -> Option<String> {
    if kind == ConfiguredKind::Other {
        let name = Quoted::new(peft_type.unwrap_or_default());
        return Some(format!("is of another kind of adapter, {name}"));
    }
    let alpha = format!(".{}", kind.alpha_field()?);
    if fields.find(alpha.trim_start_matches('.')).is_some() {
        return None;
    }
    let of_another = |name: &&str| {
        name.ends_with(&alpha) && !OTHER_COMPONENTS.iter().any(|other| name.starts_with(other))
    };
    let mut names = fields.rows.iter().map(|(name, _)| name.as_str());
    let name = names.find(of_another)?;
    Some(format!(
        "has {}, which is not the transformer's",
        Quoted::new(name)
    ))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a whole number in range"
)]
fn whole(value: f64) -> Option<u64> {
    (value.fract() == 0.0 && (0.0..=1e9).contains(&value)).then_some(value as u64)
}

fn json_error(origin: &str, error: &serde_json::Error) -> ConfigError {
    ConfigError::Json {
        origin: origin.to_owned(),
        detail: error.to_string(),
    }
}

/// The fields of a configuration, in order, none of them parsed yet.
struct Fields<'j> {
    origin: &'j str,
    rows: Vec<(String, &'j RawValue)>,
}

impl<'j> Fields<'j> {
    /// Fields in an object of the transformer's name stand as those with its prefix.
    fn new(origin: &'j str, mut rows: Vec<(String, &'j RawValue)>) -> Result<Self, ConfigError> {
        let own = COMPONENT.trim_end_matches('.');
        let nested = rows
            .iter()
            .filter(|(name, json)| name == own && json.get().starts_with('{'));
        let mut added = Vec::new();
        for (_, json) in nested {
            let inner: Ordered<&RawValue> =
                serde_json::from_str(json.get()).map_err(|e| json_error(origin, &e))?;
            let named = |(name, json)| (format!("{COMPONENT}{name}"), json);
            added.extend(inner.0.into_iter().map(named));
        }
        rows.extend(added);
        Ok(Self { origin, rows })
    }

    /// The JSON of a field: the transformer's own before one without a component.
    fn find(&self, name: &str) -> Option<&'j RawValue> {
        let last = |wanted: &str| {
            let named =
                |(name, json): &&(String, &RawValue)| name == wanted && json.get() != "null";
            self.rows.iter().rev().find(named).map(|(_, json)| *json)
        };
        last(&format!("{COMPONENT}{name}")).or_else(|| last(name))
    }

    fn value(&self, name: &str) -> Result<Option<Value>, ConfigError> {
        let json = self.find(name).map(|json| serde_json::from_str(json.get()));
        json.transpose().map_err(|e| json_error(self.origin, &e))
    }

    /// A field as what it has to be.
    fn typed<T>(
        &self,
        name: &str,
        expected: &'static str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.value(name)? else {
            return Ok(None);
        };
        let typed = read(&value);
        let wrong = || self.wrong_type(format!("`{name}`"), &value.to_string(), expected);
        typed.map(Some).ok_or_else(wrong)
    }

    /// The rows of a table of numbers, in order.
    fn rows(&self, name: &str) -> Result<Vec<(String, f64)>, ConfigError> {
        let Some(json) = self.find(name) else {
            return Ok(Vec::new());
        };
        if !json.get().starts_with('{') {
            return Err(self.wrong_type(format!("`{name}`"), json.get(), "a table of patterns"));
        }
        let rows: Ordered<Value> =
            serde_json::from_str(json.get()).map_err(|e| json_error(self.origin, &e))?;
        let mut numbers = Vec::with_capacity(rows.0.len());
        for (pattern, value) in rows.0 {
            match value.as_f64() {
                Some(number) => numbers.push((pattern, number)),
                None if value.is_null() => {}
                None => {
                    let field = format!("`{name}` at {}", Quoted::new(&pattern));
                    return Err(self.wrong_type(field, &value.to_string(), "a number"));
                }
            }
        }
        Ok(numbers)
    }

    fn wrong_type(&self, field: String, json: &str, expected: &'static str) -> ConfigError {
        ConfigError::WrongType {
            origin: self.origin.to_owned(),
            field,
            value: Quoted::new(json),
            expected,
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

#[cfg(test)]
#[cfg(not(loom))]
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

    #[test]
    fn a_lokr_and_a_loha_have_an_alpha_of_their_own() {
        let fields = r#""alpha": 4, "lora_alpha": 100, "r": 8, "rank_pattern": {"to_(q|k)": 2}"#;
        for (peft_type, adapter) in [("LOKR", Adapter::Lokr), ("LOHA", Adapter::Loha)] {
            let config = config(&format!(r#"{{"peft_type": "{peft_type}", {fields}}}"#));
            assert_eq!(config.scale("attn.to_v", 8), Some(0.5));
            assert!(config.governs(adapter) && !config.governs(Adapter::Lora));
        }
        let lokr = config(&format!(r#"{{"peft_type": "LOKR", {fields}}}"#));
        assert_eq!(lokr.promised_rank("attn.to_q"), Some(2));
        assert_eq!(lokr.promised_rank("attn.to_v"), Some(8));
        // Of any other kind no scale is known.
        let other = config(&format!(r#"{{"peft_type": "ADALORA", {fields}}}"#));
        assert_eq!(other.scale("attn.to_v", 8), None);
        assert!(!other.governs(Adapter::Lora));
    }

    #[test]
    fn an_expression_that_a_lokr_s_scale_depends_on_is_refused() {
        let ranks = r#""rank_pattern": {"(?!x)to_q": 4}"#;
        insta::assert_snapshot!(
            refusal(&format!(r#"{{"peft_type": "LOKR", "alpha": 8, {ranks}}}"#)),
            @"`adapter_config.json` has a pattern in `rank_pattern` that is not understood: `(?!x)to_q`"
        );
        assert_eq!(config(&format!("{{{ranks}}}")).promised_rank("to_q"), None);
    }

    #[test]
    fn an_initialisation_may_have_changed_the_base() {
        let changed = |init: &str| {
            let json = format!(r#"{{"lora_alpha": 8, "init_lora_weights": {init}}}"#);
            config(&json).changed_base().map(str::to_owned)
        };
        for init in [
            "pissa",
            "pissa_niter_4",
            "OLoRA",
            "corda",
            "loftq",
            "lora_ga",
        ] {
            assert_eq!(changed(&format!("\"{init}\"")).as_deref(), Some(init));
        }
        for init in [
            "true",
            "false",
            "null",
            "\"gaussian\"",
            "\"eva\"",
            "\"orthogonal\"",
        ] {
            assert_eq!(changed(init), None, "{init}");
        }
    }

    fn refusal(json: &str) -> String {
        let error = AdapterConfig::parse("adapter_config.json", json).unwrap_err();
        error.to_string()
    }

    #[test]
    fn a_null_is_as_good_as_nothing() {
        let config = config(
            r#"{"lora_alpha": 8, "transformer.lora_alpha": null,
                "alpha_pattern": {"to_q": null, "to_k": 4}, "rank_pattern": null}"#,
        );
        assert_eq!(config.scale("attn.to_q", 8), Some(1.0));
        assert_eq!(config.scale("attn.to_k", 8), Some(0.5));
        assert_eq!(config.promised_rank("attn.to_k"), None);
    }

    #[test]
    fn the_transformers_own_fields_win() {
        for json in [
            r#"{"transformer.lora_alpha": 8, "lora_alpha": 1000, "use_rslora": true,
                "transformer.use_rslora": false}"#,
            r#"{"lora_alpha": 1000, "transformer.lora_alpha": 8, "text_encoder.use_rslora": true}"#,
        ] {
            assert_eq!(config(json).scale("img_in", 16), Some(0.5), "{json}");
        }
    }

    #[test]
    fn what_is_not_of_its_type_is_refused() {
        insta::assert_snapshot!(
            refusal(r#"{"lora_alpha": "8"}"#),
            @r#"`adapter_config.json` has `"8"` in `lora_alpha`, which is not a number"#
        );
        insta::assert_snapshot!(
            refusal(r#"{"lora_alpha": 8, "transformer.use_rslora": "yes"}"#),
            @r#"`adapter_config.json` has `"yes"` in `use_rslora`, which is not true or false"#
        );
        insta::assert_snapshot!(
            refusal(r#"{"alpha_pattern": {"to_k": 4, "to_q": [8]}}"#),
            @"`adapter_config.json` has `[8]` in `alpha_pattern` at `to_q`, which is not a number"
        );
        insta::assert_snapshot!(
            refusal(r#"{"rank_pattern": [8]}"#),
            @"`adapter_config.json` has `[8]` in `rank_pattern`, which is not a table of patterns"
        );
    }

    /// A configuration with this many expressions of one kind.
    fn with_expressions(count: usize, expression: &str) -> String {
        let patterns: Vec<String> = (0..count)
            .map(|i| format!(r#""{expression}x{i}": 1"#))
            .collect();
        format!(r#"{{"alpha_pattern": {{{}}}}}"#, patterns.join(", "))
    }

    #[test]
    fn expressions_are_few_and_small() {
        insta::assert_snapshot!(
            refusal(&with_expressions(1025, "(a|b)")),
            @"`adapter_config.json` has 1025 regular expressions in `alpha_pattern`, more than 1024"
        );
        insta::assert_snapshot!(
            refusal(&with_expressions(1, "(.?){9000}")),
            @"`adapter_config.json` has a pattern in `alpha_pattern` that is not understood: `(.?){9000}x0`"
        );
        // Of ranks, which only a note depends on, no expression is compiled.
        let ranks = with_expressions(1025, "(?!a)").replace("alpha_pattern", "rank_pattern");
        assert_eq!(config(&ranks).promised_rank("to_q"), None);
    }

    /// The same, of expressions that have to be tried on every path.
    fn with_hostile(count: usize, expression: &str) -> String {
        let patterns: Vec<String> = (0..count)
            .map(|i| format!(r#""{expression}(x{i})": 1"#))
            .collect();
        format!(r#"{{"alpha_pattern": {{{}}}}}"#, patterns.join(", "))
    }

    #[test]
    fn expressions_that_would_take_long_are_refused() {
        let hostile = |count: usize| with_hostile(count, "(?:.*){170}");
        insta::assert_snapshot!(refusal(&hostile(8)), @"
        `adapter_config.json` has regular expressions in `alpha_pattern` that would take too long to match
        hint: name modules by their paths, or by parts of them
        ");
        // Small, but many.
        let many = with_hostile(800, "(.?|.?)(.?|.?)(.?|.?)");
        assert!(refusal(&many).contains("too long to match"));
        // Large, and tried on no path.
        let large = with_expressions(200, r"zzz(?:.*){170}");
        assert!(refusal(&large).contains("too long to match"));
    }

    #[test]
    fn one_alternation_over_all_blocks_is_not_too_much() {
        let paths: Vec<String> = (0..60)
            .map(|block| format!(r"transformer_blocks\\.{block}\\.attn\\.to_q"))
            .collect();
        let json = format!(
            r#"{{"r": 4, "alpha_pattern": {{"{}": 1}}}}"#,
            paths.join("|")
        );
        AdapterConfig::parse("adapter_config.json", &json).unwrap();
    }

    #[test]
    fn an_alternation_for_each_block_is_not_too_much() {
        let rows: Vec<String> = (0..60)
            .flat_map(|block| {
                [
                    "attn.to_(q|k)",
                    "(img|txt)_mlp.net.2",
                    "attn.add_(q|k|v)_proj",
                    "attn.to_[v]",
                ]
                .map(|name| format!("transformer_blocks.{block}.{name}").replace('.', r"\\."))
            })
            .map(|pattern| format!(r#""{pattern}": 1"#))
            .collect();
        let json = format!(
            r#"{{"lora_alpha": 2, "alpha_pattern": {{{}}}}}"#,
            rows.join(", ")
        );
        let start = std::time::Instant::now();
        let config = config(&json);
        for block in 0..60 {
            let scale = |name: &str| config.scale(&format!("transformer_blocks.{block}.{name}"), 2);
            assert_eq!(scale("attn.to_q"), Some(0.5));
            assert_eq!(scale("attn.to_out.0"), Some(1.0));
            assert_eq!(scale("txt_mlp.net.2"), Some(0.5));
            assert_eq!(scale("attn.to_v"), Some(0.5));
        }
        // A tenth of a second on an idle machine.
        let elapsed = start.elapsed();
        assert!(elapsed.as_secs_f64() < 20.0, "{elapsed:?}");
    }

    #[test]
    fn a_trainers_expressions_are_not_too_many() {
        let json = with_expressions(30, "(img|txt)_mlp.net.");
        assert_eq!(config(&json).scale("img_mlp.net.x29", 2), Some(0.5));
        let json = with_expressions(900, r"^transformer_blocks\\.0\\.");
        assert_eq!(
            config(&json).scale("transformer_blocks.0.x899", 2),
            Some(0.5)
        );
    }

    #[test]
    fn matching_the_largest_expressions_is_no_hang() {
        let config = config(&with_hostile(4, "(?:.*){170}"));
        // Without optimisation, matching takes ten times as long.
        let blocks = if cfg!(debug_assertions) { 6 } else { 60 };
        let start = std::time::Instant::now();
        for block in 0..blocks {
            for part in ["q", "k", "v", "q", "k", "v", "q", "k"] {
                let path = format!("transformer_blocks.{block}.attn.to_{part}");
                assert_eq!(config.scale(&path, 8), None);
            }
        }
        // Less than a second on an idle machine; what this guards against is minutes.
        let elapsed = start.elapsed();
        assert!(elapsed.as_secs_f64() < 20.0, "{elapsed:?}");
    }
}
