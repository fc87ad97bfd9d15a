//! How a delta is executed in a slot.

use super::placed::{Placed, Takes};
use super::{Route, SkipKind, StackOptions};
use crate::adapter::delta::{Delta, Form, Parameter};
use crate::adapter::exactness::Exactness;
use crate::adapter::{Adapter, PieceKind, set_weight};
use crate::model::slot::{Slot, SlotKind, pad_rank};

/// A Kronecker product of at most this rank is executed as rank: up to there, ranks in a branch
/// that is computed anyway cost less than the launches of a side branch of their own. Beyond, the
/// side branch is the cheaper: `W1 X W2ᵀ` of a 3072x3072 module costs as much as a LoRA of rank 56
/// to 166.
pub const MAX_KRON_RANK: u64 = 128;

/// A Hadamard product whose exact pair is wider than this share of the matrix itself is decomposed
/// as a matrix where it has to be cut: that is the smaller problem.
const HADAMARD_SHARE: u64 = 2;

/// How a delta is executed, with the ranks that it takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Execution {
    pub(super) kind: PieceKind,
    pub(super) rank: u64,
    pub(super) rank_budget: Option<u64>,
    pub(super) takes: Takes,
    pub(super) exactness: Exactness,
}

/// The destination of a delta.
#[derive(Clone, Copy)]
pub(super) struct Place<'s> {
    /// The slot's place in the map.
    pub(super) at: usize,
    pub(super) slot: &'s Slot,
    /// First of the slot's rows, and how many.
    pub(super) rows: (u64, u64),
    /// Most ranks that may be added to the slot.
    pub(super) rank_limit: Option<u64>,
}

/// The origin of a delta: indices of the LoRA, of the module in its file, of the delta in that,
/// and the rows of it where it is not whole.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    pub(super) lora: usize,
    pub(super) module: usize,
    pub(super) delta: usize,
    pub(super) part: Option<(u64, u64)>,
}

/// Makes a delta a piece of its slot, or says why the slot cannot carry it.
pub(super) fn place(
    delta: &Delta,
    place: &Place<'_>,
    origin: Origin,
    options: StackOptions,
) -> Result<Placed, (SkipKind, String)> {
    check_kind(delta, place)?;
    check_more_than_rank(delta, place.slot, options)?;
    let execution = execution(delta, place, options);
    Ok(Placed {
        slot: place.at,
        lora: origin.lora,
        module: origin.module,
        delta: origin.delta,
        part: origin.part,
        execution,
        scale: delta.scale,
        rows: place.rows,
    })
}

/// Refuses what is more than rank inside a kernel that takes ranks alone.
fn check_more_than_rank(
    delta: &Delta,
    slot: &Slot,
    options: StackOptions,
) -> Result<(), (SkipKind, String)> {
    let kind = delta.piece_kind();
    let is_more = matches!(kind, PieceKind::Diagonal | PieceKind::Rotation);
    if !is_more || slot.carries_branch(options.mlp) {
        return Ok(());
    }
    let title = delta.adapter.title();
    let text = if slot.opens {
        format!(
            "{title} is more than rank, and `mlp=\"rank\"` keeps Nunchaku's fused kernel, which takes \
             ranks alone: `mlp=\"exact\"` applies it"
        )
    } else {
        delta.adapter.in_kernel()
    };
    Err((SkipKind::Unsupported, text))
}

/// Refuses a delta that a kind of slot cannot carry at all.
fn check_kind(delta: &Delta, place: &Place<'_>) -> Result<(), (SkipKind, String)> {
    let slot = place.slot;
    let unsupported = |text: &str| Err((SkipKind::Unsupported, text.to_owned()));
    let is_whole = place.rows == (0, slot.out_features);
    match (delta.form, slot.kind) {
        (Form::Vector { parameter, .. }, kind) => match (parameter, kind) {
            (Parameter::Bias, SlotKind::Norm | SlotKind::Embedding) => {
                unsupported("a bias for a layer that never has one")
            }
            (Parameter::Bias, _) if !slot.has_bias => Err((
                SkipKind::Missing,
                "the model's layer has no bias".to_owned(),
            )),
            (Parameter::Bias, _) | (Parameter::Weight, SlotKind::Norm) => Ok(()),
            (Parameter::Weight, _) => unsupported("a norm's delta for a layer that is no norm"),
        },
        (_, SlotKind::Norm) => unsupported("a norm of this model takes a vector alone"),
        (Form::Full { .. }, SlotKind::Svdq | SlotKind::Awq) if delta.adapter == Adapter::Set => {
            unsupported(set_weight::OF_QUANTIZED)
        }
        (Form::Packed { .. }, kind) if kind != SlotKind::Svdq || !is_whole => {
            unsupported("a Nunchaku-packed pair fits a whole SVDQuant layer, which this is not")
        }
        (
            Form::Tucker { .. }
            | Form::Hadamard { .. }
            | Form::Kronecker { .. }
            | Form::Glora { .. }
            | Form::Householder { .. }
            | Form::Diagonal { .. }
            | Form::Rotation(_),
            SlotKind::Embedding,
        ) => unsupported("an embedding of this model takes a LoRA or a full delta alone"),
        (
            Form::Pair { .. }
            | Form::Tucker { .. }
            | Form::Packed { .. }
            | Form::Hadamard { .. }
            | Form::Kronecker { .. }
            | Form::Glora { .. }
            | Form::Householder { .. }
            | Form::Diagonal { .. }
            | Form::Rotation(_)
            | Form::Full { .. },
            SlotKind::Svdq | SlotKind::Awq | SlotKind::Linear | SlotKind::Embedding,
        ) => Ok(()),
    }
}

