//! Modules against the shapes of the released models.

use crate::adapter::Adapter;
use crate::model::{self, Model, ModuleKind};
use crate::module::Module;
use crate::role::Role;
use crate::table::Entry;

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

/// Compares a module's tensors with the weight of the released model.
pub fn fit(module: &Module, entries: &[Entry]) -> Fit {
    let target = model::table().target(module.target);
    let ModuleKind::Linear {
        out_features,
        in_features,
    } = target.kind
    else {
        return Fit::Unknown;
    };
    let found = |role| {
        module
            .tensors
            .iter()
            .filter_map(|&i| entries.get(i))
            .find(|e| e.role == role)
    };
    let shape = match module.adapter {
        Adapter::Lora | Adapter::Dora => match module.pair {
            Some(pair) => Some((pair.out_features, pair.in_features)),
            None => found(Role::PackedDown)
                .zip(found(Role::PackedUp))
                .and_then(|(down, up)| {
                    Some((*up.tensor.shape.first()?, *down.tensor.shape.first()?))
                }),
        },
        Adapter::Lokr => lokr_shape(&found),
        Adapter::Loha => found(Role::HadaW1A)
            .zip(found(Role::HadaW1B))
            .and_then(|(a, b)| Some((a.matrix()?.0, b.matrix()?.1))),
        Adapter::Full => found(Role::Diff).and_then(Entry::matrix),
        _ => None,
    };
    match shape {
        None => Fit::Unknown,
        Some(shape) if shape == (out_features, in_features) => Fit::Fits,
        Some((out, inp)) => Fit::Differs(format!(
            "is {out}x{inp} where {} has {out_features}x{in_features}",
            target.model
        )),
    }
}

fn lokr_shape<'e>(found: &impl Fn(Role) -> Option<&'e Entry>) -> Option<(u64, u64)> {
    let factor = |direct, left, right| match found(direct) {
        Some(entry) => entry.matrix(),
        None => Some((found(left)?.matrix()?.0, found(right)?.matrix()?.1)),
    };
    let (ol, im) = factor(Role::LokrW1, Role::LokrW1A, Role::LokrW1B)?;
    let (ok, il) = factor(Role::LokrW2, Role::LokrW2A, Role::LokrW2B)?;
    Some((ol.checked_mul(ok)?, im.checked_mul(il)?))
}

/// The model most modules belong to.
pub fn majority_model(modules: &[Module]) -> Option<Model> {
    let qwen = modules
        .iter()
        .filter(|m| model::table().target(m.target).model == Model::QwenImage)
        .count();
    match modules.len() {
        0 => None,
        all if qwen * 2 >= all => Some(Model::QwenImage),
        _ => Some(Model::ZImage),
    }
}
