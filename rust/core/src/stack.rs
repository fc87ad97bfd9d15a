//! File plans, strengths and the slots of the model at hand: the StackPlan.
//!
//! Everything is validated here, before a tensor is read or the model is touched.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, PieceKind};
use crate::dtype::Dtype;
use crate::model::{self, Model, Target};
use crate::module::{Fault, Module, Pair};
use crate::plan::{FilePlan, ModelCheck};
use crate::slot::{self, MODULATION_PLANES, RowOrder, Slot, SlotKind, pad_rank};
use crate::table::Entry;

/// Dtypes that the halves of a pair may be stored in.
const HALF_DTYPES: [Dtype; 6] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
];

/// One LoRA of a stack.
#[derive(Debug, Clone, Copy)]
pub struct StackItem<'p> {
    /// Its name in reports.
    pub name: &'p str,
    /// Its plan.
    pub plan: &'p FilePlan,
    /// Its strength.
    pub strength: f64,
}

/// What the caller asks for beside the stack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct StackOptions {
    /// Most ranks that the LoRAs may add to a slot; `None`: as many as the kernels take.
    pub max_rank: Option<u64>,
    /// Whether the modulation layers take part.
    pub modulation: bool,
    /// Whether anything that is left out is an error.
    pub strict: bool,
}

/// Why a module of a LoRA is not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipKind {
    /// The adapter or a part of it is not supported.
    Unsupported,
    /// Tensors are missing or contradict each other.
    Broken,
    /// The shape is not the module's.
    Shape,
    /// The model has no such module.
    Missing,
    /// The row order of this layer is not known.
    UnknownLayout,
    /// The caller turned these layers off.
    TurnedOff,
    /// A tensor of no module of the model.
    Foreign,
}

/// A module, or a tensor, that is left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Skip {
    /// Index of the LoRA.
    pub lora: usize,
    /// The module's path, or the tensor's key.
    pub name: String,
    /// Why, as a kind.
    pub kind: SkipKind,
    /// Why, in words.
    pub reason: String,
    /// The kind of piece that it would have been.
    pub piece: Option<PieceKind>,
    /// Whether the delta is incomplete without it.
    pub matters: bool,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorRef {
    /// Its key.
    pub key: String,
    /// Its safetensors dtype.
    pub dtype: &'static str,
    /// Its shape in the file.
    pub shape: Vec<u64>,
    /// Where its bytes begin in the file.
    pub offset_bytes: u64,
    /// How many there are.
    pub len_bytes: u64,
}

/// One delta that a slot carries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Piece {
    /// How it is executed.
    pub kind: PieceKind,
    /// Index of its LoRA.
    pub lora: usize,
    /// The module it came from.
    pub target: String,
    /// Its rank, or an upper bound.
    pub rank: u64,
    /// Factor on the raw product without the strength.
    pub scale: f64,
    /// First of the slot's logical output rows that it changes.
    pub row_begin: u64,
    /// How many rows it changes.
    pub row_count: u64,
    /// Its tensors, by role.
    pub tensors: BTreeMap<&'static str, TensorRef>,
}

/// One slot's pieces.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlotPlan {
    /// The slot's path.
    pub path: String,
    /// Its kind.
    pub kind: SlotKind,
    /// Order of its output rows.
    pub row_order: RowOrder,
    /// Rank of the base branch.
    pub base_rank: u64,
    /// Upper bound of the ranks added, each LoRA padded to 16, after the limit.
    pub rank: u64,
    /// Most ranks that may be added; `None`: no limit.
    pub rank_limit: Option<u64>,
    /// Index of its uniform-rank group.
    pub group: Option<usize>,
    /// The pieces, LoRA by LoRA in the order of the stack.
    pub pieces: Vec<Piece>,
}

/// Slots whose rank must be the same, because offload copies them through one buffer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankGroup {
    /// Their common path, the block's number replaced by `*`.
    pub pattern: String,
    /// All of them, those without a piece included.
    pub slots: Vec<String>,
    /// Upper bound of the rank that each gets.
    pub rank: u64,
}

/// What will be done to the model at hand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StackPlan {
    /// Version of the document.
    pub schema: u32,
    /// The slots that change, in model order.
    pub slots: Vec<SlotPlan>,
    /// Uniform-rank groups.
    pub groups: Vec<RankGroup>,
    /// What is left out.
    pub skipped: Vec<Skip>,
    /// Modules applied, per LoRA.
    pub applied_modules: Vec<usize>,
    /// Upper bound of the bytes that the stack adds to the model.
    pub added_bytes: u64,
}

