//! IA3: the base weight's rows or columns, stretched.

use super::Adapter;
use super::delta::{Form, Side, StoredDiagonal};
use super::module::Fault;
use super::parts::{Laid, Parts};
use crate::key::role::Role;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 2] = [Role::Ia3, Role::Ia3L];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = |role| super::missing(Adapter::Ia3, role);
    if !parts.has(Role::Ia3L) {
        let (values, _) = parts.channels(Role::Ia3)?.ok_or_else(|| lacks(Role::Ia3))?;
        let on_input = parts
            .number(Role::Ia3OnInput)?
            .ok_or_else(|| lacks(Role::Ia3OnInput))?;
        let side = if on_input == 0.0 { Side::Out } else { Side::In };
        return Ok(Form::Diagonal {
            values,
            side,
            stored: StoredDiagonal::LessOne,
        });
    }
    let (values, laid) = parts
        .channels(Role::Ia3L)?
        .ok_or_else(|| lacks(Role::Ia3L))?;
    let side = match laid {
        Laid::Column => Side::Out,
        Laid::Row => Side::In,
        Laid::Flat => {
            let text = "ia3_l is a vector: its shape does not say which side it stretches";
            return Err(Fault::Broken(text.to_owned()));
        }
    };
    Ok(Form::Diagonal {
        values,
        side,
        stored: StoredDiagonal::Whole,
    })
}
