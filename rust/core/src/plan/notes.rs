//! Remarks on a file that change no verdict.

use crate::adapter::delta::{Delta, Form};
use crate::adapter::module::{Module, ScaleSource};
use crate::adapter::peft::AdapterConfig;
use crate::adapter::{Adapter, PieceKind};
use crate::header::Quoted;
use crate::key::reason::Reason;
use crate::key::role::Role;
use crate::key::table::Entry;
use crate::key::{self, Foreign};
use crate::model::{self, KnownModule, Layer, Model, Section};
use crate::plan::FilePlan;
use crate::plan::check::ModelCheck;
use crate::plan::exactness::{DENSE_BUDGET, MOST_RANKS};

/// Metadata keys under which trainers name the base model.
const BASE_MODEL_KEYS: [&str; 2] = ["ss_base_model_version", "modelspec.architecture"];

/// How a segment ends that names a scale, in lower case.
const SCALE_ENDS: [&str; 4] = ["alpha", "scale", "scaling", "multiplier"];
/// Segments that name one for the whole file.
const SCALE_NAMES: [&str; 6] = [
    "alpha",
    "lora_alpha",
    "lora_scale",
    "lora_scaling",
    "network_alpha",
    "scaling",
];

pub(crate) fn take(plan: &FilePlan, config: Option<&AdapterConfig>) -> Vec<String> {
    let mut notes = Vec::new();
    if plan.check == ModelCheck::Known(Model::QwenImage) && could_be_flux(plan) {
        notes.push(
            "only attention layers of the first 20 blocks: a FLUX or HunyuanVideo LoRA could look the \
             same"
                .to_owned(),
        );
    }
    notes.extend(name_note(plan));
    notes.extend(cut_notes(plan));
    notes.extend(scale_note(plan));
    if let Some(config) = config {
        let has_alpha = plan.table.entries().iter().any(|e| e.role == Role::Alpha);
        if has_alpha && config.use_rslora() {
            notes.push(
                "stored alphas and rsLoRA metadata together: alpha / rank is used".to_owned(),
            );
        }
        notes.extend(rank_note(plan, config));
        notes.extend(config_note(plan, config));
    }
    notes
}

/// Models may share every name and shape, and trainers write one name for several models: the
/// metadata's name decides nothing.
fn name_note(plan: &FilePlan) -> Option<String> {
    let ModelCheck::Known(model) = plan.check else {
        return None;
    };
    let is_known = |name: &str| {
        let bare = name.to_lowercase().replace(['-', '_'], "");
        bare.is_empty() || Model::ALL.iter().any(|model| model.is_named_by(&bare))
    };
    let (_, name) = plan
        .metadata
        .iter()
        .filter(|(key, _)| BASE_MODEL_KEYS.contains(&key.as_str()))
        .find(|(_, name)| !is_known(name))?;
    Some(format!(
        "the metadata names another model, {}: names and shapes are {model}'s",
        Quoted::new(name)
    ))
}

/// Notes on deltas that are cut to the best that fits: `all modules are applied` does not say so.
fn cut_notes(plan: &FilePlan) -> Vec<String> {
    let deltas: Vec<(&KnownModule, &Delta)> = plan
        .applied_modules()
        .map(|module| (model::table().module(module.id), module))
        .filter(|(known, _)| known.layer.is_some_and(Layer::is_quantized))
        .flat_map(|(known, module)| module.deltas.iter().map(move |delta| (known, delta)))
        .collect();
    let mut notes = Vec::new();
    let ranks = |(known, delta): &&(&KnownModule, &Delta)| {
        let is_rank = delta.piece_kind() == PieceKind::LowRank;
        is_rank && !matches!(known.layer, Some(Layer::Awq { .. }))
    };
    let full = |(_, delta): &&(&KnownModule, &Delta)| matches!(delta.form, Form::Full { .. });
    let beyond = |(_, delta): &&(&KnownModule, &Delta)| delta.rank_bound() > MOST_RANKS;
    let mut say = |count: usize, what: &str, becomes: &str| {
        if count > 0 {
            let all = plan.modules.len();
            notes.push(format!("{what} ({count} of {all} modules): {becomes}"));
        }
    };
    say(
        deltas.iter().filter(ranks).filter(beyond).count(),
        "more ranks than a quantized layer takes",
        "cut to the best that fit; the report of composing says what that loses",
    );
    say(
        deltas.iter().filter(full).count(),
        "full deltas of quantized layers",
        &format!(
            "whole as far as `dense_budget` goes ({} MiB); beyond it cut to the best \
             `truncated_rank` ranks, or left out where that loses more than `max_energy_lost`",
            DENSE_BUDGET >> 20
        ),
    );
    notes
}

fn rank_note(plan: &FilePlan, config: &AdapterConfig) -> Option<String> {
    plan.modules
        .iter()
        .filter(|m| m.adapter == Adapter::Lora)
        .find_map(|module| {
            let path = &model::table().module(module.id).path;
            let (stored, promised) = (module.rank?, config.promised_rank(path)?);
            (stored != promised).then(|| {
                format!("`{path}` has rank {stored}, the metadata says {promised}: the tensors win")
            })
        })
}

/// Values beside pairs that are called like a scale, but stand where no trainer that is known writes
/// one.
fn scale_note(plan: &FilePlan) -> Option<String> {
    if !matches!(plan.check, ModelCheck::Known(_)) {
        return None;
    }
    let mut unread = plan.table.entries().iter().filter(|e| is_unread_scale(e));
    let key = Quoted::new(&unread.next()?.tensor.key);
    Some(match unread.count() {
        0 => format!("{key} looks like a scale and is not understood: the scale may be wrong"),
        more => format!(
            "{} tensors, e.g. {key}, look like scales and are not understood: the scales may be \
             wrong",
            more + 1
        ),
    })
}

fn is_unread_scale(entry: &Entry) -> bool {
    let key = entry.tensor.key.to_lowercase();
    let is_alone = || SCALE_NAMES.contains(&key.rsplit('.').next().unwrap_or_default());
    let is_beside = || {
        let ending = key::named_module(&entry.tensor.key)?.1.to_lowercase();
        let is_scale = |segment: &str| SCALE_ENDS.iter().any(|end| segment.ends_with(end));
        Some(ending.split('.').any(is_scale) && !ending.contains("dora"))
    };
    entry.elements() == 1
        && match entry.reason {
            Some(Reason::Foreign(Foreign::UnknownForm)) => is_beside().unwrap_or_default(),
            Some(Reason::Foreign(Foreign::NotAModule)) => is_alone(),
            _ => false,
        }
}

/// A scale of which the configuration says something that is not used.
fn config_note(plan: &FilePlan, config: &AdapterConfig) -> Option<String> {
    let unused = config.unused()?;
    let is_one = |module: &Module| matches!(module.scale_source, ScaleSource::Nothing);
    plan.modules.iter().any(is_one).then(|| {
        format!("the configuration {unused}: its alpha is not used, the scale may be wrong")
    })
}

/// FLUX and HunyuanVideo have the same names and widths for all linears and norms of the attention,
/// and 19 and 20 such blocks.
fn could_be_flux(plan: &FilePlan) -> bool {
    plan.modules.iter().all(|module| {
        let known = model::table().module(module.id);
        let is_attention = known.section == Section::Attention;
        known.block.is_some_and(|block| block <= 19) && is_attention
    })
}
