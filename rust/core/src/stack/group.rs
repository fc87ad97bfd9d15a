//! Slots that are alike: one path over all blocks, with the same `LoRAs` of the same ranks and
//! scales in each. They are composed together, so they are told together.

use super::index::SlotIndex;
use super::placed::{Placed, PlacedSlot, PlacedStack};
use super::{Route, SlotPlan};
use crate::adapter::delta::{Factor, Form, WeightOrder};
use crate::adapter::{Adapter, PieceKind};
use crate::dtype::Dtype;
use crate::key::table::Entry;
use crate::model;
use crate::model::slot::{RowOrder, Slot, pad_rank};
use crate::plan::FilePlan;

/// Dtypes that are packed as they are; others are converted slot by slot.
const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// The same tensor of a module in every slot of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// Bytes of each.
    pub len_bytes: u64,
    /// The first byte of each in the file, slot by slot.
    pub offsets_bytes: Vec<u64>,
    /// Which tensor of the file each is.
    pub indices: Vec<u64>,
}

/// A module of one LoRA in every slot of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its rank.
    pub rank: u64,
    /// Factor on the raw product without the strength.
    pub scale: f64,
    /// First of the slot's logical output rows that it changes.
    pub row_begin: u64,
    /// How many rows it changes.
    pub row_count: u64,
    /// Safetensors dtype of both factors.
    pub dtype: &'static str,
    /// (rank, columns).
    pub down: Located,
    /// (rows, rank).
    pub up: Located,
}

/// One LoRA's share in every slot of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Index of the LoRA.
    pub lora: usize,
    /// Its modules, by rows.
    pub members: Vec<Member>,
}

/// Slots of one path that get deltas of the same shapes and scales.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Indices in the slot map that was planned for.
    pub slots: Vec<usize>,
    /// Order of their output rows.
    pub row_order: RowOrder,
    /// The share of each LoRA, in the order of the stack.
    pub shares: Vec<Share>,
}

/// The slots of a plan, those that are alike together.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// Groups, in the order of their first slots.
    pub groups: Vec<Group>,
    /// Index in the slot map and plan of each slot that is in none: another adapter than plain
    /// LoRA, ranks that run beside the layer, or ranks that may exceed the limit.
    pub single: Vec<(usize, SlotPlan)>,
}

/// A pair that can be composed together with others.
#[derive(Clone, Copy)]
struct Pair<'p> {
    placed: Placed,
    dtype: Dtype,
    down: (usize, &'p Entry),
    up: (usize, &'p Entry),
}

impl Pair<'_> {
    /// Whether another one, in another slot of the same path, is composed as this one is.
    fn is_like(&self, other: &Self) -> bool {
        let (own, its) = (&self.placed, &other.placed);
        own.lora == its.lora
            && own.execution.rank == its.execution.rank
            && own.scale.to_bits() == its.scale.to_bits()
            && own.rows == its.rows
            && self.dtype == other.dtype
    }
}

/// A group while it is being found.
struct Forming<'p> {
    /// Its first slot, and the pairs of that.
    first: &'p Slot,
    pairs: Vec<Pair<'p>>,
    group: Group,
}