/// Why a stack is refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum StackError {
    /// A LoRA is another model's.
    #[error("`{lora}` cannot be applied: {reason}")]
    OtherModel {
        /// The LoRA.
        lora: String,
        /// What it is.
        reason: String,
    },
    /// Nothing of a LoRA can be applied to this model.
    #[error("nothing of `{lora}` can be applied: {reason}")]
    NothingApplicable {
        /// The LoRA.
        lora: String,
        /// Why.
        reason: String,
    },
    /// Strict: something would be left out.
    #[error("`{lora}`: `{name}` would be left out: {reason}\nhint: strict=False applies the rest")]
    Strict {
        /// The LoRA.
        lora: String,
        /// The module or tensor.
        name: String,
        /// Why, as a kind.
        kind: SkipKind,
        /// Why, in words.
        reason: String,
    },
    /// A slot's base leaves no room within the kernels' limit.
    #[error(
        "`{slot}` has base rank {base_rank}: the kernels take {} in all",
        slot::MAX_RANK
    )]
    SlotFull {
        /// The slot.
        slot: String,
        /// Its base rank.
        base_rank: u64,
    },
    /// A limit that leaves nothing.
    #[error("max_rank is {max_rank}: it must be at least 1")]
    RankLimit {
        /// The limit.
        max_rank: u64,
    },
}

impl StackPlan {
    /// Plans a stack onto a model.
    pub fn new(
        items: &[StackItem<'_>],
        slots: &[Slot],
        options: StackOptions,
    ) -> Result<Self, StackError> {
        if let Some(max_rank @ 0) = options.max_rank {
            return Err(StackError::RankLimit { max_rank });
        }
        let by_path: HashMap<&str, usize> = slots
            .iter()
            .enumerate()
            .map(|(i, s)| (s.path.as_str(), i))
            .collect();
        let mut planner = Planner {
            slots,
            by_path,
            options,
            pieces: slots.iter().map(|_| Vec::new()).collect(),
            skipped: Vec::new(),
        };
        let applied_modules = items
            .iter()
            .enumerate()
            .map(|(lora, item)| planner.add(lora, item))
            .collect::<Result<_, _>>()?;
        planner.finish(applied_modules)
    }

    /// The document as JSON.
    pub fn to_json(&self) -> String {
        // A tree of strings and finite numbers always serialises.
        serde_json::to_string(self).unwrap_or_default()
    }
}

struct Planner<'s> {
    slots: &'s [Slot],
    by_path: HashMap<&'s str, usize>,
    options: StackOptions,
    pieces: Vec<Vec<Piece>>,
    skipped: Vec<Skip>,
}

