//! An index of a slot map, built once for all stacks.

use std::collections::HashMap;

use crate::model::slot::Slot;
use crate::model::{self, KnownModule, ModuleId};

/// The slot of each known module, and the slots that share a pattern.
#[derive(Debug, Clone)]
pub struct SlotIndex {
    /// The slot that computes each module, if any.
    of_module: Vec<Option<usize>>,
    /// The number of each slot's pattern, by the order in which patterns come first.
    patterns: Vec<usize>,
    pattern_count: usize,
}

impl SlotIndex {
    /// Looks through the slots of a model.
    pub fn new(slots: &[Slot]) -> Self {
        let by_path: HashMap<&str, usize> = slots
            .iter()
            .enumerate()
            .map(|(at, slot)| (slot.path.as_str(), at))
            .collect();
        // The fused slot where the model has it, else the module's own.
        let slot_of = |module: &KnownModule| {
            let fused = by_path.get(module.place.slot.as_str());
            fused.or_else(|| by_path.get(module.path.as_str())).copied()
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
            of_module: model::table().modules().iter().map(slot_of).collect(),
            patterns,
            pattern_count: numbers.len(),
        }
    }

    /// The slot that computes a module, by its place in the map.
    pub(super) fn slot_of(&self, module: ModuleId) -> Option<usize> {
        self.of_module.get(module).copied().flatten()
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
