//! LoHa: the Hadamard product of two low-rank pairs.

use super::Adapter;
use super::delta::Form;
use super::module::Fault;
use super::parts::Parts;
use crate::key::role::Role;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 6] = [
    Role::HadaW1A,
    Role::HadaW1B,
    Role::HadaW2A,
    Role::HadaW2B,
    Role::HadaT1,
    Role::HadaT2,
];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let factor = |role| {
        let lacks = || super::missing(Adapter::Loha, role);
        parts.factor(role)?.ok_or_else(lacks)
    };
    let (w1_a, w1_b) = (factor(Role::HadaW1A)?, factor(Role::HadaW1B)?);
    let (w2_a, w2_b) = (factor(Role::HadaW2A)?, factor(Role::HadaW2B)?);
    if w1_a.columns != w1_b.rows || w2_a.columns != w2_b.rows {
        return Err(Fault::Broken(format!(
            "the halves differ in rank: hada_w1 has {} and {}, hada_w2 has {} and {}",
            w1_a.columns, w1_b.rows, w2_a.columns, w2_b.rows
        )));
    }
    if (w1_a.rows, w1_b.columns) != (w2_a.rows, w2_b.columns) {
        return Err(Fault::Broken(format!(
            "its two products differ in shape: {}x{} and {}x{}",
            w1_a.rows, w1_b.columns, w2_a.rows, w2_b.columns
        )));
    }
    Ok(Form::Hadamard {
        w1_a,
        w1_b,
        w2_a,
        w2_b,
    })
}

/// An upper bound: the product of the pairs' ranks.
pub(super) fn rank(parts: &Parts<'_>) -> Option<u64> {
    let (r1, r2) = (parts.rows(Role::HadaW1B)?, parts.rows(Role::HadaW2B)?);
    Some(r1.saturating_mul(r2))
}

pub(super) fn divisor(parts: &Parts<'_>) -> Option<u64> {
    parts.rows(Role::HadaW1B)
}

pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    let (a, b) = (parts.matrix(Role::HadaW1A)?, parts.matrix(Role::HadaW1B)?);
    Some((a.0, b.1))
}
