//! `--explain`: one key's screen, or its line of JSON.

use std::path::Path;

use qwenlora_core::adapter::module::ScaleSource;
use qwenlora_core::header::Quoted;
use qwenlora_core::key::role::Role;
use qwenlora_core::model::Model;
use qwenlora_core::plan::document::SCHEMA;
use qwenlora_core::plan::explain::{Explanation, Fate, ModuleExplanation, Reading, Unread};
use serde::Serialize;

use crate::escape;
use crate::report::shape;
use crate::screen::{Screen, TEXT_WIDTH, Tone};
use crate::tally::number;

/// Longest text that a row repeats from a file.
const QUOTED_COLUMNS: usize = 3 * TEXT_WIDTH;
/// More tensors of a module than this are counted.
const MAX_KEYS: usize = 8;

/// The screen of a key of the file at `path`.
pub(crate) fn screen(path: &Path, explanation: &Explanation) -> Screen {
    let mut screen = Screen::default();
    let (tone, word, sentence) = fate(&explanation.fate);
    screen.headline(tone, word, &escape::short(&explanation.key, QUOTED_COLUMNS));
    screen.below(&escape::short(&sentence, QUOTED_COLUMNS));
    screen.blank();
    let mut row = |label, text: &str| screen.row(Tone::Faint, label, text);
    row("file", &path.to_string_lossy());
    let tensor = format!("{} {}", explanation.dtype, shape(&explanation.shape));
    match explanation.value {
        Some(value) => row("tensor", &format!("{tensor} = {}", number(value))),
        None => row("tensor", &tensor),
    }
    match &explanation.reading {
        Some(reading) => add_reading(&mut screen, reading, explanation.role),
        None => screen.row(Tone::Faint, "path", &unread(&explanation.key)),
    }
    if let Some(module) = &explanation.module {
        add_module(&mut screen, module, &explanation.key);
    }
    screen
}

/// The screen of a key that no file was named for.
pub(crate) fn reading_screen(key: &str, reading: Option<&Reading>) -> Screen {
    let mut screen = Screen::default();
    let shown = escape::short(key, QUOTED_COLUMNS);
    if let Some(reading) = reading {
        screen.headline(Tone::Good, "KEY", &shown);
        screen.below("as it is read in any file; name one to see its scale and its fate");
        screen.blank();
        add_reading(&mut screen, reading, reading.role);
        screen.row(Tone::Faint, "module", reading.module);
    } else {
        screen.headline(Tone::Bad, "KEY", &shown);
        screen.below(&unread(key));
    }
    screen
}

/// The lines on a key that is no tensor of a module.
fn unread(key: &str) -> String {
    match Unread::of(key) {
        Some(Unread::PathAlone { module }) => format!(
            "names the module `{module}`, without an ending that says what the tensor is, such as \
             `.lora_A.weight`"
        ),
        Some(Unread::UnknownEnding { module, ending }) => format!(
            "names the module `{module}`, with an unknown ending: `{}`",
            escape::short(&ending, QUOTED_COLUMNS)
        ),
        Some(Unread::BeyondTheModel(block)) => block,
        Some(Unread::OfPart(part)) => {
            format!("belongs to {}, to which nothing is applied", part.name())
        }
        Some(Unread::Known(foreign)) => foreign.reason().to_owned(),
        Some(Unread::OfModel(model)) => format!("{}, but one as {model} has it", no_module()),
        Some(Unread::Unknown) | None => no_module(),
    }
}

fn no_module() -> String {
    format!("names no module of {}", Model::any())
}

fn fate(fate: &Fate) -> (Tone, &'static str, String) {
    match fate {
        Fate::Applied => (
            Tone::Good,
            "APPLIED",
            "it takes part in what is applied".to_owned(),
        ),
        Fate::LeftOut { reason } => (
            Tone::Warning,
            "LEFT OUT",
            format!("its module is applied without it: {reason}"),
        ),
        Fate::NotApplied { reason } => (
            Tone::Bad,
            "LOST",
            format!("its module is not applied: {reason}"),
        ),
        Fate::Ignored {
            reason,
            harmless: true,
        } => (
            Tone::Plain,
            "IGNORED",
            format!("without effect on the image: {reason}"),
        ),
        Fate::Ignored { reason, .. } => (Tone::Warning, "LEFT OUT", reason.clone()),
    }
}

