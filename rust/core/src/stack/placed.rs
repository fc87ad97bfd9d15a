//! A stack whose deltas have found their slots: all that is decided, in few numbers.
//!
//! Names, keys and shapes stay in the file plans and in the slot map; [`PlacedStack::told`] puts
//! them together for who wants to read the plan.

use std::ops::Range;

use super::branch::Branch;
use super::uniform::PlacedUniform;
use super::{LoraRow, Piece, Skip, SlotPlan, StackPlan, TensorRef};
use crate::adapter::PieceKind;
use crate::adapter::delta::{Delta, Form};
use crate::adapter::module::Module;
use crate::key::table::Entry;
use crate::model;
use crate::model::slot::{RowOrder, Slot};
use crate::plan::FilePlan;
use crate::plan::document;

/// A delta in its slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    /// Place of its slot in the map.
    pub(super) slot: usize,
    /// Index of its LoRA.
    pub(super) lora: usize,
    /// Which of the file's modules it belongs to.
    pub(super) module: usize,
    /// Which of the module's deltas it is.
    pub(super) delta: usize,
    pub(super) kind: PieceKind,
    pub(super) rank: u64,
    pub(super) rank_budget: Option<u64>,
    pub(super) scale: f64,
    /// First of the slot's rows that it changes, and how many.
    pub(super) rows: (u64, u64),
    pub(super) takes: Takes,
}

/// The kind of room that a delta takes in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// Ranks alone.
    Ranks,
    /// Something beside them.
    Branch,
}

impl Placed {
    /// The module and the delta in their file's plan.
    pub(super) fn origin<'p>(&self, plans: &[&'p FilePlan]) -> Option<(&'p Module, &'p Delta)> {
        let module = plans.get(self.lora)?.modules.get(self.module)?;
        Some((module, module.deltas.get(self.delta)?))
    }

    /// The room that it takes besides ranks, in a slot of so many columns.
    pub(super) fn branch(&self, plans: &[&FilePlan], columns: u64) -> Branch {
        match (self.takes, self.origin(plans)) {
            (Takes::Branch, Some((_, delta))) => Branch::of(delta, self.rows, columns),
            (Takes::Ranks, _) | (_, None) => Branch::None,
        }
    }

    /// The key of the tensor that a piece names first.
    fn first_key<'p>(&self, plans: &[&'p FilePlan]) -> Option<&'p str> {
        let (_, delta) = self.origin(plans)?;
        let (_, index) = delta.tensors().into_iter().min()?;
        let entry = plans.get(self.lora)?.table.entries().get(index)?;
        Some(&entry.tensor.key)
    }
}

/// A slot that gets deltas.
#[derive(Debug)]
pub(super) struct PlacedSlot {
    /// Its place in the map.
    pub(super) slot: usize,
    pub(super) row_order: RowOrder,
    pub(super) rank: u64,
    pub(super) rank_limit: Option<u64>,
    pub(super) branch_bytes: u64,
    pub(super) uniform: Option<usize>,
    /// Which of the stack's deltas are its own.
    pub(super) own: Range<usize>,
}

/// A stack on the slots of a model. Its methods take the file plans that it was made of, in their
/// order, and the slots that it was made for.
#[derive(Debug)]
pub struct PlacedStack {
    pub(super) loras: Vec<LoraRow>,
    /// The deltas, slot by slot, in each in the order of the stack and of their rows.
    pub(super) placed: Vec<Placed>,
    pub(super) slots: Vec<PlacedSlot>,
    pub(super) uniform: Vec<PlacedUniform>,
    /// Modules and tensors that are left out.
    pub skipped: Vec<Skip>,
    /// Modules applied, per LoRA.
    pub applied_modules: Vec<usize>,
    /// Upper bound of the bytes that the stack adds to the model.
    pub added_bytes: u64,
}

impl PlacedStack {
    /// The whole plan.
    pub fn told(&self, plans: &[&FilePlan], slots: &[Slot]) -> StackPlan {
        StackPlan {
            schema: document::SCHEMA,
            loras: self.loras.clone(),
            slots: self.slot_plans(plans, slots, |_| true),
            uniform: self
                .uniform
                .iter()
                .filter_map(|own| own.told(slots))
                .collect(),
            skipped: self.skipped.clone(),
            applied_modules: self.applied_modules.clone(),
            added_bytes: self.added_bytes,
        }
    }

    /// The plans of the slots that are chosen.
    pub fn slot_plans(
        &self,
        plans: &[&FilePlan],
        slots: &[Slot],
        is_chosen: impl Fn(&Slot) -> bool,
    ) -> Vec<SlotPlan> {
        let own = self.slots.iter();
        let own = own.filter_map(|placed| Some((placed, slots.get(placed.slot)?)));
        own.filter(|(_, slot)| is_chosen(slot))
            .map(|(placed, slot)| self.slot_plan(placed, plans, slot))
            .collect()
    }

    /// A slot's plan.
    pub(super) fn slot_plan(
        &self,
        placed: &PlacedSlot,
        plans: &[&FilePlan],
        slot: &Slot,
    ) -> SlotPlan {
        let pieces = self.deltas_of(placed).iter().filter_map(|placed| {
            let entries = plans.get(placed.lora)?.table.entries();
            let (module, delta) = placed.origin(plans)?;
            Some(piece(placed, module, delta, entries))
        });
        SlotPlan {
            path: slot.path.clone(),
            kind: slot.kind,
            row_order: placed.row_order,
            base_rank: slot.base_rank,
            rank: placed.rank,
            rank_limit: placed.rank_limit,
            branch_bytes: placed.branch_bytes,
            uniform: placed.uniform,
            pieces: pieces.collect(),
        }
    }

    /// The deltas of a slot.
    pub(super) fn deltas_of(&self, slot: &PlacedSlot) -> &[Placed] {
        self.placed.get(slot.own.clone()).unwrap_or_default()
    }
}

fn piece(placed: &Placed, module: &Module, delta: &Delta, entries: &[Entry]) -> Piece {
    let tensors = delta.tensors().into_iter();
    let tensors =
        tensors.filter_map(|(name, index)| Some((name, tensor_ref(index, entries.get(index)?))));
    let parameter = match delta.form {
        Form::Vector { parameter, .. } => Some(parameter),
        _ => None,
    };
    Piece {
        kind: placed.kind,
        adapter: delta.adapter,
        lora: placed.lora,
        module: model::table().module(module.id).path.clone(),
        rank: placed.rank,
        rank_bound: delta.rank_bound(),
        rank_budget: placed.rank_budget,
        scale: placed.scale,
        row_begin: placed.rows.0,
        row_count: placed.rows.1,
        parameter,
        tensors: tensors.collect(),
    }
}

fn tensor_ref(index: usize, entry: &Entry) -> TensorRef {
    TensorRef {
        index,
        key: entry.tensor.key.clone(),
        dtype: entry.tensor.dtype.name(),
        shape: entry.tensor.shape.clone(),
        offset_bytes: entry.tensor.offset_bytes,
        len_bytes: entry.tensor.len_bytes,
    }
}

/// Sorts deltas by their slots, and those of a slot in an order that no order of keys changes.
pub(super) fn sort(placed: &mut [Placed], plans: &[&FilePlan]) {
    // By rows, not by the order of keys: the same LoRA gives the same tensors from a file and from
    // a state dict.
    placed.sort_by(|a, b| {
        let numbers = |own: &Placed| (own.slot, own.lora, own.rows.0, own.kind);
        let keys = || a.first_key(plans).cmp(&b.first_key(plans));
        numbers(a).cmp(&numbers(b)).then_with(keys)
    });
}
