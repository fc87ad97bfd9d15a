//! The slots of the model at hand: what Python finds in it and planning needs to know.

use serde::{Deserialize, Serialize};

use crate::model::{self, Layer};

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

/// The build of the block that a slot is in: what a layer's own tensors do not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockBuild {
    /// Nunchaku's: projections are fused, MLPs run in one kernel, and rows lie as its tables say.
    #[default]
    Nunchaku,
    /// diffusers' own: every linear is a module that is called, and rows lie as in LoRA files.
    Stock,
}

/// The way in which layers are computed that Nunchaku fuses with what comes behind them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MlpPath {
    /// By themselves where a delta is more than rank, so that it is exact.
    #[default]
    Exact,
    /// In one kernel, which takes ranks alone.
    Rank,
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
    /// The build of its block; of no weight for a slot outside of blocks.
    #[serde(default)]
    pub build: BlockBuild,
    /// Whether what runs it inside a kernel can be run with the layer by itself.
    #[serde(default)]
    pub opens: bool,
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

    /// Whether anything but ranks can be computed beside it.
    pub fn carries_branch(&self, mlp: MlpPath) -> bool {
        match self.kind {
            SlotKind::Svdq => !self.is_in_kernel() || (self.opens && mlp == MlpPath::Exact),
            SlotKind::Awq | SlotKind::Linear => true,
            SlotKind::Norm | SlotKind::Embedding => false,
        }
    }

    /// Whether it runs inside a kernel that computes more than this layer.
    pub fn is_in_kernel(&self) -> bool {
        match (self.kind, self.build) {
            (SlotKind::Svdq, BlockBuild::Nunchaku) => self.layer() == Some(Layer::SvdqInKernel),
            _ => false,
        }
    }

    /// The order of its output rows; none where it is not known.
    pub fn row_order(&self) -> Option<RowOrder> {
        match self.kind {
            SlotKind::Svdq | SlotKind::Linear | SlotKind::Norm | SlotKind::Embedding => {
                Some(RowOrder::Planar)
            }
            SlotKind::Awq => match (self.build, self.layer()) {
                (BlockBuild::Stock, Some(_)) => Some(RowOrder::Planar),
                (BlockBuild::Nunchaku, Some(Layer::Awq { planes, row_order }))
                    if self.out_features.is_multiple_of(planes) =>
                {
                    Some(row_order)
                }
                _ => None,
            },
        }
    }

    /// How the released model computes the layer at this path.
    fn layer(&self) -> Option<Layer> {
        model::table().layer_at(&self.path)
    }
}

/// `value` up to the next multiple of 16, saturating.
pub fn pad_rank(value: u64) -> u64 {
    value.div_ceil(RANK_MULTIPLE).saturating_mul(RANK_MULTIPLE)
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
            build: BlockBuild::Nunchaku,
            opens: false,
        };
        assert_eq!(slot(SlotKind::Svdq, 40).free_rank(), Some(976));
        assert_eq!(slot(SlotKind::Svdq, 2000).free_rank(), Some(0));
        assert_eq!(slot(SlotKind::Linear, 0).free_rank(), None);
    }
}
