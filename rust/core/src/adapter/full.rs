//! Full deltas: a matrix of the weight's shape, or a bias alone.

use super::Adapter;
use super::delta::{Form, Parameter, WeightOrder};
use super::module::Fault;
use super::norm;
use super::parts::{self, Parts};
use crate::key::role::Role;
use crate::model::ModuleKind;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 3] = [Role::Diff, Role::DiffB, Role::WNorm];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    if parts.has(Role::Diff) {
        return matrix(parts);
    }
    // The weight stays what it is.
    match parts.find(Role::DiffB) {
        Some((index, entry)) => parts::vector(index, entry, Parameter::Bias),
        None => Err(norm::not_a_norm()),
    }
}

/// The delta of a weight, stored whole.
pub(super) fn matrix(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = || super::missing(Adapter::Full, Role::Diff);
    let diff = parts.factor(Role::Diff)?.ok_or_else(lacks)?;
    let order = match parts.kind() {
        ModuleKind::Embedding { .. } => WeightOrder::InOut,
        ModuleKind::Linear { .. } | ModuleKind::Norm { .. } => WeightOrder::OutIn,
    };
    Ok(Form::Full { diff, order })
}

pub(super) fn rank(parts: &Parts<'_>) -> Option<u64> {
    parts.has(Role::Diff).then(|| parts.full_rank())?
}

pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    Some(parts.out_in(parts.matrix(Role::Diff)?))
}
