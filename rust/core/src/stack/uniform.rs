//! A slot's sums, and the slots that offload wants uniform.

use std::ops::Range;

use super::branch::{self, Branch, PartRoom, Rooms};
use super::index::SlotIndex;
use super::piece;
use super::placed::{Placed, PlacedSlot, Takes};
use super::{Route, StackError, StackOptions, UniformSlots};
use crate::model::slot::{self, RowOrder, Slot};
use crate::plan::FilePlan;

/// Most ranks that may be added to a slot: beside the layer no kernel limits them.
pub(super) fn rank_limit(slot: &Slot, max_rank: Option<u64>, route: Route) -> Option<u64> {
    let free = match route {
        Route::Inside => slot.free_rank(),
        Route::Beside => None,
    };
    match (free, max_rank) {
        (Some(free), Some(max)) => Some(free.min(max)),
        (limit, None) | (None, limit) => limit,
    }
}

/// A slot with the sums of its deltas while uniform are being formed.
pub(super) struct Summed {
    pub(super) slot: PlacedSlot,
    rooms: Rooms,
}

impl Summed {
    /// Sums up the deltas of one slot; `range` is where they lie among all.
    pub(super) fn new(
        slots: &[Slot],
        own: &[Placed],
        range: Range<usize>,
        plans: &[&FilePlan],
        options: StackOptions,
        route: Route,
    ) -> Result<Self, StackError> {
        let at = own.first().map_or(0, |placed| placed.slot);
        // Deltas are placed in slots of the map alone.
        let slot = &slots[at];
        let has_ranks = || own.iter().any(|own| own.execution.takes != Takes::Branch);
        if route == Route::Inside && slot.free_rank() == Some(0) && has_ranks() {
            return Err(StackError::SlotFull {
                slot: slot.path.clone(),
                base_rank: slot.base_rank,
            });
        }
        let mut branch = Branch::default();
        for placed in own {
            placed.add_room(&mut branch, plans, slot);
        }
        let limit = rank_limit(slot, options.max_rank, route);
        let most = limit.map(|limit| match route {
            Route::Inside => slot::pad_rank(limit),
            Route::Beside => limit,
        });
        let exact = own
            .chunk_by(|a, b| a.lora == b.lora)
            .map(|own| piece::padded_rank(own, route))
            .fold(0u64, u64::saturating_add);
        let slot = PlacedSlot {
            slot: at,
            // A slot whose rows have no known order carries nothing.
            row_order: slot.row_order().unwrap_or(RowOrder::Planar),
            route,
            rank: most.map_or(exact, |most| exact.min(most)),
            rank_limit: limit,
            branch_bytes: branch.bytes(slot),
            uniform: None,
            own: range,
        };
        let rooms = branch.rooms;
        Ok(Self { slot, rooms })
    }
}

/// Slots whose rank and side branches must be the same.
#[derive(Debug)]
pub(super) struct PlacedUniform {
    /// All of them by their places in the map, those without a delta included.
    members: Vec<usize>,
    route: Route,
    rank: u64,
    rooms: Rooms,
    branch_bytes: u64,
}

impl PlacedUniform {
    /// The slots with their names.
    pub(super) fn told(&self, slots: &[Slot]) -> Option<UniformSlots> {
        let members = || self.members.iter().filter_map(|&at| slots.get(at));
        let room = self
            .rooms
            .iter()
            .map(|(&shape, &count)| PartRoom { shape, count });
        Some(UniformSlots {
            pattern: members().next()?.pattern.clone(),
            slots: members().map(|slot| slot.path.clone()).collect(),
            route: self.route,
            rank: self.rank,
            room: room.collect(),
            branch_bytes: self.branch_bytes,
        })
    }
}

/// Collects the offloaded slots of one path over all blocks, where any of them has a rank or a part
/// beside its layer. Each of them has room for the most that any of them has, shape by shape;
/// parameters that are swapped are there on every block.
pub(super) fn form(all: &[Slot], index: &SlotIndex, summed: &mut [Summed]) -> Vec<PlacedUniform> {
    let mut uniform: Vec<PlacedUniform> = Vec::new();
    let mut by_pattern: Vec<Option<usize>> = vec![None; index.pattern_count()];
    let offloaded = |own: &Summed| {
        let is_offloaded = all.get(own.slot.slot).is_some_and(|slot| slot.offloaded);
        index.pattern_of(own.slot.slot).filter(|_| is_offloaded)
    };
    for own in summed
        .iter()
        .filter(|own| own.slot.rank > 0 || !own.rooms.is_empty())
    {
        let Some(pattern) = offloaded(own) else {
            continue;
        };
        let Some(at) = by_pattern.get_mut(pattern) else {
            continue;
        };
        let at = *at.get_or_insert_with(|| {
            uniform.push(PlacedUniform {
                members: Vec::new(),
                route: own.slot.route,
                rank: 0,
                rooms: Rooms::new(),
                branch_bytes: 0,
            });
            uniform.len() - 1
        });
        if let Some(alike) = uniform.get_mut(at) {
            alike.rank = alike.rank.max(own.slot.rank);
            for (shape, count) in &own.rooms {
                let most = alike.rooms.entry(*shape).or_default();
                *most = (*most).max(*count);
            }
        }
    }
    for (at, _) in all.iter().enumerate().filter(|(_, slot)| slot.offloaded) {
        let alike = index
            .pattern_of(at)
            .and_then(|pattern| *by_pattern.get(pattern)?);
        if let Some(alike) = alike.and_then(|own| uniform.get_mut(own)) {
            alike.members.push(at);
        }
    }
    for own in summed {
        let alike = offloaded(own).and_then(|pattern| *by_pattern.get(pattern)?);
        let Some((at, alike)) = alike.and_then(|at| Some((at, uniform.get_mut(at)?))) else {
            continue;
        };
        let element_bytes = all.get(own.slot.slot).map_or(0, |slot| slot.element_bytes);
        alike.branch_bytes = branch::room_bytes(&alike.rooms, element_bytes);
        let bytes = branch::room_bytes(&own.rooms, element_bytes);
        let others = own.slot.branch_bytes.saturating_sub(bytes);
        own.slot.branch_bytes = others.saturating_add(alike.branch_bytes);
        own.slot.uniform = Some(at);
    }
    uniform
}

/// Bytes of the ranks and branches of all slots, those included that are filled for uniformity alone.
pub(super) fn added_bytes(all: &[Slot], summed: &[Summed], uniform: &[PlacedUniform]) -> u64 {
    let bytes_of = |at: usize, rank: u64, branch_bytes: u64| {
        let per_rank = all.get(at).map_or(0, |slot| {
            let sides = slot.in_features.saturating_add(slot.out_features);
            sides.saturating_mul(slot.element_bytes)
        });
        rank.saturating_mul(per_rank).saturating_add(branch_bytes)
    };
    let mut is_filled = vec![false; all.len()];
    let own = summed.iter().map(|summed| {
        let slot = &summed.slot;
        if let Some(filled) = is_filled.get_mut(slot.slot) {
            *filled = true;
        }
        let alike = slot.uniform.and_then(|at| uniform.get(at));
        let rank = alike.map_or(slot.rank, |alike| alike.rank);
        bytes_of(slot.slot, rank, slot.branch_bytes)
    });
    let own = own.fold(0, u64::saturating_add);
    let of_empty = uniform.iter().flat_map(|alike| {
        let empty = alike
            .members
            .iter()
            .filter(|at| is_filled.get(**at) == Some(&false));
        empty.map(|&at| bytes_of(at, alike.rank, alike.branch_bytes))
    });
    of_empty.fold(own, u64::saturating_add)
}
