//! The FilePlan as a JSON document, schema 1.

use std::collections::HashMap;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::adapter::delta::Delta;
use crate::adapter::exactness::Exactness;
use crate::adapter::{Adapter, PieceKind};
use crate::key::reason::Reason;
use crate::key::role::Role;
use crate::key::table::Entry;
use crate::model::{self, KnownModule};
use crate::plan::FilePlan;
use crate::plan::check::ModelCheck;
use crate::plan::component::Component;

/// Version of the document; fields may be added within it.
pub const SCHEMA: u32 = 1;
/// Reason given to every tensor of a file that is another model's.
const OTHER_MODEL: &str = "other model";

#[derive(Serialize)]
struct Document<'p> {
    schema: u32,
    path: Option<String>,
    size_bytes: u64,
    model: Option<&'static str>,
    verdict: &'static str,
    reason: Option<String>,
    notes: &'p [String],
    #[serde(serialize_with = "as_map")]
    metadata: &'p [(String, String)],
    tensors: Vec<TensorRow<'p>>,
    modules: Vec<ModuleRow>,
    slots: Vec<SlotRow>,
    components: Vec<Component>,
}

#[derive(Serialize)]
struct TensorRow<'p> {
    key: &'p str,
    dtype: &'static str,
    shape: &'p [u64],
    #[serde(rename = "target")]
    module: Option<&'static str>,
    role: &'static str,
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct ModuleRow {
    #[serde(rename = "target")]
    path: &'static str,
    adapter: Adapter,
    rank: Option<u64>,
    scale: f64,
    supported: bool,
    /// On a released model as Nunchaku quantizes it; none where it is not applied.
    exactness: Option<Exactness>,
    reason: Option<String>,
    pieces: Vec<PieceRow>,
}

/// A delta of a module, of the kind that it is where a slot can carry it as it is stored.
#[derive(Serialize)]
struct PieceRow {
    kind: PieceKind,
    adapter: Adapter,
    rank: u64,
    scale: f64,
}

impl PieceRow {
    fn of(delta: &Delta) -> Self {
        Self {
            kind: delta.piece_kind(),
            adapter: delta.adapter,
            rank: delta.rank_bound(),
            scale: delta.scale,
        }
    }
}

/// A slot that the file reaches on a released model.
#[derive(Debug, Clone, Serialize)]
pub struct SlotRow {
    /// The slot's path.
    pub slot: String,
    /// Upper bound of the file's rank in it: before padding, without the base.
    pub rank: u64,
    /// The modules that are computed in it.
    pub parts: Vec<&'static str>,
}

impl FilePlan {
    /// The document as one line of JSON.
    pub fn to_json(&self) -> String {
        let other = !matches!(self.check, ModelCheck::Known(_));
        let left_out: HashMap<usize, &str> = self
            .modules
            .iter()
            .flat_map(|m| m.left_out.iter().map(|(i, text)| (*i, text.as_str())))
            .collect();
        let document = Document {
            schema: SCHEMA,
            path: self.path.as_ref().map(|p| p.display().to_string()),
            size_bytes: self.size_bytes,
            model: self.model().map(model::Model::name),
            verdict: self.verdict().name(),
            reason: self.reason(),
            notes: &self.notes,
            metadata: &self.metadata,
            tensors: self
                .table
                .entries()
                .iter()
                .enumerate()
                .map(|(i, e)| Self::tensor_row(e, left_out.get(&i), other))
                .collect(),
            modules: if other {
                Vec::new()
            } else {
                self.module_rows()
            },
            slots: self.slot_rows(),
            components: self.components(),
        };
        // Strings and finite numbers always serialise: scales are checked to be finite, and values
        // that are not are spelled out.
        serde_json::to_string(&document).unwrap_or_default()
    }

    fn tensor_row<'p>(entry: &'p Entry, left_out: Option<&&str>, other: bool) -> TensorRow<'p> {
        let (module, role, reason) = if other && !is_told(entry) {
            (None, Role::Ignored, Some(OTHER_MODEL.to_owned()))
        } else {
            let reason = entry.reason.as_ref().map(Reason::text);
            (
                entry.module,
                entry.role,
                reason.or_else(|| left_out.map(|t| (*t).to_owned())),
            )
        };
        TensorRow {
            key: &entry.tensor.key,
            dtype: entry.tensor.dtype.name(),
            shape: &entry.tensor.shape,
            module: module.map(|id| path_of(model::table().module(id))),
            role: role.name(),
            reason,
            value: entry.value.map(number),
        }
    }

    fn module_rows(&self) -> Vec<ModuleRow> {
        let applied = self.exactness().into_iter();
        let applied: HashMap<_, _> = applied.map(|(own, class)| (own.id, class)).collect();
        self.modules
            .iter()
            .map(|module| ModuleRow {
                path: path_of(model::table().module(module.id)),
                adapter: module.adapter,
                rank: module.rank,
                scale: module.scale,
                supported: applied.contains_key(&module.id),
                exactness: applied.get(&module.id).copied(),
                reason: module
                    .fault
                    .as_ref()
                    .map(|f| f.text().to_owned())
                    .or_else(|| module.misfit.clone()),
                pieces: module.deltas.iter().map(PieceRow::of).collect(),
            })
            .collect()
    }

    /// The slots that the file reaches on a released model, in file order.
    pub fn slot_rows(&self) -> Vec<SlotRow> {
        let mut rows: Vec<SlotRow> = Vec::new();
        let mut index = HashMap::new();
        for module in self.applied_modules() {
            let known = model::table().module(module.id);
            let at = *index.entry(known.place.slot.as_str()).or_insert_with(|| {
                rows.push(SlotRow {
                    slot: known.place.slot.clone(),
                    rank: 0,
                    parts: Vec::new(),
                });
                rows.len() - 1
            });
            if let Some(row) = rows.get_mut(at) {
                let ranks = module.deltas.iter().map(Delta::rank_bound);
                row.rank = ranks.fold(row.rank, u64::saturating_add);
                if known.is_fused() {
                    row.parts.extend(
                        known
                            .split
                            .iter()
                            .map(|t| path_of(model::table().module(*t))),
                    );
                } else {
                    row.parts.push(path_of(known));
                }
            }
        }
        rows
    }
}

/// Whether a tensor's own reason says more than that the file is another model's.
fn is_told(entry: &Entry) -> bool {
    use crate::key::Foreign;
    match entry.reason {
        Some(Reason::Foreign(foreign)) => match foreign {
            Foreign::TextEncoder
            | Foreign::Vae
            | Foreign::Embedding
            | Foreign::UnknownForm
            | Foreign::PlainWeight
            | Foreign::Parameter
            | Foreign::BlockOutOfRange => true,
            Foreign::Bookkeeping
            | Foreign::BaseWeight
            | Foreign::TrainedBias
            | Foreign::Unused
            | Foreign::NotAModule => false,
        },
        _ => false,
    }
}

fn path_of(module: &'static KnownModule) -> &'static str {
    &module.path
}

/// A number, or its name where JSON has none.
fn number(value: f64) -> serde_json::Value {
    serde_json::Number::from_f64(value)
        .map_or_else(|| value.to_string().into(), serde_json::Value::Number)
}

fn as_map<S: Serializer>(rows: &&[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(rows.len()))?;
    for (key, value) in *rows {
        map.serialize_entry(key, value)?;
    }
    map.end()
}
