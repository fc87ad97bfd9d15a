//! One key: `{prefix} path suffix`, resolved by look-up.
//!
//! The path is looked up before every prefix is stripped: `transformer.` is a prefix, and also how
//! an over-dotted `transformer.blocks.0…` begins. Names of wrappers are taken out of a path that is
//! not found as it is.

use std::borrow::Cow;

use super::wrapper;
use crate::key::part::Part;
use crate::key::role::Role;
use crate::key::suffix;
use crate::model::{self, ModuleId, strip_flat};

/// Prefixes that trainers and runtimes put before a path. They stack.
pub const PREFIXES: [&str; 14] = [
    "model.",
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "module.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lycoris__",
    "lycoris_",
    "lora_transformer_",
    "lora_",
];

/// Most prefixes that are stripped from one key; real files stack three.
const MAX_PREFIXES: usize = 8;
/// Longest path, with prefixes and wrappers, beside which an unknown ending is looked for.
const MAX_PATH_BYTES: usize = 256;
/// Most places of a key at which a module's path may end; flat keys have about twenty.
const MAX_JOINTS: usize = 24;

/// Why a key belongs to no module of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Foreign {
    /// A text encoder's LoRA.
    TextEncoder,
    /// A VAE's weights.
    Vae,
    /// A textual-inversion embedding.
    Embedding,
    /// Counters and markers of a tool.
    Bookkeeping,
    /// The base model's own weight, saved with the adapter.
    BaseWeight,
    /// A bias that was trained and saved whole: to apply it, the base's would have to be known.
    TrainedBias,
    /// A module's own weight or bias: this is (also) a checkpoint.
    PlainWeight,
    /// A block that the model does not have.
    BlockOutOfRange,
    /// A module's tensor whose ending is not in the grammar.
    UnknownForm,
    /// A module that a host's class of the model has, and never calls.
    Unused,
    /// A parameter of the model that is no module's.
    Parameter,
    /// Anything else.
    NotAModule,
}

impl Foreign {
    /// The reason in reports.
    pub fn reason(self) -> &'static str {
        match self {
            Self::TextEncoder => "text encoder",
            Self::Vae => "VAE",
            Self::Embedding => "embedding",
            Self::Bookkeeping => "bookkeeping",
            Self::BaseWeight => "base weight saved along",
            Self::TrainedBias => "a trained bias, saved whole and not as a delta",
            Self::PlainWeight => "a checkpoint's weight",
            Self::BlockOutOfRange => "block index out of range",
            Self::UnknownForm => "unknown kind of tensor",
            Self::Unused => "a module that the model never uses",
            Self::Parameter => "a parameter of the model that takes no delta",
            Self::NotAModule => "not a transformer module",
        }
    }

    /// Whether losing the tensor loses nothing of an adapter.
    pub fn is_harmless(self) -> bool {
        matches!(self, Self::Bookkeeping | Self::BaseWeight | Self::Unused)
    }
}

/// The meaning of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParsedKey<'k> {
    /// A tensor of a known module.
    Module {
        /// The module.
        module: ModuleId,
        /// The key up to the suffix: how it spells the module.
        stem: &'k str,
        /// The tensor's part in it.
        role: Role,
        /// Adapter names of PEFT's spelling.
        adapter_name: &'k str,
        /// For a float8 scale, the role of the tensor that it scales.
        scales: Option<Role>,
        /// A pair without `.weight`.
        bare: bool,
    },
    /// Anything else.
    Foreign {
        /// Why.
        reason: Foreign,
        /// For [`Foreign::UnknownForm`], the module that the key names.
        beside: Option<ModuleId>,
    },
}

/// Parses one key.
pub fn parse(key: &str) -> ParsedKey<'_> {
    parse_beside(key, None)
}

/// Parses one key; `known` is another key's stem and the module that it names. A module's tensors
/// mostly follow each other.
pub(crate) fn parse_beside<'k>(key: &'k str, known: Option<(&str, ModuleId)>) -> ParsedKey<'k> {
    let find = |stem: &str| match known {
        Some((known, module)) if known == stem => Some(module),
        _ => resolve(stem),
    };
    if let Some(cut) = suffix::cut(key)
        && let Some(module) = find(cut.stem)
    {
        return ParsedKey::Module {
            module,
            stem: cut.stem,
            role: cut.role,
            adapter_name: cut.adapter_name,
            scales: cut.scales,
            bare: cut.bare,
        };
    }
    let (reason, beside) = foreign(key);
    ParsedKey::Foreign { reason, beside }
}

