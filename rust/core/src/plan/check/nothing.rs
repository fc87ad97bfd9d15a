//! Files in which no tensor is a module's: what they are all the same.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::header::Quoted;
use crate::key::lookalike;
use crate::key::part::Part;
use crate::key::reason::Reason;
use crate::key::role::Role;
use crate::key::suffix;
use crate::key::table::{Entry, KeyTable};
use crate::key::{self, Foreign};
use crate::model::{self, KnownModule, Model};

/// Parts of words that name a kind of adapter, in lower case.
const ADAPTER_WORDS: [&str; 8] = [
    "lora", "lokr", "loha", "hada_w", "lycoris", "glora", "oft_", "boft_",
];
/// How tensors of whole models end.
const WEIGHT_ENDINGS: [&str; 6] = [
    ".weight",
    ".bias",
    ".gamma",
    ".beta",
    ".running_mean",
    ".running_var",
];
/// How tensors of quantized layers end, behind the layer's path.
const QUANTIZED_ENDINGS: [&str; 15] = [
    ".qweight",
    ".wscales",
    ".wzeros",
    ".wcscales",
    ".wtscale",
    ".smooth_factor",
    ".smooth_factor_orig",
    ".proj_down",
    ".proj_up",
    ".scale_weight",
    ".weight_scale",
    ".weight_scale_2",
    ".scale_input",
    ".input_scale",
    ".comfy_quant",
];
/// How those of bitsandbytes begin behind it.
const QUANTIZED_START: &str = ".weight.";

/// For a file without an adapter's tensor what it is, where that can be told.
pub(super) fn not_an_adapter(table: &KeyTable) -> Option<String> {
    let entries = table.entries();
    if entries.is_empty() {
        return Some("the file holds no tensor".to_owned());
    }
    if entries
        .iter()
        .any(|entry| is_of_adapter(entry) || is_of_unknown_kind(entry))
    {
        return None;
    }
    let weight = |entry: &&Entry| {
        let key = entry.tensor.key.as_str();
        let mut endings = WEIGHT_ENDINGS.iter().chain(&QUANTIZED_ENDINGS);
        endings.any(|ending| key.ends_with(ending))
    };
    let first = entries.iter().find(weight).map(|e| e.tensor.key.as_str());
    let (whose, key) = match Owner::of(entries) {
        Some(Owner::Part(Part::Embedding, key)) => {
            let (name, key) = (Part::Embedding.name(), Quoted::new(key));
            return Some(format!("{name}, not a LoRA (it has {key})"));
        }
        Some(Owner::Part(part, key)) => (format!(" of {}", part.name()), Some(key)),
        Some(Owner::Known(model) | Owner::Other(model)) => (format!(" of {model}"), first),
        None => (String::new(), first),
    };
    let (key, words) = (Quoted::new(key?), "not a LoRA: it holds whole weights, as");
    Some(format!("a checkpoint{whose}, {words} {key}"))
}

