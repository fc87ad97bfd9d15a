//! Modules against the shapes of the released models.

use crate::adapter::delta::{Delta, Form, Parameter, Sides};
use crate::adapter::module::Module;
use crate::adapter::{Adapter, set_weight};
use crate::model::{self, Model, ModuleKind};

/// How a module's shapes compare with the released model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// They agree.
    Fits,
    /// They do not: what is there, what belongs there.
    Differs(String),
    /// Nothing to compare.
    Unknown,
}

/// Compares a module's delta with the weight of the released model.
pub fn fit(module: &Module) -> Fit {
    let known = model::table().module(module.id);
    let sides = out_in(known.kind);
    let owner = known.model.name();
    let found = match (module.shape, module.deltas.first()) {
        (Some((out, inp)), _) => misfit(Some((Some(out), Some(inp))), sides, owner),
        (None, Some(delta)) => misfit_of(delta, sides, owner),
        (None, None) => return Fit::Unknown,
    };
    // A bias alone is no witness: many modules have as many outputs.
    let is_bias = |delta: &Delta| {
        let parameter = Parameter::Bias;
        matches!(delta.form, Form::Vector { parameter: own, .. } if own == parameter)
    };
    match found {
        Some(text) => Fit::Differs(text),
        None if module.shape.is_some() || !module.deltas.first().is_some_and(is_bias) => Fit::Fits,
        None => Fit::Unknown,
    }
}

/// Why a released model takes no such adapter at this module, although its shapes fit.
pub fn refusal(module: &Module) -> Option<String> {
    let known = model::table().module(module.id);
    module.deltas.first()?;
    let is_set = module.adapter == Adapter::Set && known.layer?.is_quantized();
    is_set.then(|| set_weight::OF_QUANTIZED.to_owned())
}

/// Deltas beside the weight's that do not fit the released model: (tensor, how).
pub fn misfits_beside(module: &Module) -> Vec<(usize, String)> {
    let known = model::table().module(module.id);
    let sides = out_in(known.kind);
    let beside = module.deltas.iter().skip(1);
    beside
        .filter_map(|delta| {
            let (_, tensor) = delta.tensors().into_iter().next()?;
            Some((tensor.index, misfit_of(delta, sides, known.model.name())?))
        })
        .collect()
}

/// How a delta differs from a module of (out, in), where it does; `owner` has the module.
pub fn misfit_of(delta: &Delta, sides: (u64, u64), owner: &str) -> Option<String> {
    misfit(delta.shape(), sides, owner).or_else(|| uneven_blocks(delta, sides.1, owner))
}

fn misfit(found: Option<Sides>, (out, inp): (u64, u64), owner: &str) -> Option<String> {
    let differs = |own: Option<u64>, other: u64| own.is_some_and(|own| own != other);
    match found {
        Some((rows, columns)) if !differs(rows, out) && !differs(columns, inp) => None,
        Some((Some(rows), Some(columns))) if (columns, inp) != (1, 1) => {
            Some(format!("is {rows}x{columns} where {owner} has {out}x{inp}"))
        }
        Some((Some(rows), _)) => Some(format!("has {rows} values where {owner} has {out}")),
        Some((None, columns)) => {
            let columns = columns.unwrap_or(inp);
            Some(format!("is of {columns} inputs where {owner} has {inp}"))
        }
        None => Some(format!("is beyond any size where {owner} has {out}x{inp}")),
    }
}

/// One block that stands for all turns whole blocks of the inputs.
fn uneven_blocks(delta: &Delta, inp: u64, owner: &str) -> Option<String> {
    let Form::Rotation(rotation) = delta.form else {
        return None;
    };
    let is_uneven = rotation.rule.shared && !inp.is_multiple_of(rotation.size);
    let size = rotation.size;
    is_uneven.then(|| format!("has a block of {size} inputs where {owner} has {inp}"))
}

/// (out, in) of a module; a norm has one input.
fn out_in(kind: ModuleKind) -> (u64, u64) {
    match kind {
        ModuleKind::Linear {
            out_features,
            in_features,
        } => (out_features, in_features),
        ModuleKind::Norm { channels } => (channels, 1),
        ModuleKind::Embedding { rows, dim } => (dim, rows),
    }
}

/// The model most modules belong to.
pub fn majority_model(modules: &[Module]) -> Option<Model> {
    let count = |model: Model| {
        let own = |module: &&Module| model::table().module(module.id).model == model;
        modules.iter().filter(own).count()
    };
    // Of equals the first: `max_by_key` takes the last.
    let most = Model::ALL
        .into_iter()
        .rev()
        .max_by_key(|model| count(*model));
    most.filter(|_| !modules.is_empty())
}
