//! How exact each module will be on a released model as Nunchaku quantizes it, before any model is at
//! hand: the rules of `stack/` for this file alone, with the options' defaults.

use std::collections::HashSet;

use crate::adapter::Adapter;
use crate::adapter::delta::{Delta, Form};
use crate::adapter::exactness::Exactness;
use crate::adapter::module::Module;
use crate::model::slot::MAX_RANK;
use crate::model::{self, KnownModule, Layer, ModuleId, ModuleKind};
use crate::plan::FilePlan;

/// Bytes of full deltas beside quantized layers where nothing else is asked for.
pub const DENSE_BUDGET: u64 = 1 << 30;

/// Smallest rank of the base branch in the released models.
const LEAST_BASE_RANK: u64 = 32;
/// Most ranks that a quantized layer of the released models takes.
pub(super) const MOST_RANKS: u64 = MAX_RANK - LEAST_BASE_RANK;

/// Bytes of a value of a released model.
const ELEMENT_BYTES: u64 = 2;
/// Bytes of the factor that a full delta is stored with.
const UNSCALE_BYTES: u64 = 4;

impl FilePlan {
    /// How exact each module that is applied will be, in file order.
    pub fn exactness(&self) -> Vec<(&Module, Exactness)> {
        let whole = self.whole_slots();
        let class = |module: &Module| {
            let known = model::table().module(module.id);
            let is_whole = whole.contains(&known.place.module);
            let classes = module
                .deltas
                .iter()
                .map(|delta| class_of(known, delta, is_whole));
            classes.max().unwrap_or(Exactness::Exact)
        };
        self.applied_modules()
            .map(|module| (module, class(module)))
            .collect()
    }

    /// The quantized layers that carry their full deltas whole: as many as the budget holds, in the
    /// order of the model.
    fn whole_slots(&self) -> HashSet<ModuleId> {
        let with_full = self
            .applied_modules()
            .filter(|module| module.deltas.iter().any(is_full));
        let mut slots: Vec<ModuleId> = with_full
            .map(|module| model::table().module(module.id))
            .filter(|known| known.layer.is_some_and(Layer::is_quantized))
            .map(|known| known.place.module)
            .collect();
        slots.sort_unstable();
        slots.dedup();
        let mut spent = 0u64;
        slots.retain(|slot| {
            let all = spent.saturating_add(matrix_bytes(*slot));
            let fits = all <= DENSE_BUDGET;
            if fits {
                spent = all;
            }
            fits
        });
        slots.into_iter().collect()
    }
}

fn is_full(delta: &Delta) -> bool {
    matches!(delta.form, Form::Full { .. }) && delta.adapter != Adapter::Set
}

fn matrix_bytes(slot: ModuleId) -> u64 {
    match model::table().module(slot).kind {
        ModuleKind::Linear {
            out_features,
            in_features,
        } => out_features * in_features * ELEMENT_BYTES + UNSCALE_BYTES,
        ModuleKind::Norm { .. } | ModuleKind::Embedding { .. } => 0,
    }
}

/// The class of one delta; `is_whole` says that its layer carries full deltas whole.
fn class_of(known: &KnownModule, delta: &Delta, is_whole: bool) -> Exactness {
    let bound = delta.rank_bound();
    let is_packed = matches!(known.layer, Some(Layer::Svdq | Layer::SvdqInKernel));
    let is_quantized = known.layer.is_some_and(Layer::is_quantized);
    // With a magnitude it runs beside the layer, where no kernel limits ranks.
    let is_cut = match delta.form {
        Form::Full { .. } => is_quantized && !is_whole,
        Form::Pair { .. }
        | Form::Tucker { .. }
        | Form::Packed { .. }
        | Form::Hadamard { .. }
        | Form::Glora { .. }
        | Form::Householder { .. } => is_packed && bound > MOST_RANKS && delta.magnitude.is_none(),
        Form::Kronecker { .. }
        | Form::Diagonal { .. }
        | Form::Rotation(_)
        | Form::Vector { .. } => false,
    };
    match (is_cut, delta.magnitude) {
        (true, _) => Exactness::Truncated,
        (false, Some(_)) => Exactness::Norms,
        (false, None) => Exactness::Exact,
    }
}