/// How the key is taken apart, from its start to its end.
fn add_reading(screen: &mut Screen, reading: &Reading, role: Role) {
    let mut row = |label, text: &str| screen.row(Tone::Faint, label, text);
    let prefixes: Vec<String> = reading.prefixes.iter().map(|p| format!("`{p}`")).collect();
    match prefixes.as_slice() {
        [] => row("prefix", "none"),
        some => row("prefix", &some.join(" then ")),
    }
    if !reading.wrappers.is_empty() {
        let names: Vec<String> = reading.wrappers.iter().map(|n| format!("`{n}`")).collect();
        row("wrapper", &format!("{}, taken out", names.join(" then ")));
    }
    row(
        "path",
        &format!("`{}`", escape::short(&reading.spelling, QUOTED_COLUMNS)),
    );
    let suffix = escape::short(&reading.suffix, QUOTED_COLUMNS);
    row(
        "suffix",
        &if suffix.is_empty() {
            "none".to_owned()
        } else {
            format!("`{suffix}`")
        },
    );
    if let Some(name) = &reading.adapter_name {
        let name = escape::short(name, QUOTED_COLUMNS);
        row(
            "",
            &format!("in it the adapter's name, as PEFT writes it: `{name}`"),
        );
    }
    let is_plain = role == Role::Ia3 && reading.suffix == ".weight";
    let says = if is_plain {
        PLAIN_WEIGHT
    } else {
        meaning(role)
    };
    row("role", &format!("{}: {says}", role.name()));
    if let Some(scaled) = reading.scales {
        row("", &format!("of the {} of its module", scaled.name()));
    }
    if role != reading.role {
        let text = format!(
            "the suffix alone says {}; the shapes tell",
            reading.role.name()
        );
        row("", &text);
    }
}

fn add_module(screen: &mut Screen, module: &ModuleExplanation, own_key: &str) {
    let mut row = |label, text: &str| screen.row(Tone::Faint, label, text);
    row("module", module.path);
    match module.parts {
        0 | 1 => row("slot", module.slot),
        parts => row(
            "slot",
            &format!("{}, part {} of {parts}", module.slot, module.part + 1),
        ),
    }
    let adapter = module.adapter.title();
    match module.rank {
        Some(rank) if crate::report::is_bound(module.adapter) => {
            row("adapter", &format!("{adapter}, rank up to {rank}"));
        }
        Some(rank) => row("adapter", &format!("{adapter}, rank {rank}")),
        None => row("adapter", adapter),
    }
    row("scale", &scale(module));
    if let Some(key) = scale_key(&module.scale_rule) {
        row("", &format!("by `{}`", escape::short(key, QUOTED_COLUMNS)));
    }
    for key in &module.float8_scales {
        row(
            "",
            &format!("times `{}`", escape::short(key, QUOTED_COLUMNS)),
        );
    }
    // A bias beside a LoRA, say, is no part of the product that is scaled.
    let own = module
        .tensor_scale
        .filter(|own| own.total_cmp(&module.scale).is_ne());
    if let Some(own) = own {
        row(
            "",
            &format!("but {} for the delta that this tensor is of", number(own)),
        );
    }
    add_keys(screen, module, own_key);
}

/// The module's other tensors.
fn add_keys(screen: &mut Screen, module: &ModuleExplanation, own: &str) {
    let others: Vec<&String> = module.keys.iter().filter(|key| *key != own).collect();
    let mut label = "with";
    for key in others.iter().take(MAX_KEYS) {
        let key = escape::short(key, QUOTED_COLUMNS);
        screen.row(Tone::Faint, std::mem::take(&mut label), &format!("`{key}`"));
    }
    if others.len() > MAX_KEYS {
        screen.below(&format!("and {} more", others.len() - MAX_KEYS));
    }
}

/// `0.5 = alpha 8 / rank 16`, `1: neither an alpha nor a configuration`.
fn scale(module: &ModuleExplanation) -> String {
    let rule = &module.scale_rule;
    let ground = match rule {
        ScaleSource::Alpha { .. } | ScaleSource::Config { .. }
            if module.float8_scales.is_empty() =>
        {
            return format!("{} = {rule}", number(module.scale));
        }
        ScaleSource::Alpha { .. } | ScaleSource::Config { .. } | ScaleSource::Stored { .. } => {
            rule.to_string()
        }
        ScaleSource::ZeroAlpha { .. } => "an alpha of 0 means alpha = rank".to_owned(),
        ScaleSource::BothDirect => {
            "both factors are stored whole, so that no alpha counts".to_owned()
        }
        ScaleSource::Nothing => "neither an alpha nor a configuration".to_owned(),
        ScaleSource::Bound { .. } => "alpha bounds the rotation, and is no scale".to_owned(),
        ScaleSource::Unscaled => "this kind of adapter has no alpha".to_owned(),
    };
    format!("{}: {ground}", number(module.scale))
}

fn scale_key(rule: &ScaleSource<String>) -> Option<&str> {
    match rule {
        ScaleSource::Alpha { tensor: key, .. }
        | ScaleSource::ZeroAlpha { tensor: key }
        | ScaleSource::Bound { tensor: key }
        | ScaleSource::Stored { tensor: key } => Some(key),
        ScaleSource::Config { .. }
        | ScaleSource::BothDirect
        | ScaleSource::Nothing
        | ScaleSource::Unscaled => None,
    }
}

