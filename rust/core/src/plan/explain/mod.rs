//! One key of a file, explained: what is cut off it, the module it names, the scale of that module
//! and where it comes from, and what becomes of the tensor.

mod nearest;
mod unread;

use serde::{Serialize, Serializer};

use crate::adapter::Adapter;
use crate::adapter::module::{Module, ScaleSource};
use crate::key;
use crate::key::role::Role;
use crate::key::suffix;
use crate::key::table::Entry;
use crate::model::{self, KnownModule};
use crate::plan::FilePlan;
use crate::plan::check::ModelCheck;
pub use unread::Unread;

/// One key of a file, explained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The key.
    pub key: String,
    /// Its tensor's dtype.
    pub dtype: &'static str,
    /// Its tensor's shape.
    pub shape: Vec<u64>,
    /// The value of a stored scalar.
    #[serde(serialize_with = "number")]
    pub value: Option<f64>,
    /// How the grammar takes the key apart; none where it names no module of a known model.
    pub reading: Option<Reading>,
    /// The tensor's part in the light of the whole file: a lone `lora_A` of the weight's size is a
    /// `diff`.
    pub role: Role,
    /// The module that the tensor belongs to, unless it is ignored.
    pub module: Option<ModuleExplanation>,
    /// Its fate.
    pub fate: Fate,
}

/// A key taken apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reading {
    /// Prefixes that are cut, in order.
    pub prefixes: Vec<&'static str>,
    /// Names of wrappers that are taken out, in order: the model was wrapped when it was saved.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrappers: Vec<String>,
    /// The path as the key spells it.
    pub spelling: String,
    /// The canonical path.
    #[serde(rename = "target")]
    pub module: &'static str,
    /// The ending that is cut.
    pub suffix: String,
    /// The tensor's part, by its ending.
    pub role: Role,
    /// For a float8 scale, the role of the tensor that it scales.
    pub scales: Option<Role>,
    /// Adapter names inside the suffix, as PEFT writes them.
    pub adapter_name: Option<String>,
}

/// A module as a file trains it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModuleExplanation {
    /// The canonical path.
    #[serde(rename = "target")]
    pub path: &'static str,
    /// The slot that computes it in Nunchaku's model: a fused one holds several modules.
    pub slot: &'static str,
    /// Its part among the slot's parts, counted from 0.
    pub part: usize,
    /// Into how many parts the slot's rows are cut.
    pub parts: usize,
    /// Kind of adapter.
    pub adapter: Adapter,
    /// Rank of the delta or an upper bound; none for norms and lone biases.
    pub rank: Option<u64>,
    /// Factor on the weight's raw delta at strength 1, float8 scales included.
    pub scale: f64,
    /// The ground of that, float8 scales aside.
    pub scale_rule: ScaleSource<String>,
    /// Keys of float8 scales, each multiplied in.
    pub float8_scales: Vec<String>,
    /// Factor on the delta that this tensor is a part of; none for scalars.
    pub tensor_scale: Option<f64>,
    /// Keys of all of the module's tensors, this one included.
    pub keys: Vec<String>,
}

/// The fate of a tensor on a released model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "fate", rename_all = "snake_case")]
pub enum Fate {
    /// It takes part in what is applied.
    Applied,
    /// Its module is applied, without it.
    LeftOut {
        /// Why.
        reason: String,
    },
    /// Its module is not applied.
    NotApplied {
        /// Why.
        reason: String,
    },
    /// It belongs to no module, or repeats what another tensor says.
    Ignored {
        /// Why.
        reason: String,
        /// Whether nothing of an adapter is lost with it.
        harmless: bool,
    },
}

