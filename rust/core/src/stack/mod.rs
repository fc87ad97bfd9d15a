//! File plans, strengths and the slots of the model at hand: the StackPlan.
//!
//! Everything is validated here, before a tensor is read or the model is touched.

mod branch;
mod dense;
mod group;
mod index;
mod piece;
mod placed;
mod planner;
mod route;
mod uniform;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::adapter::delta::{Parameter, Side};
use crate::adapter::exactness::Exactness;
use crate::adapter::rotation::RotationRule;
use crate::adapter::{Adapter, PieceKind};
use crate::model::slot::{self, MlpPath, RowOrder, Slot, SlotKind};
use crate::plan::FilePlan;
pub use crate::plan::exactness::DENSE_BUDGET;
pub use branch::{PartForm, PartRoom, PartShape};
pub use group::{Group, Grouped, Located, Member, Share};
pub use index::SlotIndex;
pub use piece::MAX_KRON_RANK;
pub use placed::PlacedStack;
use planner::Planner;
pub use route::Route;

/// One LoRA of a stack.
#[derive(Debug, Clone, Copy)]
pub struct StackItem<'p> {
    /// Its name in reports.
    pub name: &'p str,
    /// Its plan.
    pub plan: &'p FilePlan,
    /// Its strength.
    pub strength: f64,
    /// Whether its part in the modulation layers is applied.
    pub modulation: bool,
    /// The slots that get nothing of it, by their places in the map, ascending.
    pub off: &'p [usize],
}

/// The scale of a LoKr whose factors are both stored as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LokrScale {
    /// 1, as every trainer means it.
    #[default]
    Standard,
    /// `ss_network_alpha` / `ss_network_dim`, where the metadata has both: a few files need it,
    /// and nothing in them tells.
    Network,
}

/// Ranks that a delta is cut to where nothing else is asked for.
pub const TRUNCATED_RANK: u64 = 256;

/// The caller's options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct StackOptions {
    /// Most ranks that the LoRAs may add to a slot; `None`: as many as the kernels take.
    pub max_rank: Option<u64>,
    /// Whether anything that is left out is an error.
    pub strict: bool,
    /// Rank of the optimum that stands for a delta of higher rank, where a slot can carry nothing
    /// but rank.
    pub truncated_rank: u64,
    /// The scale of a LoKr without low-rank factors.
    pub lokr_scale: LokrScale,
    /// How Nunchaku's fused MLPs are computed where a delta is more than rank.
    #[serde(default)]
    pub mlp: MlpPath,
    /// Bytes that full deltas may take beside quantized layers, all together; beyond them they are
    /// cut.
    #[serde(default = "default_dense_budget")]
    pub dense_budget: u64,
}

fn default_dense_budget() -> u64 {
    DENSE_BUDGET
}

impl Default for StackOptions {
    fn default() -> Self {
        Self {
            max_rank: None,
            strict: false,
            truncated_rank: TRUNCATED_RANK,
            lokr_scale: LokrScale::Standard,
            mlp: MlpPath::Exact,
            dense_budget: DENSE_BUDGET,
        }
    }
}

/// Why a module of a LoRA is not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipKind {
    /// The adapter or a part of it is not supported.
    Unsupported,
    /// Tensors are missing or contradict each other.
    Broken,
    /// The shape is not the module's.
    Shape,
    /// The model has no such module.
    Missing,
    /// The row order of this layer is not known.
    UnknownLayout,
    /// The caller turned these layers off.
    TurnedOff,
    /// A tensor of no module of the model.
    Foreign,
}

/// A module, or a tensor, that is left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Skip {
    /// Index of the LoRA.
    pub lora: usize,
    /// The module's path, or the tensor's key.
    pub name: String,
    /// Why, as a kind.
    pub kind: SkipKind,
    /// Why, in words.
    pub reason: String,
    /// The kind of piece that it would have been.
    pub piece: Option<PieceKind>,
    /// Whether the delta is incomplete without it.
    pub matters: bool,
    /// Whether nothing that was trained is lost with it, of another component either.
    pub harmless: bool,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorRef {
    /// Its key.
    pub key: String,
    /// Which tensor of the file it is.
    pub index: usize,
    /// Its safetensors dtype.
    pub dtype: &'static str,
    /// Its shape in the file.
    pub shape: Vec<u64>,
    /// Its first byte in the file.
    pub offset_bytes: u64,
    /// How many there are.
    pub len_bytes: u64,
    /// Where these are some of its rows alone, the first of them; shape and place are theirs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_row: Option<u64>,
}

/// One delta that a slot carries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Piece {
    /// How it is executed.
    pub kind: PieceKind,
    /// The kind of adapter that it is stored as.
    pub adapter: Adapter,
    /// Index of its LoRA.
    pub lora: usize,
    /// The module it came from.
    #[serde(rename = "target")]
    pub module: String,
    /// Its rank, or an upper bound; 0 where it takes none.
    pub rank: u64,
    /// Columns of the exact pair that the stored delta equals, or the most that its shape allows.
    pub rank_bound: u64,
    /// The rank of the optimum that stands for a delta of a higher rank.
    pub rank_budget: Option<u64>,
    /// Factor on the raw product without the strength.
    pub scale: f64,
    /// First of the slot's logical output rows that it changes.
    pub row_begin: u64,
    /// How many rows it changes.
    pub row_count: u64,
    /// For a vector, what it is added to.
    pub parameter: Option<Parameter>,
    /// For a diagonal or a rotation, the side of the weight that it is multiplied to.
    pub side: Option<Side>,
    /// For a rotation, how its blocks become rotations.
    pub rotation: Option<RotationRule>,
    /// Whether the layer's bias is stretched with its rows.
    pub scales_bias: bool,
    /// How exact it is.
    pub exactness: Exactness,
    /// Its tensors, by role.
    pub tensors: BTreeMap<&'static str, TensorRef>,
}

