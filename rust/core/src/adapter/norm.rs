//! Deltas of a norm's weight: one value per channel.

use super::delta::{Form, Parameter};
use super::module::Fault;
use super::parts::{self, Parts};
use crate::key::role::Role;
use crate::key::table::Entry;

/// On a norm, any of these makes a module one.
pub(super) const ROLES: [Role; 2] = [Role::Diff, Role::WNorm];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let (index, entry) = weight(parts).ok_or_else(not_a_norm)?;
    parts::vector(index, entry, Parameter::Weight)
}

pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    let (_, entry) = weight(parts)?;
    Some((*entry.tensor.shape.first()?, 1))
}

fn weight<'p>(parts: &'p Parts<'_>) -> Option<(usize, &'p Entry)> {
    parts.find(Role::Diff).or_else(|| parts.find(Role::WNorm))
}

/// A tensor that only a norm can have, on another module.
pub(super) fn not_a_norm() -> Fault {
    Fault::Broken("has a norm's delta but is no norm".to_owned())
}
