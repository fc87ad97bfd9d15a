//! HRA, as PEFT stores it: the base weight times a chain of reflections on its input.

use super::Adapter;
use super::delta::Form;
use super::module::Fault;
use super::parts::Parts;
use super::peft::AdapterConfig;
use crate::key::role::Role;

/// It makes a module one.
pub(super) const ROLES: [Role; 1] = [Role::HraU];

pub(super) fn form(parts: &Parts<'_>, config: Option<&AdapterConfig>) -> Result<Form, Fault> {
    if config.is_some_and(AdapterConfig::orthogonalises_hra) {
        let text = "HRA with `apply_GS` is not supported: its vectors are made orthogonal first";
        return Err(Fault::Unsupported(text.to_owned()));
    }
    let lacks = || super::missing(Adapter::Hra, Role::HraU);
    let u = parts.factor(Role::HraU)?.ok_or_else(lacks)?;
    Ok(Form::Householder { u })
}

pub(super) fn rank(parts: &Parts<'_>) -> Option<u64> {
    Some(parts.matrix(Role::HraU)?.1)
}