/// One slot's pieces.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlotPlan {
    /// The slot's path.
    pub path: String,
    /// Its kind.
    pub kind: SlotKind,
    /// Order of its output rows.
    pub row_order: RowOrder,
    /// Rank of the base branch.
    pub base_rank: u64,
    /// The way in which it carries ranks.
    pub route: Route,
    /// Upper bound of the ranks added, after the limit; inside, each LoRA is padded to 16.
    pub rank: u64,
    /// Most ranks that may be added; `None`: no limit.
    pub rank_limit: Option<u64>,
    /// Upper bound of the bytes that its pieces take beside ranks.
    pub branch_bytes: u64,
    /// Under offload, the index of the uniform slots that it is one of.
    #[serde(rename = "group")]
    pub uniform: Option<usize>,
    /// The pieces, LoRA by LoRA in the order of the stack.
    pub pieces: Vec<Piece>,
}

/// Slots whose rank and side branches must be the same, because offload copies them through one
/// buffer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UniformSlots {
    /// Their common path, the block's number replaced by `*`.
    pub pattern: String,
    /// All of them, those without a piece included.
    pub slots: Vec<String>,
    /// The way in which each carries ranks.
    pub route: Route,
    /// Upper bound of the rank that each gets.
    pub rank: u64,
    /// The parts beside the layer that each has room for.
    pub room: Vec<PartRoom>,
    /// Upper bound of the bytes of those, in each.
    pub branch_bytes: u64,
}

/// A LoRA of the planned stack.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraRow {
    /// Its name in reports.
    pub name: String,
    /// Its strength.
    pub strength: f64,
}

/// The plan of a stack for the model at hand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StackPlan {
    /// Version of the document.
    pub schema: u32,
    /// The LoRAs, in the order of the stack.
    pub loras: Vec<LoraRow>,
    /// The slots that change, in model order.
    pub slots: Vec<SlotPlan>,
    /// Slots that offload wants alike.
    #[serde(rename = "groups")]
    pub uniform: Vec<UniformSlots>,
    /// Modules and tensors that are left out.
    pub skipped: Vec<Skip>,
    /// Modules applied, per LoRA.
    pub applied_modules: Vec<usize>,
    /// Upper bound of the bytes that the stack adds to the model.
    pub added_bytes: u64,
}

/// Why a stack is refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum StackError {
    /// A LoRA is another model's.
    #[error("`{lora}` cannot be applied: {reason}")]
    OtherModel {
        /// The LoRA.
        lora: String,
        /// Its kind.
        reason: String,
    },
    /// Nothing of a LoRA can be applied to this model.
    #[error("nothing of `{lora}` can be applied: {reason}")]
    NothingApplicable {
        /// The LoRA.
        lora: String,
        /// Why.
        reason: String,
    },
    /// Strict: something would be left out.
    #[error("`{lora}`: `{name}` would be left out: {reason}\nhint: strict=False applies the rest")]
    Strict {
        /// The LoRA.
        lora: String,
        /// The module or tensor.
        name: String,
        /// Why, as a kind.
        kind: SkipKind,
        /// Why, in words.
        reason: String,
    },
    /// A slot's base leaves no room within the kernels' limit.
    #[error(
        "`{slot}` has base rank {base_rank}: the kernels take {} in all",
        slot::MAX_RANK
    )]
    SlotFull {
        /// The slot.
        slot: String,
        /// Its base rank.
        base_rank: u64,
    },
    /// A limit that leaves nothing.
    #[error("{option} is 0: it must be at least 1")]
    RankLimit {
        /// The option's name.
        option: &'static str,
    },
}

impl PlacedStack {
    /// Plans a stack onto a model.
    ///
    /// # Arguments
    /// `index` is of `slots`.
    pub fn new(
        items: &[StackItem<'_>],
        slots: &[Slot],
        index: &SlotIndex,
        options: StackOptions,
    ) -> Result<Self, StackError> {
        for (option, limit) in [
            ("max_rank", options.max_rank),
            ("truncated_rank", Some(options.truncated_rank)),
        ] {
            if limit == Some(0) {
                return Err(StackError::RankLimit { option });
            }
        }
        let mut planner = Planner {
            slots,
            index,
            options,
            placed: Vec::new(),
            skipped: Vec::new(),
        };
        let applied_modules = items
            .iter()
            .enumerate()
            .map(|(lora, item)| planner.add(lora, item))
            .collect::<Result<_, _>>()?;
        planner.finish(items, applied_modules)
    }
}

impl StackPlan {
    /// Plans a stack onto a model, and tells all of it.
    pub fn new(
        items: &[StackItem<'_>],
        slots: &[Slot],
        options: StackOptions,
    ) -> Result<Self, StackError> {
        let plans: Vec<&FilePlan> = items.iter().map(|item| item.plan).collect();
        let placed = PlacedStack::new(items, slots, &SlotIndex::new(slots), options)?;
        Ok(placed.told(&plans, slots))
    }

    /// The document as JSON.
    pub fn to_json(&self) -> String {
        // Strings and numbers always serialise; one that is not finite would become `null`.
        serde_json::to_string(self).unwrap_or_default()
    }
}
