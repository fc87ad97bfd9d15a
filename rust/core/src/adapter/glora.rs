//! `GLoRA`: a pair, and another that the base weight is multiplied with.

use super::Adapter;
use super::delta::{Factor, Form, GloraLayout};
use super::module::Fault;
use super::parts::Parts;
use crate::key::role::Role;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 5] = [
    Role::GloraA1,
    Role::GloraA2,
    Role::GloraB1,
    Role::GloraB2,
    Role::GloraBm,
];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    if parts.has(Role::GloraBm) {
        let text = "`glora_bm` is not supported: it is the core of a convolution, of which the \
                    model has none";
        return Err(Fault::Unsupported(text.to_owned()));
    }
    let factor = |role| {
        let lacks = || super::missing(Adapter::Glora, role);
        parts.factor(role)?.ok_or_else(lacks)
    };
    let (a1, a2) = (factor(Role::GloraA1)?, factor(Role::GloraA2)?);
    let (b1, b2) = (factor(Role::GloraB1)?, factor(Role::GloraB2)?);
    // The rank is the small axis, and lies second in a left half.
    let layout = if a1.rows >= a1.columns {
        GloraLayout::Current
    } else {
        GloraLayout::Old
    };
    let halves = |first, second| match layout {
        GloraLayout::Current => (first, second),
        GloraLayout::Old => (second, first),
    };
    let (a_left, a_right): (Factor, Factor) = halves(a1, a2);
    let (b_left, b_right): (Factor, Factor) = halves(b1, b2);
    if a_left.columns != a_right.rows || b_left.columns != b_right.rows {
        return Err(Fault::Broken(format!(
            "the halves differ in rank: glora_a has {} and {}, glora_b has {} and {}",
            a_left.columns, a_right.rows, b_left.columns, b_right.rows
        )));
    }
    if a_left.rows != a_right.columns || a_left.rows != b_right.columns {
        return Err(Fault::Broken(format!(
            "its products differ in inputs: glora_a has {} and {}, glora_b has {}",
            a_left.rows, a_right.columns, b_right.columns
        )));
    }
    Ok(Form::Glora {
        a1,
        a2,
        b1,
        b2,
        layout,
    })
}

/// The small axis of a1, which divides alpha.
pub(super) fn divisor(parts: &Parts<'_>) -> Option<u64> {
    let (rows, columns) = parts.matrix(Role::GloraA1)?;
    Some(rows.min(columns))
}

/// (out, in) of the delta.
pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    let (rows, columns) = parts.matrix(Role::GloraA1)?;
    let left = if rows >= columns {
        Role::GloraB1
    } else {
        Role::GloraB2
    };
    Some((parts.matrix(left)?.0, rows.max(columns)))
}