/// How a stem is taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The module.
    pub module: ModuleId,
    /// The prefixes that were stripped, in order.
    pub prefixes: Vec<&'static str>,
    /// The wrappers' names that were taken out, in order.
    pub wrappers: Vec<String>,
    /// The path that was looked up, as the key spells it.
    pub path: String,
}

/// The module that a stem (prefixes and path) names.
pub fn resolve(stem: &str) -> Option<ModuleId> {
    // A converter that turned the dot before its own suffix into `_`, too, left one at the end.
    module_of(stem).or_else(|| module_of(stem.strip_suffix('_')?))
}

fn module_of(stem: &str) -> Option<ModuleId> {
    let path = without_processor(stem);
    let find = |path: &str| find_stripped(path, &mut Vec::new());
    find(&path).or_else(|| find(&wrapper::unwrap(&path)?.0))
}

/// The module that a stem names, and how the stem spells it.
pub fn resolve_with_prefixes(stem: &str) -> Option<Resolved> {
    resolve_as_it_is(stem).or_else(|| {
        let resolved = resolve_as_it_is(stem.strip_suffix('_')?)?;
        let path = resolved.path + "_";
        Some(Resolved { path, ..resolved })
    })
}

fn resolve_as_it_is(stem: &str) -> Option<Resolved> {
    let path = without_processor(stem);
    resolve_path(&path, Vec::new()).or_else(|| {
        let (path, wrappers) = wrapper::unwrap(&path)?;
        resolve_path(&path, wrappers)
    })
}

fn resolve_path(path: &str, wrappers: Vec<String>) -> Option<Resolved> {
    let mut prefixes = Vec::new();
    let module = find_stripped(path, &mut prefixes)?;
    let stripped: usize = prefixes.iter().map(|prefix| prefix.len()).sum();
    let path = path.get(stripped..)?.to_owned();
    Some(Resolved {
        module,
        prefixes,
        wrappers,
        path,
    })
}

/// The module of a path; `prefixes` takes those that are stripped.
fn find_stripped(path: &str, prefixes: &mut Vec<&'static str>) -> Option<ModuleId> {
    search(path, prefixes, &|path| model::table().find(path))
}

/// Tries the path as it is, then without each prefix that fits; `stripped` holds those that are
/// gone, at most [`MAX_PREFIXES`].
fn search<T>(
    path: &str,
    stripped: &mut Vec<&'static str>,
    find: &impl Fn(&str) -> Option<T>,
) -> Option<T> {
    if let Some(found) = find(path) {
        return Some(found);
    }
    if stripped.len() >= MAX_PREFIXES {
        return None;
    }
    PREFIXES.iter().find_map(|prefix| {
        let rest = path.strip_prefix(prefix)?;
        stripped.push(prefix);
        let found = search(rest, stripped, find);
        if found.is_none() {
            stripped.pop();
        }
        found
    })
}

/// Old diffusers files put attention processors into the path.
fn without_processor(stem: &str) -> Cow<'_, str> {
    if stem.contains(".processor.") {
        Cow::Owned(stem.replacen(".processor.", ".", 1))
    } else {
        Cow::Borrowed(stem)
    }
}

const TEXT_ENCODERS: [&str; 7] = [
    "text_encoder",
    "lora_te",
    "te.",
    "te1.",
    "te2.",
    "conditioner.",
    "text_model",
];

