//! A slot's sums, and the groups of slots that offload wants alike.

use std::collections::BTreeMap;
use std::ops::Range;

use super::branch::{self, KronBuffer, KronShape};
use super::index::SlotIndex;
use super::piece;
use super::placed::{Placed, PlacedSlot, Takes};
use super::{RankGroup, StackError, StackOptions};
use crate::model::slot::{self, RowOrder, Slot};
use crate::plan::FilePlan;

/// Most ranks that may be added to a slot.
pub(super) fn rank_limit(slot: &Slot, max_rank: Option<u64>) -> Option<u64> {
    match (slot.free_rank(), max_rank) {
        (Some(free), Some(max)) => Some(free.min(max)),
        (limit, None) | (None, limit) => limit,
    }
}

/// A slot with the sums of its deltas while groups are being formed.
pub(super) struct Summed {
    pub(super) slot: PlacedSlot,
    krons: BTreeMap<KronShape, usize>,
}

impl Summed {
    /// Sums up the deltas of one slot; `range` is where they lie among all.
    pub(super) fn new(
        slots: &[Slot],
        own: &[Placed],
        range: Range<usize>,
        plans: &[&FilePlan],
        options: StackOptions,
    ) -> Result<Self, StackError> {
        let at = own.first().map_or(0, |placed| placed.slot);
        // Deltas are placed in slots of the map alone.
        let slot = &slots[at];
        if slot.free_rank() == Some(0) && own.iter().any(|p| p.takes == Takes::Ranks) {
            return Err(StackError::SlotFull {
                slot: slot.path.clone(),
                base_rank: slot.base_rank,
            });
        }
        let branches = || {
            own.iter()
                .map(|placed| placed.branch(plans, slot.in_features))
        };
        let krons = branch::count_krons(branches());
        let branch_bytes = branch::kron_bytes(&krons, slot.element_bytes)
            .saturating_add(branch::other_bytes(slot, branches()));
        let limit = rank_limit(slot, options.max_rank);
        let exact = own
            .chunk_by(|a, b| a.lora == b.lora)
            .map(piece::padded_rank)
            .fold(0u64, u64::saturating_add);
        let slot = PlacedSlot {
            slot: at,
            // A slot whose rows have no known order carries nothing.
            row_order: slot.row_order().unwrap_or(RowOrder::Planar),
            rank: limit.map_or(exact, |limit| exact.min(slot::pad_rank(limit))),
            rank_limit: limit,
            branch_bytes,
            group: None,
            own: range,
        };
        Ok(Self { slot, krons })
    }
}

/// Slots whose rank and side branches must be the same.
#[derive(Debug)]
pub(super) struct PlacedGroup {
    /// All of them by their places in the map, those without a delta included.
    members: Vec<usize>,
    rank: u64,
    krons: BTreeMap<KronShape, usize>,
    branch_bytes: u64,
}

impl PlacedGroup {
    /// The group with its names.
    pub(super) fn told(&self, slots: &[Slot]) -> Option<RankGroup> {
        let members = || self.members.iter().filter_map(|&at| slots.get(at));
        let krons = self
            .krons
            .iter()
            .map(|(&shape, &count)| KronBuffer { shape, count });
        Some(RankGroup {
            pattern: members().next()?.pattern.clone(),
            slots: members().map(|slot| slot.path.clone()).collect(),
            rank: self.rank,
            krons: krons.collect(),
            branch_bytes: self.branch_bytes,
        })
    }
}

/// Groups the offloaded slots of one path over all blocks, where any of them has a rank or a
/// Kronecker branch. Every slot of a group has room for the most that any of them has, shape by
/// shape; parameters that are swapped are there on every block.
pub(super) fn form(all: &[Slot], index: &SlotIndex, summed: &mut [Summed]) -> Vec<PlacedGroup> {
    let mut groups: Vec<PlacedGroup> = Vec::new();
    let mut by_pattern: Vec<Option<usize>> = vec![None; index.pattern_count()];
    let offloaded = |own: &Summed| {
        let is_offloaded = all.get(own.slot.slot).is_some_and(|slot| slot.offloaded);
        index.pattern_of(own.slot.slot).filter(|_| is_offloaded)
    };
    for own in summed
        .iter()
        .filter(|own| own.slot.rank > 0 || !own.krons.is_empty())
    {
        let Some(pattern) = offloaded(own) else {
            continue;
        };
        let Some(at) = by_pattern.get_mut(pattern) else {
            continue;
        };
        let at = *at.get_or_insert_with(|| {
            groups.push(PlacedGroup {
                members: Vec::new(),
                rank: 0,
                krons: BTreeMap::new(),
                branch_bytes: 0,
            });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(at) {
            group.rank = group.rank.max(own.slot.rank);
            for (shape, count) in &own.krons {
                let most = group.krons.entry(*shape).or_default();
                *most = (*most).max(*count);
            }
        }
    }
    for (at, _) in all.iter().enumerate().filter(|(_, slot)| slot.offloaded) {
        let group = index
            .pattern_of(at)
            .and_then(|pattern| *by_pattern.get(pattern)?);
        if let Some(group) = group.and_then(|own| groups.get_mut(own)) {
            group.members.push(at);
        }
    }
    for own in summed {
        let group = offloaded(own).and_then(|pattern| *by_pattern.get(pattern)?);
        let Some((at, group)) = group.and_then(|at| Some((at, groups.get_mut(at)?))) else {
            continue;
        };
        let element_bytes = all.get(own.slot.slot).map_or(0, |slot| slot.element_bytes);
        group.branch_bytes = branch::kron_bytes(&group.krons, element_bytes);
        let bytes = branch::kron_bytes(&own.krons, element_bytes);
        let others = own.slot.branch_bytes.saturating_sub(bytes);
        own.slot.branch_bytes = others.saturating_add(group.branch_bytes);
        own.slot.group = Some(at);
    }
    groups
}

/// Bytes of the ranks and branches of all slots, those included that only their group fills.
pub(super) fn added_bytes(all: &[Slot], summed: &[Summed], groups: &[PlacedGroup]) -> u64 {
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
        let group = slot.group.and_then(|at| groups.get(at));
        let rank = group.map_or(slot.rank, |group| group.rank);
        bytes_of(slot.slot, rank, slot.branch_bytes)
    });
    let own = own.fold(0, u64::saturating_add);
    let of_groups = groups.iter().flat_map(|group| {
        let empty = group
            .members
            .iter()
            .filter(|at| is_filled.get(**at) == Some(&false));
        empty.map(|&at| bytes_of(at, group.rank, group.branch_bytes))
    });
    of_groups.fold(own, u64::saturating_add)
}