impl Forming<'_> {
    fn takes(&self, slot: &Slot, pairs: &[Pair<'_>]) -> bool {
        let own = self.first;
        own.offloaded == slot.offloaded
            && own.kind == slot.kind
            && own.in_features == slot.in_features
            && own.out_features == slot.out_features
            && own.base_rank == slot.base_rank
            && own.element_bytes == slot.element_bytes
            && self.pairs.len() == pairs.len()
            && self.pairs.iter().zip(pairs).all(|(a, b)| a.is_like(b))
    }

    fn add(&mut self, slot: usize, pairs: &[Pair<'_>]) {
        self.group.slots.push(slot);
        let members = self
            .group
            .shares
            .iter_mut()
            .flat_map(|s| s.members.iter_mut());
        for (member, pair) in members.zip(pairs) {
            member.down.add(pair.down);
            member.up.add(pair.up);
        }
    }
}

impl Located {
    fn add(&mut self, (index, entry): (usize, &Entry)) {
        self.offsets_bytes.push(entry.tensor.offset_bytes);
        self.indices.push(index as u64);
    }
}

impl PlacedStack {
    /// Sorts the slots into groups.
    ///
    /// # Arguments
    /// As everywhere here the plans and slots that the stack was made of; `index` is of the slots.
    pub fn grouped(&self, plans: &[&FilePlan], slots: &[Slot], index: &SlotIndex) -> Grouped {
        let mut forming: Vec<Forming<'_>> = Vec::new();
        let mut of_pattern: Vec<Vec<usize>> = vec![Vec::new(); index.pattern_count()];
        let mut single = Vec::new();
        let mut pairs = Vec::new();
        for placed in &self.slots {
            let Some(slot) = slots.get(placed.slot) else {
                continue;
            };
            let known = index
                .pattern_of(placed.slot)
                .and_then(|at| of_pattern.get_mut(at));
            let own = self.deltas_of(placed);
            let (Some(known), true) = (known, find_pairs(own, placed, plans, slot, &mut pairs))
            else {
                single.push((placed.slot, self.slot_plan(placed, plans, slot)));
                continue;
            };
            let fitting = known.iter().copied().find(|&at| {
                let group = forming.get(at);
                group.is_some_and(|group| group.takes(slot, &pairs))
            });
            let at = fitting.unwrap_or_else(|| {
                known.push(forming.len());
                forming.push(Forming {
                    first: slot,
                    pairs: pairs.clone(),
                    group: begin(placed, &pairs),
                });
                forming.len() - 1
            });
            if let Some(group) = forming.get_mut(at) {
                group.add(placed.slot, &pairs);
            }
        }
        let groups = forming.into_iter().map(|own| own.group).collect();
        Grouped { groups, single }
    }
}

/// The pairs of a slot; whether all that it gets are such, and fit as they are.
fn find_pairs<'p>(
    own: &[Placed],
    placed: &PlacedSlot,
    plans: &[&'p FilePlan],
    slot: &Slot,
    into: &mut Vec<Pair<'p>>,
) -> bool {
    into.clear();
    if placed.route == Route::Beside {
        return false;
    }
    into.extend(
        own.iter()
            .map_while(|own| pair_of(own, placed, plans, slot)),
    );
    into.len() == own.len() && has_room(placed, own)
}

fn pair_of<'p>(
    own: &Placed,
    placed: &PlacedSlot,
    plans: &[&'p FilePlan],
    slot: &Slot,
) -> Option<Pair<'p>> {
    let (module, delta) = own.origin(plans)?;
    let Form::Pair { down, up, order } = delta.form else {
        return None;
    };
    let entries = plans.get(own.lora)?.table.entries();
    let entry = |factor: Factor| Some((factor.index, entries.get(factor.index)?));
    let pair = Pair {
        placed: *own,
        dtype: entry(down)?.1.tensor.dtype,
        down: entry(down)?,
        up: entry(up)?,
    };
    let is_plain = own.execution.kind == PieceKind::LowRank
        && delta.adapter == Adapter::Lora
        && order == WeightOrder::OutIn
        && own.scale.is_finite()
        && own.scale != 0.0;
    // One delta for the rows of q, k and v may have an alpha that is a third of what is meant:
    // that is looked for slot by slot.
    let is_fused = model::table().module(module.id).is_fused();
    let is_whole = own.rows.1 == slot.out_features;
    let fits = pair.up.1.tensor.dtype == pair.dtype
        && DTYPES.contains(&pair.dtype)
        && (down.rows, down.columns) == (own.execution.rank, slot.in_features)
        && (up.rows, up.columns) == (own.rows.1, own.execution.rank)
        && (placed.row_order == RowOrder::Planar || is_whole);
    (is_plain && !is_fused && fits).then_some(pair)
}

/// Whether all ranks fit as they are, even where no two modules share any.
fn has_room(placed: &PlacedSlot, own: &[Placed]) -> bool {
    let Some(limit) = placed.rank_limit else {
        return true;
    };
    let ranks = own
        .chunk_by(|a, b| a.lora == b.lora)
        .map(|own| own.iter().map(|own| own.execution.rank).sum::<u64>());
    let (exact, padded) = ranks.fold((0, 0), |(exact, padded), rank: u64| {
        (exact + rank, padded + pad_rank(rank))
    });
    exact <= limit && padded <= pad_rank(limit)
}

fn begin(placed: &PlacedSlot, pairs: &[Pair<'_>]) -> Group {
    let share = |own: &[Pair<'_>]| Share {
        lora: own.first().map_or(0, |pair| pair.placed.lora),
        members: own.iter().map(member).collect(),
    };
    Group {
        slots: Vec::new(),
        row_order: placed.row_order,
        shares: pairs
            .chunk_by(|a, b| a.placed.lora == b.placed.lora)
            .map(share)
            .collect(),
    }
}

fn member(pair: &Pair<'_>) -> Member {
    let tensor = |(_, entry): (usize, &Entry)| Located {
        len_bytes: entry.tensor.len_bytes,
        offsets_bytes: Vec::new(),
        indices: Vec::new(),
    };
    Member {
        rank: pair.placed.execution.rank,
        scale: pair.placed.scale,
        row_begin: pair.placed.rows.0,
        row_count: pair.placed.rows.1,
        dtype: pair.dtype.name(),
        down: tensor(pair.down),
        up: tensor(pair.up),
    }
}