/// The reason, and the module beside which a tensor of unknown kind stands.
fn foreign(key: &str) -> (Foreign, Option<ModuleId>) {
    let unwrapped = wrapper::unwrap(key);
    let bare = unwrapped.as_ref().map_or(key, |(bare, _)| bare);
    let starts = |names: &[&str]| names.iter().any(|name| bare.starts_with(name));
    let reason = if key.contains(".base_layer.") {
        Foreign::BaseWeight
    } else if starts(&TEXT_ENCODERS) {
        Foreign::TextEncoder
    } else if starts(&["vae.", "first_stage_model."]) {
        Foreign::Vae
    } else if starts(&["bundle_emb.", "emb_params", "string_to_param"]) {
        Foreign::Embedding
    } else if starts(&["_aux.", "scaled_fp8", "__"]) || key.ends_with(".scaled_fp8") {
        Foreign::Bookkeeping
    } else if key.strip_suffix(".bias").and_then(resolve).is_some() {
        Foreign::PlainWeight
    } else if names(bare, |path| model::table().is_unused(path)) {
        Foreign::Unused
    } else if names(bare, |path| model::table().is_parameter(path)) {
        Foreign::Parameter
    } else if block_out_of_range(bare).is_some() {
        Foreign::BlockOutOfRange
    } else if let Some((module, _)) = named_module(key) {
        return (Foreign::UnknownForm, Some(module));
    } else {
        match Part::of(bare) {
            Some(Part::TextEncoder) => Foreign::TextEncoder,
            Some(Part::Vae) => Foreign::Vae,
            Some(Part::Embedding) => Foreign::Embedding,
            Some(Part::ControlNet | Part::IpAdapter | Part::Upscaler | Part::ImageEncoder)
            | None => Foreign::NotAModule,
        }
    };
    (reason, None)
}

/// Whether a key names, behind any prefix, a path of which this is true.
fn names(key: &str, is_one: impl Fn(&str) -> bool) -> bool {
    let find = |path: &str| is_one(path).then_some(());
    suffix::cut(key).is_some_and(|cut| search(cut.stem, &mut Vec::new(), &find).is_some())
}

/// For a key, or a path without an ending, that names a module of a block whose number the model
/// does not have: which the model has, in words.
pub(crate) fn block_out_of_range(key: &str) -> Option<String> {
    let unwrapped = wrapper::unwrap(key);
    let bare = unwrapped.as_ref().map_or(key, |(bare, _)| bare);
    let stem = suffix::cut(bare).map_or(bare, |cut| cut.stem);
    let path = without_processor(stem);
    let in_another_block = |path: &str| {
        model::block_kinds().find_map(|blocks| {
            let group = blocks.path;
            let rest = strip_flat(strip_flat(path, group)?, "_")?;
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, rest) = rest.split_at_checked(digits)?;
            let beyond = number
                .parse::<u32>()
                .map_or(!number.is_empty(), |n| n >= blocks.count);
            let module = beyond.then(|| model::table().find(&format!("{group}_0{rest}")))??;
            let model = model::table().module(module).model.title();
            let last = blocks.count - 1;
            Some(format!(
                "names a block that {model} does not have (its last is `{group}.{last}`)"
            ))
        })
    };
    search(&path, &mut Vec::new(), &in_another_block)
}

/// The module whose path a leading part of the key, or all of it, is, and what follows the path.
pub(crate) fn named_module(key: &str) -> Option<(ModuleId, String)> {
    named_as_it_is(key).or_else(|| named_as_it_is(&wrapper::unwrap(key)?.0))
}