/// How a delta that its slot can carry is executed there.
pub(super) fn execution(delta: &Delta, place: &Place<'_>, options: StackOptions) -> Execution {
    let own = plain_execution(delta, place, options);
    let limit = place.rank_limit.unwrap_or(u64::MAX);
    let bound = delta.rank_bound();
    // A matrix may be wider than its rank is.
    let is_cut = match own.takes {
        Takes::Ranks | Takes::Both => {
            bound > limit || (own.rank_budget.is_some() && own.rank < bound)
        }
        Takes::Branch => false,
    };
    let exactness = if is_cut {
        Exactness::Truncated
    } else if delta.magnitude.is_some() {
        Exactness::Norms
    } else {
        Exactness::Exact
    };
    if delta.magnitude.is_none() {
        return Execution { exactness, ..own };
    }
    let takes = match own.takes {
        Takes::Ranks | Takes::Both => Takes::Both,
        Takes::Branch => Takes::Branch,
    };
    Execution {
        kind: PieceKind::Diagonal,
        takes,
        exactness,
        ..own
    }
}

/// The same, magnitudes aside.
fn plain_execution(delta: &Delta, place: &Place<'_>, options: StackOptions) -> Execution {
    let slot = place.slot;
    let bound = delta.rank_bound();
    let limit = place.rank_limit.unwrap_or(u64::MAX);
    let budget = options.truncated_rank.min(limit);
    let of_rank = |rank, rank_budget| Execution {
        kind: PieceKind::LowRank,
        rank,
        rank_budget,
        takes: Takes::Ranks,
        exactness: Exactness::Exact,
    };
    match delta.form {
        Form::Pair { .. }
        | Form::Tucker { .. }
        | Form::Packed { .. }
        | Form::Glora { .. }
        | Form::Householder { .. } => of_rank(bound, None),
        Form::Hadamard { w1_b, w2_b, .. } => {
            let columns = w1_b.rows.saturating_mul(w2_b.rows);
            let side = place.rows.1.min(slot.in_features);
            let is_wide = columns.saturating_mul(HADAMARD_SHARE) > side;
            let rank = bound.min(limit);
            if is_wide && columns > rank {
                of_rank(rank, Some(rank))
            } else {
                // Where it is too much it is cut together with what else the slot carries.
                of_rank(bound, None)
            }
        }
        Form::Kronecker { .. } if bound <= MAX_KRON_RANK => of_rank(bound, None),
        Form::Kronecker { .. } if slot.carries_branch(options.mlp) => beside(PieceKind::Kron),
        // Exact where the kernels take it: a low-rank LoKr is worth its ranks.
        Form::Kronecker { .. } if bound <= limit => of_rank(bound, None),
        Form::Kronecker { .. } => of_rank(budget, Some(budget)),
        Form::Full { .. } if slot.is_quantized() => Execution {
            kind: PieceKind::Dense,
            ..of_rank(bound.min(budget), Some(budget))
        },
        Form::Full { .. } => beside(PieceKind::Dense),
        Form::Diagonal { .. } => beside(PieceKind::Diagonal),
        Form::Rotation(_) => beside(PieceKind::Rotation),
        Form::Vector { .. } => beside(PieceKind::Vector),
    }
}

/// Whole, and no rank.
pub(super) fn beside(kind: PieceKind) -> Execution {
    Execution {
        kind,
        rank: 0,
        rank_budget: None,
        takes: Takes::Branch,
        exactness: Exactness::Exact,
    }
}

/// Ranks of one LoRA's pieces in a slot, padded as the kernels need it where they run inside.
pub(super) fn padded_rank(own: &[Placed], route: Route) -> u64 {
    let ranks = own.iter().map(|placed| placed.execution.rank);
    let sum = ranks.fold(0, u64::saturating_add);
    match route {
        Route::Inside => pad_rank(sum),
        Route::Beside => sum,
    }
}
