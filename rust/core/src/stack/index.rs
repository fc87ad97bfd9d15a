//! What planning looks up in a slot map, found once for all stacks.

use std::collections::HashMap;

use crate::model::slot::Slot;
use crate::model::{self, Target, TargetId};

/// Where the known modules are computed, and which slots share a pattern.
#[derive(Debug, Clone)]
pub struct SlotIndex {
    /// The slot that computes each target, if any.
    of_target: Vec<Option<usize>>,
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
        // The fused slot where the model has it, else the target's own.
        let slot_of = |target: &Target| {
            let fused = by_path.get(target.place.slot.as_str());
            fused.or_else(|| by_path.get(target.path.as_str())).copied()
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
            of_target: model::table().targets().iter().map(slot_of).collect(),
            patterns,
            pattern_count: numbers.len(),
        }
    }

    /// The slot that computes a target, by its place in the map.
    pub(super) fn slot_of(&self, target: TargetId) -> Option<usize> {
        self.of_target.get(target).copied().flatten()
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