impl Planner<'_> {
    /// Plans one LoRA; the number of its modules that are applied.
    fn add(&mut self, lora: usize, item: &StackItem<'_>) -> Result<usize, StackError> {
        let refuse = |reason: String| StackError::OtherModel {
            lora: item.name.to_owned(),
            reason,
        };
        match &item.plan.check {
            // Shapes are compared with the model at hand, below.
            ModelCheck::Known(Model::QwenImage) | ModelCheck::OtherShapes(_) => {}
            ModelCheck::Known(Model::ZImage) => {
                return Err(refuse(item.plan.reason().unwrap_or_default()));
            }
            ModelCheck::Other(reason) | ModelCheck::Nothing(reason) => {
                return Err(refuse(reason.clone()));
            }
        }
        let first_skip = self.skipped.len();
        let mut applied = 0;
        for module in &item.plan.modules {
            match self.place(lora, module, item.plan.table.entries()) {
                Ok((slot, piece)) => {
                    if let Some(pieces) = self.pieces.get_mut(slot) {
                        pieces.push(piece);
                    }
                    applied += 1;
                    self.skip_parts(lora, module, item.plan.table.entries());
                }
                Err(skip) => self.skipped.push(skip),
            }
        }
        self.skip_foreign(lora, item.plan.table.entries());
        self.judge(item, applied, first_skip)?;
        Ok(applied)
    }

    /// Raises what cannot, or must not, be passed over.
    fn judge(&self, item: &StackItem<'_>, applied: usize, first: usize) -> Result<(), StackError> {
        let skips = self.skipped.get(first..).unwrap_or_default();
        if applied == 0 {
            let misfits = skips.iter().filter(|s| s.kind == SkipKind::Shape).count();
            let lora = item.name.to_owned();
            let reason = skips.iter().find(|s| s.matters).map_or_else(
                || "it holds no module of this model".to_owned(),
                |s| {
                    format!(
                        "{} modules are left out, the first `{}`: {}",
                        skips.len(),
                        s.name,
                        s.reason
                    )
                },
            );
            return Err(if misfits > 0 && misfits * 2 >= skips.len() {
                StackError::OtherModel { lora, reason }
            } else {
                StackError::NothingApplicable { lora, reason }
            });
        }
        let wanted =
            |s: &&Skip| s.matters && !matches!(s.kind, SkipKind::TurnedOff | SkipKind::Foreign);
        match skips.iter().find(wanted) {
            Some(skip) if self.options.strict => Err(StackError::Strict {
                lora: item.name.to_owned(),
                name: skip.name.clone(),
                kind: skip.kind,
                reason: skip.reason.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn place(
        &self,
        lora: usize,
        module: &Module,
        entries: &[Entry],
    ) -> Result<(usize, Piece), Skip> {
        let target = model::table().target(module.target);
        let skip = |kind, reason: String| Skip {
            lora,
            name: target.path.clone(),
            kind,
            reason,
            piece: Some(module.adapter.piece()),
            matters: kind != SkipKind::TurnedOff,
        };
        match &module.fault {
            Some(Fault::Unsupported(text)) => {
                return Err(skip(SkipKind::Unsupported, text.clone()));
            }
            Some(Fault::Broken(text)) => return Err(skip(SkipKind::Broken, text.clone())),
            None => {}
        }
        let Some(pair) = module.pair.filter(|_| module.adapter == Adapter::Lora) else {
            return Err(skip(SkipKind::Unsupported, "has no plain pair".to_owned()));
        };
        let (Some(down), Some(up)) = (entries.get(pair.down), entries.get(pair.up)) else {
            return Err(skip(
                SkipKind::Broken,
                "its tensors are not listed".to_owned(),
            ));
        };
        if let Some(other) = [down, up]
            .iter()
            .find(|e| !HALF_DTYPES.contains(&e.tensor.dtype))
        {
            let text = format!("halves of dtype {} are not supported", other.tensor.dtype);
            return Err(skip(SkipKind::Unsupported, text));
        }
        let Some((index, slot)) = self.slot_of(target) else {
            return Err(skip(
                SkipKind::Missing,
                "the model has no such module".to_owned(),
            ));
        };
        if slot.kind == SlotKind::Awq {
            if !self.options.modulation {
                let text = "modulation layers are turned off".to_owned();
                return Err(skip(SkipKind::TurnedOff, text));
            }
            if slot::awq_row_order(&slot.path).is_none()
                || !slot.out_features.is_multiple_of(MODULATION_PLANES)
            {
                let text = "the row order of this AWQ layer is not known".to_owned();
                return Err(skip(SkipKind::UnknownLayout, text));
            }
        }
        let (row_begin, row_count) = rows_in(target, slot);
        if (pair.in_features, pair.out_features) != (slot.in_features, row_count) {
            let text = format!(
                "its delta is {}x{}, the module is {row_count}x{}",
                pair.out_features, pair.in_features, slot.in_features
            );
            return Err(skip(SkipKind::Shape, text));
        }
        Ok((
            index,
            low_rank(lora, target, module, pair, (row_begin, row_count), down, up),
        ))
    }

    /// The slot that computes a target: the fused one where the model has it, else its own.
    fn slot_of(&self, target: &Target) -> Option<(usize, &Slot)> {
        let index = self
            .by_path
            .get(target.place.slot.as_str())
            .or_else(|| self.by_path.get(target.path.as_str()))?;
        self.slots.get(*index).map(|slot| (*index, slot))
    }

    fn skip_parts(&mut self, lora: usize, module: &Module, entries: &[Entry]) {
        for (index, reason) in &module.left_out {
            if let Some(entry) = entries.get(*index) {
                self.skipped.push(Skip {
                    lora,
                    name: entry.tensor.key.clone(),
                    kind: SkipKind::Unsupported,
                    reason: reason.clone(),
                    piece: Some(PieceKind::Vector),
                    matters: true,
                });
            }
        }
    }

    fn skip_foreign(&mut self, lora: usize, entries: &[Entry]) {
        for entry in entries {
            if let Some(reason) = &entry.reason {
                self.skipped.push(Skip {
                    lora,
                    name: entry.tensor.key.clone(),
                    kind: SkipKind::Foreign,
                    reason: reason.text(),
                    piece: None,
                    matters: reason.is_of_model(),
                });
            }
        }
    }

    fn finish(self, applied_modules: Vec<usize>) -> Result<StackPlan, StackError> {
        let mut slots = Vec::new();
        for (slot, mut pieces) in self.slots.iter().zip(self.pieces) {
            // By rows, not by the order of keys: the same LoRA gives the same tensors from a file
            // and from a state dict.
            pieces.sort_by_key(|piece| (piece.lora, piece.row_begin));
            if !pieces.is_empty() {
                slots.push((slot, slot_plan(slot, pieces, self.options.max_rank)?));
            }
        }
        let groups = group_ranks(self.slots, &mut slots);
        let grouped: HashMap<&str, u64> = groups
            .iter()
            .flat_map(|g| g.slots.iter().map(|path| (path.as_str(), g.rank)))
            .collect();
        let planned: HashMap<&str, u64> = slots
            .iter()
            .map(|(s, plan)| (s.path.as_str(), plan.rank))
            .collect();
        let added_bytes = self.slots.iter().fold(0u64, |bytes, slot| {
            let path = slot.path.as_str();
            let rank = grouped
                .get(path)
                .or_else(|| planned.get(path))
                .copied()
                .unwrap_or(0);
            let per_rank = slot
                .in_features
                .saturating_add(slot.out_features)
                .saturating_mul(slot.element_bytes);
            bytes.saturating_add(rank.saturating_mul(per_rank))
        });
        Ok(StackPlan {
            schema: crate::document::SCHEMA,
            slots: slots.into_iter().map(|(_, plan)| plan).collect(),
            groups,
            skipped: self.skipped,
            applied_modules,
            added_bytes,
        })
    }
}

/// The rows that a target changes in a slot.
fn rows_in(target: &Target, slot: &Slot) -> (u64, u64) {
    let parts = target.place.parts as u64;
    if target.place.slot == slot.path && parts > 1 {
        let rows = slot.out_features / parts;
        (rows * target.place.part as u64, rows)
    } else {
        (0, slot.out_features)
    }
}

fn low_rank(
    lora: usize,
    target: &Target,
    module: &Module,
    pair: Pair,
    (row_begin, row_count): (u64, u64),
    down: &Entry,
    up: &Entry,
) -> Piece {
    Piece {
        kind: PieceKind::LowRank,
        lora,
        target: target.path.clone(),
        rank: pair.rank,
        scale: module.scale,
        row_begin,
        row_count,
        tensors: BTreeMap::from([("down", tensor_ref(down)), ("up", tensor_ref(up))]),
    }
}

fn tensor_ref(entry: &Entry) -> TensorRef {
    TensorRef {
        key: entry.tensor.key.clone(),
        dtype: entry.tensor.dtype.name(),
        shape: entry.tensor.shape.clone(),
        offset_bytes: entry.tensor.offset_bytes,
        len_bytes: entry.tensor.len_bytes,
    }
}

fn slot_plan(
    slot: &Slot,
    pieces: Vec<Piece>,
    max_rank: Option<u64>,
) -> Result<SlotPlan, StackError> {
    let free = slot.free_rank();
    if free == Some(0) {
        return Err(StackError::SlotFull {
            slot: slot.path.clone(),
            base_rank: slot.base_rank,
        });
    }
    let rank_limit = match (free, max_rank) {
        (Some(free), Some(max)) => Some(free.min(max)),
        (limit, None) | (None, limit) => limit,
    };
    let mut per_lora: BTreeMap<usize, u64> = BTreeMap::new();
    for piece in &pieces {
        let rank = per_lora.entry(piece.lora).or_default();
        *rank = rank.saturating_add(piece.rank);
    }
    let exact = per_lora
        .values()
        .fold(0u64, |sum, rank| sum.saturating_add(pad_rank(*rank)));
    let rank = rank_limit.map_or(exact, |limit| exact.min(pad_rank(limit)));
    let row_order = match slot.kind {
        SlotKind::Awq => slot::awq_row_order(&slot.path).unwrap_or(RowOrder::Planar),
        SlotKind::Svdq | SlotKind::Linear => RowOrder::Planar,
    };
    Ok(SlotPlan {
        path: slot.path.clone(),
        kind: slot.kind,
        row_order,
        base_rank: slot.base_rank,
        rank,
        rank_limit,
        group: None,
        pieces,
    })
}

/// Groups the offloaded slots of one path over all blocks, where any of them has a piece.
fn group_ranks(all: &[Slot], planned: &mut [(&Slot, SlotPlan)]) -> Vec<RankGroup> {
    let mut groups: Vec<RankGroup> = Vec::new();
    let mut index: HashMap<String, usize> = HashMap::new();
    for (slot, plan) in planned.iter_mut().filter(|(slot, _)| slot.offloaded) {
        let pattern = slot.pattern();
        let at = *index.entry(pattern.clone()).or_insert_with(|| {
            let slots = all
                .iter()
                .filter(|s| s.offloaded && s.pattern() == pattern)
                .map(|s| s.path.clone())
                .collect();
            groups.push(RankGroup {
                pattern,
                slots,
                rank: 0,
            });
            groups.len() - 1
        });
        plan.group = Some(at);
        if let Some(group) = groups.get_mut(at) {
            group.rank = group.rank.max(plan.rank);
        }
    }
    groups
}
