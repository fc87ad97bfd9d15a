//! The work of planning a stack: every module finds its slot or a reason.

use std::collections::{BTreeMap, HashMap};

use super::{
    LoraRow, Piece, RankGroup, Skip, SkipKind, SlotPlan, StackError, StackItem, StackOptions,
    StackPlan, TensorRef,
};
use crate::adapter::{Adapter, PieceKind};
use crate::check::ModelCheck;
use crate::document;
use crate::dtype::Dtype;
use crate::key::Foreign;
use crate::model::{self, Model, Target};
use crate::module::{Fault, Module, Pair};
use crate::reason::Reason;
use crate::slot::{self, MODULATION_PLANES, RowOrder, Slot, SlotKind, pad_rank};
use crate::table::{Entry, KeyTable};

/// Dtypes that the halves of a pair may be stored in.
const HALF_DTYPES: [Dtype; 6] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
];

/// A stack while it is being planned.
pub(super) struct Planner<'s> {
    pub(super) slots: &'s [Slot],
    pub(super) by_path: HashMap<&'s str, usize>,
    pub(super) options: StackOptions,
    /// The pieces of each slot.
    pub(super) pieces: Vec<Vec<Piece>>,
    pub(super) skipped: Vec<Skip>,
}

impl Planner<'_> {
    /// Plans one LoRA; the number of its modules that are applied.
    pub(super) fn add(&mut self, lora: usize, item: &StackItem<'_>) -> Result<usize, StackError> {
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
        self.skip_foreign(lora, &item.plan.table);
        self.judge(item, applied, first_skip)?;
        Ok(applied)
    }

    /// Raises what cannot, or must not, be passed over.
    fn judge(&self, item: &StackItem<'_>, applied: usize, first: usize) -> Result<(), StackError> {
        let skips = self.skipped.get(first..).unwrap_or_default();
        let modules = || skips.iter().filter(|s| s.kind != SkipKind::Foreign);
        let turned_off = |s: &Skip| s.kind == SkipKind::TurnedOff;
        let lora = item.name.to_owned();
        // To turn off all that a LoRA has is the caller's wish, not the file's fault.
        if applied == 0 && !(modules().next().is_some() && modules().all(turned_off)) {
            let count = modules().count();
            let misfits = modules().filter(|s| s.kind == SkipKind::Shape).count();
            let reason = modules().find(|s| s.matters).map_or_else(
                || "it holds no module of this model".to_owned(),
                |s| {
                    let (name, reason) = (&s.name, &s.reason);
                    format!("{count} modules are left out, the first `{name}`: {reason}")
                },
            );
            return Err(if misfits > 0 && misfits * 2 >= count {
                StackError::OtherModel { lora, reason }
            } else {
                StackError::NothingApplicable { lora, reason }
            });
        }
        match skips.iter().find(|s| s.matters && !turned_off(s)) {
            Some(skip) if self.options.strict => Err(StackError::Strict {
                lora,
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

    fn skip_foreign(&mut self, lora: usize, table: &KeyTable) {
        let whole_dump = table.has_base_weights();
        for entry in table.entries() {
            if let Some(reason) = &entry.reason {
                // In a dump of a wrapped model, the weights of its other layers are the base's.
                let is_base = whole_dump && *reason == Reason::Foreign(Foreign::PlainWeight);
                self.skipped.push(Skip {
                    lora,
                    name: entry.tensor.key.clone(),
                    kind: SkipKind::Foreign,
                    reason: reason.kind().to_owned(),
                    piece: None,
                    matters: reason.is_of_model() && !is_base,
                });
            }
        }
    }

    /// The plan of all that was added.
    pub(super) fn finish(
        self,
        loras: Vec<LoraRow>,
        applied_modules: Vec<usize>,
    ) -> Result<StackPlan, StackError> {
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
            schema: document::SCHEMA,
            loras,
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
    let mut index: HashMap<&str, usize> = HashMap::new();
    for (slot, plan) in planned.iter_mut().filter(|(slot, _)| slot.offloaded) {
        let pattern = slot.pattern.as_str();
        let at = *index.entry(pattern).or_insert_with(|| {
            let slots = all
                .iter()
                .filter(|s| s.offloaded && s.pattern == pattern)
                .map(|s| s.path.clone())
                .collect();
            groups.push(RankGroup {
                pattern: pattern.to_owned(),
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