fn named_as_it_is(key: &str) -> Option<(ModuleId, String)> {
    let is_flat = !key.contains('.');
    let is_joint = |byte: u8| byte == b'.' || (is_flat && byte == b'_');
    let joints = key.bytes().enumerate().filter(|(_, byte)| is_joint(*byte));
    // Deep keys are not modules of ours; the bounds keep a hostile name cheap.
    let starts = joints.take(MAX_JOINTS).map(|(at, _)| at);
    let starts = starts.chain([key.len()]);
    let mut starts = starts.take_while(|at| *at <= MAX_PATH_BYTES);
    starts.find_map(|at| {
        let path = without_processor(key.get(..at)?);
        let find = |path: &str| find_stripped(path, &mut Vec::new());
        let module = find(&path).or_else(|| find(path.strip_suffix('_')?))?;
        Some((module, key.get(at..)?.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(stem: &str) -> Option<&'static str> {
        resolve(stem).map(|id| model::table().module(id).path.as_str())
    }

    #[test]
    fn prefixes_stack_and_stop_at_the_module() {
        for stem in [
            "transformer_blocks.3.attn.to_q",
            "transformer.transformer_blocks.3.attn.to_q",
            "transformer.base_model.model.transformer_blocks.3.attn.to_q",
            "model.diffusion_model.transformer_blocks.3.attn.to_q",
            "diffusion_model.transformer.blocks.3.attn.to.q",
            "lora_unet_transformer_blocks_3_attn_to_q",
            "lora_unet__transformer_blocks_3_attn_to_q",
            "lora_transformer_transformer_blocks_3_attn_to_q",
            "lora_transformer_blocks_3_attn_to_q",
            "lycoris__transformer_blocks_3_attn_to_q",
            "pipe.dit.transformer_blocks.3.attn.to_q",
            "transformer.transformer_blocks.3.attn.processor.to_q",
            "transformer.transformer_blocks.3._orig_mod.attn.processor.to_q",
            "module.transformer_blocks.3.module.attn.to_q._orig_mod",
            "lora_unet_module_transformer_blocks_3__fsdp_wrapped_module_attn_to_q",
            "lora_unet__orig_mod_transformer_blocks_3_attn_to_q_",
            "diffusion_model.orig.mod.transformer.blocks.3.attn.to.q",
        ] {
            assert_eq!(path(stem), Some("transformer_blocks.3.attn.to_q"), "{stem}");
        }
        assert_eq!(path("transformer_blocks.60.attn.to_q"), None);
        assert_eq!(path("xtransformer_blocks.3.attn.to_q"), None);
        assert_eq!(path("norm_out_linear"), Some("norm_out.linear"));
    }

    #[test]
    fn foreign_keys_have_reasons() {
        let reason = |key| match parse(key) {
            ParsedKey::Foreign { reason, .. } => reason,
            ParsedKey::Module { .. } => panic!("{key} is a module"),
        };
        assert_eq!(reason("lora_te1_x.alpha"), Foreign::TextEncoder);
        assert_eq!(
            reason("lora_unet_transformer_blocks_60_attn_to_q.alpha"),
            Foreign::BlockOutOfRange
        );
        assert_eq!(
            reason("transformer_blocks.99999999999999.attn.to_q.alpha"),
            Foreign::BlockOutOfRange
        );
        assert_eq!(
            reason("transformer_blocks.0.attn.to_q.lora_C.weight"),
            Foreign::UnknownForm
        );
        assert_eq!(
            reason("lora_unet_transformer_blocks_0_attn_to_q_lora_C_weight"),
            Foreign::UnknownForm
        );
        assert_eq!(
            reason("_orig_mod.transformer_blocks.60.attn.to_q"),
            Foreign::BlockOutOfRange
        );
        assert_eq!(
            reason("_orig_mod.text_encoder.q.lora_A.weight"),
            Foreign::TextEncoder
        );
        assert_eq!(reason("x.base_layer.weight"), Foreign::BaseWeight);
        assert_eq!(reason("single_blocks.0.x.alpha"), Foreign::NotAModule);
        assert_eq!(reason("diffusion_model.norm_final.diff"), Foreign::Unused);
        assert_eq!(reason("lora_unet_norm_final.w_norm"), Foreign::Unused);
        assert_eq!(reason("x_norm_final.diff"), Foreign::NotAModule);
        assert_eq!(reason("x_pad_token.diff"), Foreign::Parameter);
        assert_eq!(reason("lora_unet_cap_pad_token.diff"), Foreign::Parameter);
        assert_eq!(reason("x_x_pad_token.diff"), Foreign::NotAModule);
        assert_eq!(reason("final_layer.norm_final.diff"), Foreign::NotAModule);
    }

    #[test]
    fn stacked_prefixes_stay_cheap() {
        let hostile = "lora_unet_".repeat(100) + "lycoris_" + &"model.".repeat(100);
        assert_eq!(resolve(&hostile), None);
        let module = "transformer_blocks.3.attn.to_q";
        let under = |prefixes: usize| "dit.".repeat(prefixes) + module;
        assert_eq!(path(&under(MAX_PREFIXES)), Some(module));
        assert_eq!(path(&under(MAX_PREFIXES + 1)), None);
        let deep = "_orig_mod.".to_owned() + &under(100_000) + ".lora_A.weight";
        let expected = ParsedKey::Foreign {
            reason: Foreign::NotAModule,
            beside: None,
        };
        assert_eq!(parse(&deep), expected);
    }
}
