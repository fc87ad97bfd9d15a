//! Slots that are alike: one path over all blocks, with the same `LoRAs` of the same ranks and
//! scales in each. They are composed together, so they are told together.

use std::collections::HashMap;

use serde::Serialize;

use super::{Piece, SlotPlan, StackPlan};
use crate::adapter::{Adapter, PieceKind};
use crate::slot::{RowOrder, Slot, SlotKind, pad_rank};

/// Dtypes that are packed as they are; others are converted slot by slot.
const DTYPES: [&str; 3] = ["BF16", "F16", "F32"];

/// The same tensor of a module in every slot of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AlikeTensor {
    /// Bytes of each.
    pub len_bytes: u64,
    /// Where each begins in the file, slot by slot.
    pub offsets_bytes: Vec<u64>,
    /// Which tensor of the file each is.
    pub indices: Vec<usize>,
}

/// A module of one LoRA in every slot of a group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlikeMember {
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
    pub down: AlikeTensor,
    /// (rows, rank).
    pub up: AlikeTensor,
}

/// What one LoRA brings to every slot of a group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlikeStack {
    /// Index of the LoRA.
    pub lora: usize,
    /// Its modules, by rows.
    pub members: Vec<AlikeMember>,
}

/// Slots of one path that get deltas of the same shapes and scales.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlikeSlots {
    /// Indices in the slot map that was planned for.
    pub slots: Vec<usize>,
    /// Order of their output rows.
    pub row_order: RowOrder,
    /// What each LoRA brings, in the order of the stack.
    pub stacks: Vec<AlikeStack>,
}

/// The slots of a plan, those that are alike together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Grouped<'p> {
    /// Groups, in the order of their first slots.
    pub alike: Vec<AlikeSlots>,
    /// Index in the slot map and plan of each slot that is in none: another adapter than plain
    /// LoRA, or ranks that may exceed the limit.
    pub single: Vec<(usize, &'p SlotPlan)>,
}

/// Equal for slots that can be composed together.
#[derive(PartialEq, Eq, Hash)]
struct SlotKey<'s> {
    pattern: &'s str,
    offloaded: bool,
    kind: SlotKind,
    sizes: [u64; 4],
    pieces: Vec<PieceKey>,
}

#[derive(PartialEq, Eq, Hash)]
struct PieceKey {
    lora: usize,
    rank: u64,
    scale_bits: u64,
    rows: (u64, u64),
    dtype: &'static str,
}

impl StackPlan {
    /// Sorts the slots into groups.
    ///
    /// # Arguments
    /// `slots` is the slot map that the plan was made for.
    pub fn grouped<'p>(&'p self, slots: &[Slot]) -> Grouped<'p> {
        // Both are in model order.
        let mut rest = slots.iter().enumerate();
        let mut places: HashMap<SlotKey<'_>, usize> = HashMap::new();
        let mut found = Grouped {
            alike: Vec::new(),
            single: Vec::new(),
        };
        for plan in &self.slots {
            let Some((index, slot)) = rest.find(|(_, slot)| slot.path == plan.path) else {
                break;
            };
            let Some(key) = slot_key(plan, slot) else {
                found.single.push((index, plan));
                continue;
            };
            let at = *places.entry(key).or_insert_with(|| {
                found.alike.push(begin(plan));
                found.alike.len() - 1
            });
            if let Some(group) = found.alike.get_mut(at) {
                group.slots.push(index);
                extend(group, plan);
            }
        }
        found
    }
}

fn slot_key<'s>(plan: &SlotPlan, slot: &'s Slot) -> Option<SlotKey<'s>> {
    let pieces = plan.pieces.iter().map(|piece| piece_key(piece, plan, slot));
    let pieces = pieces.collect::<Option<Vec<_>>>()?;
    has_room(plan).then_some(SlotKey {
        pattern: &slot.pattern,
        offloaded: slot.offloaded,
        kind: slot.kind,
        sizes: [
            slot.in_features,
            slot.out_features,
            slot.base_rank,
            slot.element_bytes,
        ],
        pieces,
    })
}

