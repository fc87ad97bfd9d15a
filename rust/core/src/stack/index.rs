//! An index of a slot map, built once for all stacks.

use std::collections::HashMap;

use crate::model::slot::Slot;
use crate::model::{self, KnownModule, Model, ModuleId};

/// The slot of each known module, and the slots that share a pattern.
#[derive(Debug, Clone)]
pub struct SlotIndex {
    /// The module that each slot is, if it is a known one.
    of_slot: Vec<Option<ModuleId>>,
    /// The slot that computes each module, if any.
    of_module: Vec<Option<usize>>,
    /// The number of each slot's pattern, by the order in which patterns come first.
    patterns: Vec<usize>,
    pattern_count: usize,
}

impl SlotIndex {
    /// Looks through the slots of a model.
    pub fn new(slots: &[Slot]) -> Self {
        let table = model::table();
        let of_slot: Vec<Option<ModuleId>> = slots
            .iter()
            .map(|slot| table.find_built(&slot.path))
            .collect();
        let mut own: Vec<Option<usize>> = vec![None; table.modules().len()];
        for (at, module) in of_slot.iter().enumerate() {
            if let Some(own) = module.and_then(|id| own.get_mut(id)) {
                own.get_or_insert(at);
            }
        }
        let slot_at = |id: ModuleId| own.get(id).copied().flatten();
        // The fused slot where the model has it, else the module's own.
        let slot_of = |(id, module): (ModuleId, &KnownModule)| {
            slot_at(module.place.module).or_else(|| slot_at(id))
        };
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let patterns = slots
            .iter()
            .map(|slot| {
                let next = numbers.len();
                *numbers.entry(&slot.pattern).or_insert(next)
            })
            .collect();
        Self {
            of_module: table.modules().iter().enumerate().map(slot_of).collect(),
            of_slot,
            patterns,
            pattern_count: numbers.len(),
        }
    }

    /// The slot that computes a module, by its place in the map.
    pub(super) fn slot_of(&self, module: ModuleId) -> Option<usize> {
        self.of_module.get(module).copied().flatten()
    }

    /// The module that a slot is, where it is a known one.
    pub(super) fn module_of(&self, slot: usize) -> Option<ModuleId> {
        self.of_slot.get(slot).copied().flatten()
    }

    /// The model that the slots are of; none where none of them is known.
    pub(super) fn model(&self) -> Option<Model> {
        let mut known = self.of_slot.iter().flatten();
        known.next().map(|id| model::table().module(*id).model)
    }

    /// The slots that compute the parts of a fused module, in order; `None` where one has none.
    pub(super) fn parts_of(&self, module: ModuleId) -> Option<Vec<usize>> {
        let parts = &model::table().module(module).split;
        let slots: Option<Vec<usize>> = parts.iter().map(|part| self.slot_of(*part)).collect();
        slots.filter(|slots| !slots.is_empty())
    }

    /// The number of a slot's pattern.
    pub(super) fn pattern_of(&self, slot: usize) -> Option<usize> {
        self.patterns.get(slot).copied()
    }

    /// How many patterns there are.
    pub(super) fn pattern_count(&self) -> usize {
        self.pattern_count
    }
}
