//! The way in which slots carry ranks.

use serde::Serialize;

use super::index::SlotIndex;
use super::placed::Placed;
use crate::adapter::PieceKind;
use crate::model::slot::Slot;

/// The way in which a slot carries ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// Behind the base branch of a packed layer; beside a layer that has none.
    Inside,
    /// Beside the layer, whose own output is then the base's alone: what stretches or turns that
    /// output must not meet the ranks of others in it.
    Beside,
}

/// The route of each slot.
pub(super) struct Routes {
    is_beside: Vec<bool>,
}

impl Routes {
    /// A slot with a diagonal or a rotation goes beside, and with it all offloaded slots of its
    /// pattern: what runs in them must be alike.
    pub(super) fn of(placed: &[Placed], slots: &[Slot], index: &SlotIndex) -> Self {
        let mut is_beside = vec![false; slots.len()];
        let mut patterns = vec![false; index.pattern_count()];
        for own in placed {
            let kind = own.execution.kind;
            if !matches!(kind, PieceKind::Diagonal | PieceKind::Rotation) {
                continue;
            }
            if let Some(beside) = is_beside.get_mut(own.slot) {
                *beside = true;
            }
            let is_offloaded = slots.get(own.slot).is_some_and(|slot| slot.offloaded);
            let pattern = index.pattern_of(own.slot).filter(|_| is_offloaded);
            if let Some(beside) = pattern.and_then(|at| patterns.get_mut(at)) {
                *beside = true;
            }
        }
        for (at, _) in slots.iter().enumerate().filter(|(_, slot)| slot.offloaded) {
            let pattern = index.pattern_of(at).and_then(|at| patterns.get(at));
            if let (Some(true), Some(beside)) = (pattern, is_beside.get_mut(at)) {
                *beside = true;
            }
        }
        Self { is_beside }
    }

    /// The route of the slot at this place.
    pub(super) fn of_slot(&self, at: usize) -> Route {
        match self.is_beside.get(at) {
            Some(true) => Route::Beside,
            _ => Route::Inside,
        }
    }
}