impl Reading {
    /// Takes a key apart, whatever file it is of; none where it names no module of a known model.
    pub fn of(key: &str) -> Option<Self> {
        let cut = suffix::cut(key)?;
        let resolved = key::resolve_with_prefixes(cut.stem)?;
        Some(Self {
            prefixes: resolved.prefixes,
            wrappers: resolved.wrappers,
            spelling: resolved.path,
            module: path_of(model::table().module(resolved.module)),
            suffix: key.get(cut.stem.len()..)?.to_owned(),
            role: cut.role,
            scales: cut.scales,
            adapter_name: (!cut.adapter_name.is_empty()).then(|| cut.adapter_name.to_owned()),
        })
    }
}

impl FilePlan {
    /// Explains a key of the file; none where the file has no such key.
    pub fn explain(&self, key: &str) -> Option<Explanation> {
        let entries = self.table.entries();
        let index = entries.iter().position(|e| e.tensor.key == key)?;
        let entry = entries.get(index)?;
        let module = self.modules.iter().find(|m| m.tensors.contains(&index));
        Some(Explanation {
            key: key.to_owned(),
            dtype: entry.tensor.dtype.name(),
            shape: entry.tensor.shape.clone(),
            value: entry.value,
            reading: Reading::of(key),
            role: entry.role,
            module: module.map(|module| explain_module(module, index, entries)),
            fate: self.fate(index, entry, module),
        })
    }

    /// Keys of the file that somebody who wrote `key` may have meant, the likeliest first: those of
    /// the module that it names, those that hold it, those that are spelled much like it.
    pub fn nearest_keys(&self, key: &str, at_most: usize) -> Vec<&str> {
        nearest::nearest(self.table.entries(), key, at_most)
    }

    fn fate(&self, index: usize, entry: &Entry, module: Option<&Module>) -> Fate {
        if let Some(reason) = &entry.reason {
            return Fate::Ignored {
                reason: reason.text(),
                harmless: reason.is_harmless(),
            };
        }
        let not_applied = |reason: &str| Fate::NotApplied {
            reason: reason.to_owned(),
        };
        let known = matches!(self.check, ModelCheck::Known(_));
        let Some(module) = module.filter(|_| known) else {
            return not_applied(&self.reason().unwrap_or_default());
        };
        if let Some(fault) = &module.fault {
            return not_applied(fault.text());
        }
        if let Some(text) = &module.misfit {
            return not_applied(text);
        }
        if let Some((_, reason)) = module.left_out.iter().find(|(i, _)| *i == index) {
            return Fate::LeftOut {
                reason: reason.clone(),
            };
        }
        if self.applied_modules().any(|m| m.id == module.id) {
            Fate::Applied
        } else {
            not_applied(&self.reason().unwrap_or_default())
        }
    }
}

fn explain_module(module: &Module, index: usize, entries: &[Entry]) -> ModuleExplanation {
    let known = model::table().module(module.id);
    let own = || module.tensors.iter().filter_map(|&i| entries.get(i));
    let key = |index: usize| {
        let entry = entries.get(index);
        entry.map(|e| e.tensor.key.clone()).unwrap_or_default()
    };
    let delta = module.deltas.iter().find(|delta| delta.holds(index));
    ModuleExplanation {
        path: path_of(known),
        slot: &known.place.slot,
        part: known.place.part,
        parts: known.place.parts,
        adapter: module.adapter,
        rank: module.rank,
        scale: module.scale,
        scale_rule: module.scale_source.map(key),
        float8_scales: own()
            .filter(|e| e.role == Role::Fp8Scale)
            .map(|e| e.tensor.key.clone())
            .collect(),
        tensor_scale: delta.map(|delta| delta.scale),
        keys: own().map(|e| e.tensor.key.clone()).collect(),
    }
}

fn path_of(module: &'static KnownModule) -> &'static str {
    &module.path
}

/// A number, or its name where JSON has none.
#[expect(clippy::ref_option, reason = "serde hands over a reference")]
fn number<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) if !value.is_finite() => serializer.serialize_str(&value.to_string()),
        other => other.serialize(serializer),
    }
}
