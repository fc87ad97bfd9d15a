//! A slot's plan, and the groups of slots that offload wants alike.

use std::collections::{BTreeMap, HashMap};

use super::branch::{self, Branch, KronBuffer, KronShape};
use super::piece::{self, Placed};
use super::{RankGroup, SlotPlan, StackError};
use crate::slot::{self, RowOrder, Slot, SlotKind};

/// Most ranks that may be added to a slot.
pub(super) fn rank_limit(slot: &Slot, max_rank: Option<u64>) -> Option<u64> {
    match (slot.free_rank(), max_rank) {
        (Some(free), Some(max)) => Some(free.min(max)),
        (limit, None) | (None, limit) => limit,
    }
}

/// A slot with its plan while groups are being formed.
pub(super) struct Planned<'s> {
    pub(super) slot: &'s Slot,
    pub(super) plan: SlotPlan,
    krons: BTreeMap<KronShape, usize>,
}

impl<'s> Planned<'s> {
    pub(super) fn new(
        slot: &'s Slot,
        placed: Vec<Placed>,
        max_rank: Option<u64>,
    ) -> Result<Self, StackError> {
        let takes_rank = |p: &Placed| p.branch == Branch::None;
        if slot.free_rank() == Some(0) && placed.iter().any(takes_rank) {
            return Err(StackError::SlotFull {
                slot: slot.path.clone(),
                base_rank: slot.base_rank,
            });
        }
        let branches = || placed.iter().map(|p| p.branch);
        let krons = branch::count_krons(branches());
        let branch_bytes = branch::kron_bytes(&krons, slot.element_bytes)
            .saturating_add(branch::other_bytes(slot, branches()));
        let pieces: Vec<_> = placed.into_iter().map(|p| p.piece).collect();
        let limit = rank_limit(slot, max_rank);
        let exact = pieces
            .chunk_by(|a, b| a.lora == b.lora)
            .map(|own| piece::padded_rank(own.iter()))
            .fold(0u64, u64::saturating_add);
        let row_order = match slot.kind {
            SlotKind::Awq => slot::awq_row_order(&slot.path).unwrap_or(RowOrder::Planar),
            SlotKind::Svdq | SlotKind::Linear | SlotKind::Norm | SlotKind::Embedding => {
                RowOrder::Planar
            }
        };
        let plan = SlotPlan {
            path: slot.path.clone(),
            kind: slot.kind,
            row_order,
            base_rank: slot.base_rank,
            rank: limit.map_or(exact, |limit| exact.min(slot::pad_rank(limit))),
            rank_limit: limit,
            branch_bytes,
            group: None,
            pieces,
        };
        Ok(Self { slot, plan, krons })
    }
}

/// Groups the offloaded slots of one path over all blocks, where any of them has a rank or a
/// Kronecker branch. Every slot of a group has room for the most that any of them has, shape by
/// shape; parameters that are swapped are there on every block.
pub(super) fn form(all: &[Slot], planned: &mut [Planned<'_>]) -> Vec<RankGroup> {
    let mut groups: Vec<(RankGroup, BTreeMap<KronShape, usize>)> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    let offloaded = || planned.iter().filter(|p| p.slot.offloaded);
    for member in offloaded().filter(|p| p.plan.rank > 0 || !p.krons.is_empty()) {
        let pattern = member.slot.pattern.as_str();
        let at = *index.entry(pattern).or_insert_with(|| {
            groups.push((empty_group(all, pattern), BTreeMap::new()));
            groups.len() - 1
        });
        if let Some((group, krons)) = groups.get_mut(at) {
            group.rank = group.rank.max(member.plan.rank);
            for (shape, count) in &member.krons {
                let most = krons.entry(*shape).or_default();
                *most = (*most).max(*count);
            }
        }
    }
    for member in planned.iter_mut().filter(|p| p.slot.offloaded) {
        let Some(at) = index.get(member.slot.pattern.as_str()) else {
            continue;
        };
        let Some((group, krons)) = groups.get_mut(*at) else {
            continue;
        };
        let element_bytes = member.slot.element_bytes;
        group.branch_bytes = branch::kron_bytes(&*krons, element_bytes);
        let own = branch::kron_bytes(&member.krons, element_bytes);
        let others = member.plan.branch_bytes.saturating_sub(own);
        member.plan.branch_bytes = others.saturating_add(group.branch_bytes);
        member.plan.group = Some(*at);
    }
    let with_krons = |(group, krons): (RankGroup, BTreeMap<KronShape, usize>)| RankGroup {
        krons: krons
            .into_iter()
            .map(|(shape, count)| KronBuffer { shape, count })
            .collect(),
        ..group
    };
    groups.into_iter().map(with_krons).collect()
}

fn empty_group(all: &[Slot], pattern: &str) -> RankGroup {
    RankGroup {
        pattern: pattern.to_owned(),
        slots: all
            .iter()
            .filter(|s| s.offloaded && s.pattern == pattern)
            .map(|s| s.path.clone())
            .collect(),
        rank: 0,
        krons: Vec::new(),
        branch_bytes: 0,
    }
}

/// Bytes of the ranks and branches of all slots, those included that only their group fills.
pub(super) fn added_bytes(all: &[Slot], planned: &[Planned<'_>], groups: &[RankGroup]) -> u64 {
    let grouped: HashMap<&str, &RankGroup> = groups
        .iter()
        .flat_map(|group| group.slots.iter().map(move |path| (path.as_str(), group)))
        .collect();
    // Both are in model order.
    let mut planned = planned.iter().peekable();
    all.iter().fold(0, |bytes, slot| {
        let group = grouped.get(slot.path.as_str());
        let own = planned.next_if(|planned| planned.slot.path == slot.path);
        let plan = own.map(|planned| &planned.plan);
        let rank = group
            .map(|group| group.rank)
            .or(plan.map(|plan| plan.rank))
            .unwrap_or(0);
        let branch = plan
            .map(|plan| plan.branch_bytes)
            .or(group.map(|group| group.branch_bytes))
            .unwrap_or(0);
        let per_rank = slot
            .in_features
            .saturating_add(slot.out_features)
            .saturating_mul(slot.element_bytes);
        bytes
            .saturating_add(rank.saturating_mul(per_rank))
            .saturating_add(branch)
    })
}
