//! `set_weight`: a value that replaces the module's weight.

use super::Adapter;
use super::delta::{Form, Parameter, WeightOrder};
use super::module::Fault;
use super::parts::{self, Parts};
use crate::key::role::Role;
use crate::model::ModuleKind;

/// It makes a module one.
pub(super) const ROLES: [Role; 1] = [Role::SetWeight];

/// Why a quantized layer takes none.
pub(crate) const OF_QUANTIZED: &str = "`set_weight` is not supported on a quantized layer: what it \
    replaces is not there, and the difference would hold the error of the quantization";

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = || super::missing(Adapter::Set, Role::SetWeight);
    let order = match parts.kind() {
        ModuleKind::Norm { .. } => {
            let (index, entry) = parts.find(Role::SetWeight).ok_or_else(lacks)?;
            return parts::vector(index, entry, Parameter::Weight);
        }
        ModuleKind::Embedding { .. } => WeightOrder::InOut,
        ModuleKind::Linear { .. } => WeightOrder::OutIn,
    };
    let diff = parts.factor(Role::SetWeight)?.ok_or_else(lacks)?;
    Ok(Form::Full { diff, order })
}

/// (out, in) of the weight.
pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    match parts.kind() {
        ModuleKind::Norm { .. } => Some((parts.rows(Role::SetWeight)?, 1)),
        _ => Some(parts.out_in(parts.matrix(Role::SetWeight)?)),
    }
}
