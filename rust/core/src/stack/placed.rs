//! A stack whose deltas have found their slots: all that is decided, in few numbers.
//!
//! Names, keys and shapes stay in the file plans and in the slot map; [`PlacedStack::told`] puts
//! them together for who wants to read the plan.

use std::ops::Range;

use super::branch::Branch;
use super::piece::Execution;
use super::uniform::PlacedUniform;
use super::{LoraRow, Piece, Route, Skip, SlotPlan, StackPlan, TensorRef};
use crate::adapter::delta::{Delta, Factor, Form};
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
    /// The first of that delta's rows that it has, and the first that it has not; none where it
    /// has all.
    pub(super) part: Option<(u64, u64)>,
    /// How it is executed there.
    pub(super) execution: Execution,
    pub(super) scale: f64,
    /// First of the slot's rows that it changes, and how many.
    pub(super) rows: (u64, u64),
}

/// The kind of room that a delta takes in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// Ranks alone.
    Ranks,
    /// Something beside them.
    Branch,
    /// Ranks, and something beside them.
    Both,
}

impl Placed {
    /// The module and the delta in their file's plan.
    pub(super) fn origin<'p>(&self, plans: &[&'p FilePlan]) -> Option<(&'p Module, &'p Delta)> {
        let module = plans.get(self.lora)?.modules.get(self.module)?;
        Some((module, module.deltas.get(self.delta)?))
    }

    /// What is placed of the delta.
    pub(super) fn placed_part(&self, delta: &Delta) -> Option<Delta> {
        match self.part {
            Some((begin, end)) => delta.part(&(begin..end)),
            None => Some(*delta),
        }
    }

    /// What is placed of its delta in its file's plan.
    pub(super) fn placed_delta(&self, plans: &[&FilePlan]) -> Option<Delta> {
        self.placed_part(self.origin(plans)?.1)
    }

    /// Adds the room that it takes besides ranks.
    pub(super) fn add_room(&self, branch: &mut Branch, plans: &[&FilePlan], slot: &Slot) {
        // Of nearly all deltas.
        if self.execution.takes == Takes::Ranks {
            return;
        }
        if let Some(delta) = self.placed_delta(plans) {
            branch.add(self, &delta, slot);
        }
    }

    /// The key of the tensor that a piece names first.
    fn first_key<'p>(&self, plans: &[&'p FilePlan]) -> Option<&'p str> {
        let (_, delta) = self.origin(plans)?;
        let (_, tensor) = delta
            .tensors()
            .into_iter()
            .min_by_key(|(name, own)| (*name, own.index))?;
        let entry = plans.get(self.lora)?.table.entries().get(tensor.index)?;
        Some(&entry.tensor.key)
    }
}

/// A slot that gets deltas.
#[derive(Debug)]
pub(super) struct PlacedSlot {
    /// Its place in the map.
    pub(super) slot: usize,
    pub(super) row_order: RowOrder,
    pub(super) route: Route,
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
            piece(placed, module, delta, entries)
        });
        SlotPlan {
            path: slot.path.clone(),
            kind: slot.kind,
            row_order: placed.row_order,
            base_rank: slot.base_rank,
            route: placed.route,
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

fn piece(placed: &Placed, module: &Module, whole: &Delta, entries: &[Entry]) -> Option<Piece> {
    let delta = placed.placed_part(whole)?;
    let tensors = whole.tensors().into_iter().zip(delta.tensors());
    let tensors = tensors.filter_map(|((name, stored), (_, own))| {
        Some((name, tensor_ref(stored, own, entries.get(own.index)?)))
    });
    let parameter = match delta.form {
        Form::Vector { parameter, .. } => Some(parameter),
        _ => None,
    };
    let execution = placed.execution;
    Some(Piece {
        kind: execution.kind,
        adapter: delta.adapter,
        lora: placed.lora,
        module: model::table().module(module.id).path.clone(),
        rank: execution.rank,
        rank_bound: delta.rank_bound(),
        rank_budget: execution.rank_budget,
        scale: placed.scale,
        row_begin: placed.rows.0,
        row_count: placed.rows.1,
        parameter,
        side: delta.side(),
        rotation: delta.rotation(),
        scales_bias: delta.scales_bias(),
        exactness: execution.exactness,
        tensors: tensors.collect(),
    })
}

/// The place of a tensor in its file, or of those of its rows that are placed.
fn tensor_ref(stored: Factor, own: Factor, entry: &Entry) -> TensorRef {
    let tensor = &entry.tensor;
    let whole = TensorRef {
        index: own.index,
        key: tensor.key.clone(),
        dtype: tensor.dtype.name(),
        shape: tensor.shape.clone(),
        offset_bytes: tensor.offset_bytes,
        len_bytes: tensor.len_bytes,
        first_row: None,
    };
    if own == stored {
        return whole;
    }
    // (rows, ...) lies row by row.
    let row_bytes = tensor.len_bytes.checked_div(stored.rows).unwrap_or(0);
    let mut shape = whole.shape;
    if let Some(rows) = shape.first_mut() {
        *rows = own.rows;
    }
    TensorRef {
        shape,
        offset_bytes: tensor.offset_bytes + own.first_row * row_bytes,
        len_bytes: own.rows * row_bytes,
        first_row: Some(own.first_row),
        ..whole
    }
}

/// Sorts deltas by their slots, and those of a slot in an order that no order of keys changes.
pub(super) fn sort(placed: &mut [Placed], plans: &[&FilePlan]) {
    // By rows, not by the order of keys: the same LoRA gives the same tensors from a file and from
    // a state dict.
    placed.sort_by(|a, b| {
        let numbers = |own: &Placed| (own.slot, own.lora, own.rows.0, own.execution.kind);
        let keys = || a.first_key(plans).cmp(&b.first_key(plans));
        numbers(a).cmp(&numbers(b)).then_with(keys)
    });
}
