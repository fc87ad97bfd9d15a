//! The slots of the model at hand: what Python finds in it and planning needs to know.

use serde::{Deserialize, Serialize};

/// Highest rank that the low-rank kernels take; past it they read beyond their scale array and
/// return garbage without a word.
pub const MAX_RANK: u64 = 1024;
/// The kernels work on tiles of this many ranks.
pub const RANK_MULTIPLE: u64 = 16;

/// The kind of layer that a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotKind {
    /// SVDQuant W4A4 with a packed low-rank branch.
    Svdq,
    /// AWQ W4A16: takes a side branch.
    Awq,
    /// A plain linear: takes a side branch.
    Linear,
    /// A norm: `out_features` is its length, `in_features` is 1. Takes a vector.
    Norm,
    /// An embedding: `out_features` is its dimension, `in_features` the number of embeddings.
    Embedding,
}

/// The order of a slot's output rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RowOrder {
    /// As in LoRA files.
    Planar,
    /// Nunchaku's modulation: row `plane * channels + channel` lies at `channel * planes + plane`.
    Interleaved,
}

/// One slot of the model at hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its path.
    pub path: String,
    /// Its kind.
    pub kind: SlotKind,
    /// Columns of its weight.
    pub in_features: u64,
    /// Rows of its weight.
    pub out_features: u64,
    /// Rank of the base model's own branch; 0 where there is none.
    pub base_rank: u64,
    /// Bytes of one value of its low-rank tensors.
    pub element_bytes: u64,
    /// Whether its block takes part in CPU offload.
    pub offloaded: bool,
    /// The path with its block's number replaced by `*`: slots that share a buffer under offload.
    pub pattern: String,
    /// Whether it has a bias.
    #[serde(default = "has_bias_unless_told")]
    pub has_bias: bool,
}

/// Every linear of the released models has one.
fn has_bias_unless_told() -> bool {
    true
}

impl Slot {
    /// Most ranks that may be added: a multiple of 16 for packed slots, unlimited for side
    /// branches.
    pub fn free_rank(&self) -> Option<u64> {
        match self.kind {
            SlotKind::Svdq => {
                Some(MAX_RANK.saturating_sub(self.base_rank) / RANK_MULTIPLE * RANK_MULTIPLE)
            }
            SlotKind::Awq | SlotKind::Linear | SlotKind::Norm | SlotKind::Embedding => None,
        }
    }

    /// Whether its weight is quantized: a delta of the weight's shape has no place in it.
    pub fn is_quantized(&self) -> bool {
        matches!(self.kind, SlotKind::Svdq | SlotKind::Awq)
    }

    /// Whether an exact side branch can be computed beside it.
    pub fn carries_branch(&self) -> bool {
        match self.kind {
            SlotKind::Svdq => !is_in_fused_mlp(&self.path),
            SlotKind::Awq | SlotKind::Linear => true,
            SlotKind::Norm | SlotKind::Embedding => false,
        }
    }
}

/// `value` up to the next multiple of 16, saturating.
pub fn pad_rank(value: u64) -> u64 {
    value.div_ceil(RANK_MULTIPLE).saturating_mul(RANK_MULTIPLE)
}

/// Planes of a modulation layer: shift, scale and gate, twice.
pub const MODULATION_PLANES: u64 = 6;

/// The row order of an AWQ layer, known per path: an unknown path has none.
pub fn awq_row_order(path: &str) -> Option<RowOrder> {
    let known = path.starts_with("transformer_blocks.")
        && (path.ends_with(".img_mod.1") || path.ends_with(".txt_mod.1"));
    known.then_some(RowOrder::Interleaved)
}

/// Whether the layer at a path is computed inside the kernel of a whole MLP, where its input and
/// output never surface: known per path.
fn is_in_fused_mlp(path: &str) -> bool {
    let in_block = path
        .strip_prefix("transformer_blocks.")
        .and_then(|rest| rest.split_once('.'));
    in_block.is_some_and(|(_, name)| {
        ["img_mlp.net.", "txt_mlp.net."]
            .iter()
            .any(|mlp| name.starts_with(mlp))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_slots_take_whole_tiles_of_ranks() {
        let slot = |kind, base_rank| Slot {
            path: "proj_out".to_owned(),
            kind,
            in_features: 64,
            out_features: 64,
            base_rank,
            element_bytes: 2,
            offloaded: true,
            pattern: "proj_out".to_owned(),
            has_bias: true,
        };
        assert_eq!(slot(SlotKind::Svdq, 40).free_rank(), Some(976));
        assert_eq!(slot(SlotKind::Svdq, 2000).free_rank(), Some(0));
        assert_eq!(slot(SlotKind::Linear, 0).free_rank(), None);
    }
}