/// Whose most of a file is.
enum Owner<'e> {
    /// A part of a pipeline, with one of its keys.
    Part(Part, &'e str),
    /// A known model.
    Known(&'static str),
    /// Another model.
    Other(&'static str),
}

impl<'e> Owner<'e> {
    /// A file with all parts of a pipeline is its transformer's; one that steers a transformer has
    /// some of its names.
    fn of(entries: &'e [Entry]) -> Option<Self> {
        let parts: Vec<Option<Part>> = entries.iter().map(|e| Part::of(&e.tensor.key)).collect();
        let pairs = || entries.iter().zip(&parts);
        let keys = || pairs().map(|(entry, part)| (entry.tensor.key.as_str(), *part));
        let steers = |part: Part| matches!(part, Part::ControlNet | Part::IpAdapter);
        if let Some((part, key)) =
            keys().find_map(|(key, part)| Some((part.filter(|p| steers(*p))?, key)))
        {
            return Some(Self::Part(part, key));
        }
        let own = pairs().filter(|(_, part)| part.is_none());
        if let Some(model) = own.clone().find_map(|(entry, _)| own_model(entry)) {
            return Some(Self::Known(model));
        }
        let others: Vec<&str> = own.map(|(entry, _)| entry.tensor.key.as_str()).collect();
        if let Some(model) = lookalike_of(&others) {
            return Some(Self::Other(model));
        }
        let found = keys().filter_map(|(key, part)| Some((part?, key)));
        main_part(found).map(|(part, key)| Self::Part(part, key))
    }
}

/// For a file of adapters, none of them a module's, whose they are.
pub(super) fn nothing_found(table: &KeyTable) -> String {
    let entries = table.entries();
    if let Some(text) = unknown_form(entries).or_else(|| beyond_the_model(entries)) {
        return text;
    }
    match Owner::of(entries) {
        Some(Owner::Part(part, key)) => {
            return format!(
                "a LoRA of {}: nothing of it is the transformer's (it has {})",
                part.name(),
                Quoted::new(key)
            );
        }
        Some(Owner::Known(model)) => {
            return format!("no adapter of it is of a module of {model}, only whole weights are");
        }
        Some(Owner::Other(model)) => {
            return format!("a LoRA of another model, probably {model}");
        }
        None => {}
    }
    let key = entries.first().map_or("", |e| e.tensor.key.as_str());
    format!(
        "no key names a module of {} (the first is {})",
        Model::any(),
        Quoted::new(key)
    )
}

/// Modules of a known model, with endings that no trainer is known to write.
fn unknown_form(entries: &[Entry]) -> Option<String> {
    let (entry, id) = entries.iter().find_map(|e| Some((e, e.beside?)))?;
    let module = model::table().module(id);
    Some(format!(
        "a LoRA of {} of an unknown kind: {} names the module `{}`, with an ending that is not known",
        title(module),
        Quoted::new(&entry.tensor.key),
        module.path
    ))
}

fn beyond_the_model(entries: &[Entry]) -> Option<String> {
    let out_of_range = Some(Reason::Foreign(Foreign::BlockOutOfRange));
    let entry = entries.iter().find(|e| e.reason == out_of_range)?;
    let block = key::block_out_of_range(&entry.tensor.key)?;
    Some(format!(
        "a LoRA of another model: {} {block}",
        Quoted::new(&entry.tensor.key)
    ))
}

/// Whether a tensor is an adapter's, of whatever model.
fn is_of_adapter(entry: &Entry) -> bool {
    let key = &entry.tensor.key;
    let lower = key.to_lowercase();
    // Norms of checkpoints end in `.scale`, other parameters in `.alpha`.
    let is_adapters = |role: Role| role.is_factor() || matches!(role, Role::OftBlocks | Role::OftR);
    suffix::cut(key).is_some_and(|cut| is_adapters(cut.role))
        || ADAPTER_WORDS.iter().any(|word| lower.contains(word))
}

/// Whether a tensor stands beside a module, but is none of a quantized layer's.
fn is_of_unknown_kind(entry: &Entry) -> bool {
    entry.beside.is_some()
        && key::named_module(&entry.tensor.key).is_some_and(|(_, ending)| {
            !QUANTIZED_ENDINGS.contains(&ending.as_str()) && !ending.starts_with(QUANTIZED_START)
        })
}

/// The part that is the most frequent, with its first key.
fn main_part<'e>(found: impl Iterator<Item = (Part, &'e str)>) -> Option<(Part, &'e str)> {
    let mut counts: HashMap<Part, (usize, &str)> = HashMap::new();
    for (part, key) in found {
        counts.entry(part).or_insert((0, key)).0 += 1;
    }
    // Of equals the first of the kinds.
    let most = counts
        .into_iter()
        .max_by_key(|(part, (count, _))| (*count, Reverse(*part)));
    most.map(|(part, (_, key))| (part, key))
}

/// The known model of which the tensor is a module's weight or its kin.
fn own_model(entry: &Entry) -> Option<&'static str> {
    let id = entry.beside.or_else(|| {
        let plain = Some(Reason::Foreign(Foreign::PlainWeight));
        let stem = entry.tensor.key.rsplit_once('.')?.0;
        key::resolve(stem).filter(|_| entry.reason == plain)
    })?;
    Some(title(model::table().module(id)))
}

fn title(module: &KnownModule) -> &'static str {
    module.model.title()
}

/// The model that the most telling of the keys gives away.
fn lookalike_of(keys: &[&str]) -> Option<&'static str> {
    let found = keys.iter().filter_map(|key| lookalike::witness(key));
    let found = found.min_by_key(|lookalike| lookalike.place)?;
    Some(lookalike::by_blocks(found.model, keys.iter().copied()))
}
