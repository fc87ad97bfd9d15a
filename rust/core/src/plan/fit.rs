//! Modules against the shapes of the released models.

use crate::adapter::delta::Delta;
use crate::adapter::module::Module;
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
    let found = match (module.shape, module.deltas.first()) {
        (Some((out, inp)), _) => Some((out, Some(inp))),
        (None, Some(delta)) => delta.shape(),
        (None, None) => return Fit::Unknown,
    };
    match misfit(found, sides, known.model.name()) {
        Some(text) => Fit::Differs(text),
        None if module.shape.is_some() => Fit::Fits,
        // A bias alone is no witness: many modules have as many outputs.
        None => Fit::Unknown,
    }
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
    misfit(delta.shape(), sides, owner)
}

fn misfit(
    found: Option<(u64, Option<u64>)>,
    (out, inp): (u64, u64),
    owner: &str,
) -> Option<String> {
    match found {
        Some((rows, None)) if rows == out => None,
        Some((rows, Some(columns))) if (rows, columns) == (out, inp) => None,
        Some((rows, None)) => Some(format!("has {rows} values where {owner} has {out}")),
        Some((rows, Some(1))) if inp == 1 => {
            Some(format!("has {rows} values where {owner} has {out}"))
        }
        Some((rows, Some(columns))) => {
            Some(format!("is {rows}x{columns} where {owner} has {out}x{inp}"))
        }
        None => Some(format!("is beyond any size where {owner} has {out}x{inp}")),
    }
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
