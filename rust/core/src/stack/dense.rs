//! Full deltas that run whole beside quantized layers, as long as the budget of bytes lasts.

use std::collections::HashSet;

use super::StackOptions;
use super::branch::PartShape;
use super::index::SlotIndex;
use super::piece;
use super::placed::Placed;
use crate::adapter::PieceKind;
use crate::adapter::delta::Form;
use crate::model::slot::Slot;
use crate::plan::FilePlan;

/// The bytes that are spent, and what has a matrix for them.
#[derive(Default)]
struct Spent {
    bytes: u64,
    slots: HashSet<usize>,
    /// Patterns whose offloaded slots all have room for one.
    patterns: HashSet<usize>,
}

/// Executes full deltas of quantized layers whole, LoRA by LoRA in the order of the stack and slot
/// by slot, where the bytes of each fit what the budget has left. A slot has one matrix, in which all
/// of them are summed. Under offload all slots of its pattern have room for one.
pub(super) fn keep_whole(
    placed: &mut [Placed],
    plans: &[&FilePlan],
    slots: &[Slot],
    index: &SlotIndex,
    options: StackOptions,
) {
    let mut order: Vec<usize> = placed
        .iter()
        .enumerate()
        .filter(|(_, own)| is_cut(own, plans, slots, options))
        .map(|(at, _)| at)
        .collect();
    if order.is_empty() {
        return;
    }
    // They are in the order of their slots: a stable sort keeps it in each LoRA.
    order.sort_by_key(|&at| placed.get(at).map(|own| own.lora));
    let members = members_of(slots, index);
    let mut spent = Spent::default();
    for at in order {
        let Some(own) = placed.get_mut(at) else {
            continue;
        };
        if spent.takes(own, slots, index, &members, options.dense_budget) {
            own.execution = piece::beside(PieceKind::Dense);
        }
    }
}

/// Whether it is a full delta that a slot would carry whole, but for its bytes.
fn is_cut(own: &Placed, plans: &[&FilePlan], slots: &[Slot], options: StackOptions) -> bool {
    let Some(slot) = slots.get(own.slot) else {
        return false;
    };
    let is_full = || {
        let origin = own.origin(plans);
        origin.is_some_and(|(_, delta)| matches!(delta.form, Form::Full { .. }))
    };
    own.execution.kind == PieceKind::Dense
        && slot.is_quantized()
        && slot.carries_branch(options.mlp)
        && is_full()
}

/// How many offloaded slots each pattern has.
fn members_of(slots: &[Slot], index: &SlotIndex) -> Vec<u64> {
    let mut members = vec![0; index.pattern_count()];
    for (at, _) in slots.iter().enumerate().filter(|(_, slot)| slot.offloaded) {
        if let Some(count) = index.pattern_of(at).and_then(|at| members.get_mut(at)) {
            *count += 1;
        }
    }
    members
}

impl Spent {
    /// Whether the budget has the bytes of a part; then they are spent.
    fn takes(
        &mut self,
        own: &Placed,
        slots: &[Slot],
        index: &SlotIndex,
        members: &[u64],
        budget: u64,
    ) -> bool {
        let Some(slot) = slots.get(own.slot) else {
            return false;
        };
        if self.slots.contains(&own.slot) {
            return true;
        }
        let pattern = index.pattern_of(own.slot).filter(|_| slot.offloaded);
        let copies = match pattern {
            Some(at) if self.patterns.contains(&at) => 0,
            Some(at) => members.get(at).copied().unwrap_or(1),
            None => 1,
        };
        let bytes = PartShape::dense(slot).bytes(slot.element_bytes);
        let all = self.bytes.saturating_add(bytes.saturating_mul(copies));
        if all > budget {
            return false;
        }
        self.bytes = all;
        self.slots.insert(own.slot);
        self.patterns.extend(pattern);
        true
    }
}