/// The line on a checkpoint's tensors.
const PLAIN_WEIGHT: &str =
    "the module's own weight, as in a checkpoint; only beside `.on_input` IA3's factors";

/// A tensor's part in its adapter, in words.
fn meaning(role: Role) -> &'static str {
    match role {
        Role::Down => "the pair's first factor (LoRA A), rank x in",
        Role::Up => "the pair's second factor (LoRA B), out x rank",
        Role::Mid => "the middle factor of a Tucker LoRA",
        Role::UpBias => "a bias delta, scaled as the pair",
        Role::Alpha => "the numerator of the scale, alpha / rank",
        Role::Scale => "the scale itself",
        Role::DoraScale => "DoRA's magnitude of each channel",
        Role::LokrW1 => "LoKr's first factor, whole",
        Role::LokrW1A | Role::LokrW1B => "a half of LoKr's first factor",
        Role::LokrW2 => "LoKr's second factor, whole",
        Role::LokrW2A | Role::LokrW2B => "a half of LoKr's second factor",
        Role::LokrT2 => "the Tucker core of LoKr's second factor",
        Role::HadaW1A | Role::HadaW1B => "a half of LoHa's first product",
        Role::HadaW2A | Role::HadaW2B => "a half of LoHa's second product",
        Role::HadaT1 | Role::HadaT2 => "a Tucker core of LoHa",
        Role::GloraA1 | Role::GloraA2 => "GLoRA, a half of the factor on the base weight",
        Role::GloraB1 | Role::GloraB2 => "GLoRA, a half of its own delta",
        Role::GloraBm => "GLoRA's middle factor",
        Role::OftBlocks | Role::OftR => "the rotations of OFT or BOFT, in blocks",
        Role::OftRescale => "OFT's factor for each channel",
        Role::OftScaled => "a marker: OFT's blocks are divided by 2 sqrt(b - 1) first",
        Role::HraU => "HRA's reflections, in x rank",
        Role::BoftR => "the rotations of BOFT, in blocks",
        Role::BoftS => "BOFT's factor for each channel",
        Role::PeftOnly => "a tensor of a kind of adapter that only PEFT knows",
        Role::Ia3 | Role::Ia3L => "IA3's factor for each channel",
        Role::Ia3OnInput => "whether IA3 acts on the input",
        Role::Diff => "a full delta of the weight, as it is",
        Role::DiffB => "a delta of the bias, as it is",
        Role::WNorm => "a delta of a norm's weight",
        Role::BNorm => "a delta of a norm's bias",
        Role::SetWeight => "a weight that replaces the module's own",
        Role::Reshape => "a new shape of the module's weight",
        Role::Fp8Scale => "the factor of float8 values",
        Role::PackedDown => "LoRA A in Nunchaku's packed layout",
        Role::PackedUp => "LoRA B in Nunchaku's packed layout",
        Role::Ignored => "no part of anything that is applied",
    }
}

/// A key of a file, for programs.
#[derive(Serialize)]
struct Document<'d> {
    schema: u32,
    path: &'d str,
    #[serde(flatten)]
    explanation: &'d Explanation,
}

/// A key that the file does not have, for programs.
#[derive(Serialize)]
struct Missing<'d> {
    schema: u32,
    path: &'d str,
    error: &'d str,
    nearest: &'d [&'d str],
}

/// A key without a file, for programs.
#[derive(Serialize)]
struct Read<'d> {
    schema: u32,
    key: &'d str,
    reading: Option<&'d Reading>,
    /// Its kind, where it is not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// The line of a key that the file has.
pub(crate) fn document(path: &Path, explanation: &Explanation) -> String {
    serialised(&Document {
        schema: SCHEMA,
        path: &path.to_string_lossy(),
        explanation,
    })
}

/// The line of a key that the file does not have.
pub(crate) fn missing_document(path: &Path, key: &str, nearest: &[&str]) -> String {
    serialised(&Missing {
        schema: SCHEMA,
        path: &path.to_string_lossy(),
        error: &missing(path, key),
        nearest,
    })
}

/// The line of a key without a file.
pub(crate) fn reading_document(key: &str, reading: Option<&Reading>) -> String {
    serialised(&Read {
        schema: SCHEMA,
        key,
        reading,
        reason: reading.is_none().then(|| unread(key)),
    })
}

/// The lines where a file has no such key.
pub(crate) fn missing(path: &Path, key: &str) -> String {
    format!("{} has no key {}", Quoted::path(path), Quoted::new(key))
}

fn serialised(document: &impl Serialize) -> String {
    // Strings and numbers always serialise.
    escape::json(&serde_json::to_string(document).unwrap_or_default())
}