fn piece_key(piece: &Piece, plan: &SlotPlan, slot: &Slot) -> Option<PieceKey> {
    let (down, up) = (piece.tensors.get("down")?, piece.tensors.get("up")?);
    let is_plain = piece.kind == PieceKind::LowRank
        && piece.adapter == Adapter::Lora
        && piece.tensors.len() == 2
        && piece.scale.is_finite()
        && piece.scale != 0.0;
    // One delta for the rows of q, k and v may have an alpha that is a third of what is meant:
    // that is looked for slot by slot.
    let is_fused = piece.target.ends_with("to_qkv") || piece.target.ends_with("add_qkv_proj");
    let is_whole = piece.row_count == slot.out_features;
    let fits = down.dtype == up.dtype
        && DTYPES.contains(&down.dtype)
        && as_matrix(&down.shape) == Some((piece.rank, slot.in_features))
        && as_matrix(&up.shape) == Some((piece.row_count, piece.rank))
        && (plan.row_order == RowOrder::Planar || is_whole);
    (is_plain && !is_fused && fits).then_some(PieceKey {
        lora: piece.lora,
        rank: piece.rank,
        scale_bits: piece.scale.to_bits(),
        rows: (piece.row_begin, piece.row_count),
        dtype: down.dtype,
    })
}

/// A shape as (rows, columns); what tools store as a 1x1 convolution is a matrix.
fn as_matrix(shape: &[u64]) -> Option<(u64, u64)> {
    let (rows, rest) = shape.split_first()?;
    let columns = rest
        .iter()
        .try_fold(1u64, |product, side| product.checked_mul(*side))?;
    Some((*rows, columns))
}

/// Whether all ranks fit as they are, even where no two modules share any.
fn has_room(plan: &SlotPlan) -> bool {
    let Some(limit) = plan.rank_limit else {
        return true;
    };
    let ranks = plan
        .pieces
        .chunk_by(|a, b| a.lora == b.lora)
        .map(|own| own.iter().map(|piece| piece.rank).sum::<u64>());
    let (exact, padded) = ranks.fold((0, 0), |(exact, padded), rank: u64| {
        (exact + rank, padded + pad_rank(rank))
    });
    exact <= limit && padded <= pad_rank(limit)
}

fn begin(plan: &SlotPlan) -> AlikeSlots {
    let stack = |own: &[Piece]| AlikeStack {
        lora: own.first().map_or(0, |piece| piece.lora),
        members: own.iter().map(member).collect(),
    };
    AlikeSlots {
        slots: Vec::new(),
        row_order: plan.row_order,
        stacks: plan
            .pieces
            .chunk_by(|a, b| a.lora == b.lora)
            .map(stack)
            .collect(),
    }
}

fn member(piece: &Piece) -> AlikeMember {
    let tensor = |role| AlikeTensor {
        len_bytes: piece.tensors.get(role).map_or(0, |t| t.len_bytes),
        offsets_bytes: Vec::new(),
        indices: Vec::new(),
    };
    AlikeMember {
        rank: piece.rank,
        scale: piece.scale,
        row_begin: piece.row_begin,
        row_count: piece.row_count,
        dtype: piece.tensors.get("down").map_or("", |t| t.dtype),
        down: tensor("down"),
        up: tensor("up"),
    }
}

fn extend(group: &mut AlikeSlots, plan: &SlotPlan) {
    let members = group.stacks.iter_mut().flat_map(|s| s.members.iter_mut());
    for (member, piece) in members.zip(&plan.pieces) {
        for (role, own) in [("down", &mut member.down), ("up", &mut member.up)] {
            if let Some(tensor) = piece.tensors.get(role) {
                own.offsets_bytes.push(tensor.offset_bytes);
                own.indices.push(tensor.index);
            }
        }
    }
}
