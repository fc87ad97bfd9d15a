//! LoRA: two halves of low rank, plain, around a Tucker core, or in Nunchaku's packed layout.

use super::delta::{Form, WeightOrder};
use super::module::Fault;
use super::parts::Parts;
use crate::key::role::Role;
use crate::model::ModuleKind;
use crate::model::slot::RANK_MULTIPLE;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 4] = [Role::Down, Role::Up, Role::PackedDown, Role::PackedUp];

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    if parts.has(Role::PackedDown) || parts.has(Role::PackedUp) {
        packed(parts)
    } else if parts.has(Role::Mid) {
        tucker(parts)
    } else {
        pair(parts)
    }
}

fn pair(parts: &Parts<'_>) -> Result<Form, Fault> {
    let down = parts.half(Role::Down, Role::Up)?;
    let up = parts.half(Role::Up, Role::Down)?;
    if down.rows != up.columns {
        return Err(Fault::Broken(format!(
            "the halves differ in rank: down has {}, up has {}",
            down.rows, up.columns
        )));
    }
    let is_embedding = matches!(parts.kind(), ModuleKind::Embedding { .. });
    let order = if is_embedding && !parts.is_peft_embedding() {
        WeightOrder::InOut
    } else {
        WeightOrder::OutIn
    };
    Ok(Form::Pair { down, up, order })
}

/// LyCORIS' order of the core's axes, which ComfyUI reads alike: (rank of up, rank of down).
fn tucker(parts: &Parts<'_>) -> Result<Form, Fault> {
    let down = parts.half(Role::Down, Role::Up)?;
    let up = parts.half(Role::Up, Role::Down)?;
    let mid = parts.half(Role::Mid, Role::Down)?;
    if (mid.rows, mid.columns) != (up.columns, down.rows) {
        return Err(Fault::Broken(format!(
            "mid is {}x{} between an up of rank {} and a down of rank {}",
            mid.rows, mid.columns, up.columns, down.rows
        )));
    }
    Ok(Form::Tucker { down, mid, up })
}

fn packed(parts: &Parts<'_>) -> Result<Form, Fault> {
    let down = parts.half(Role::PackedDown, Role::PackedUp)?;
    let up = parts.half(Role::PackedUp, Role::PackedDown)?;
    if down.columns != up.columns || !down.columns.is_multiple_of(RANK_MULTIPLE) {
        return Err(Fault::Broken(format!(
            "the packed halves have ranks {} and {}: both must be the same multiple of \
             {RANK_MULTIPLE}",
            down.columns, up.columns
        )));
    }
    Ok(Form::Packed { down, up })
}

pub(super) fn rank(parts: &Parts<'_>) -> Option<u64> {
    if parts.has(Role::Mid) {
        let (rows, columns) = parts.matrix(Role::Mid)?;
        return Some(rows.min(columns));
    }
    pair_rank(parts)
}

/// The rank of two halves that agree in it.
fn pair_rank(parts: &Parts<'_>) -> Option<u64> {
    if parts.has(Role::PackedDown) {
        return Some(parts.matrix(Role::PackedDown)?.1);
    }
    let (down, up) = (parts.matrix(Role::Down)?, parts.matrix(Role::Up)?);
    (down.0 == up.1 && down.0 > 0).then_some(down.0)
}

pub(super) fn divisor(parts: &Parts<'_>) -> Option<u64> {
    if parts.has(Role::Mid) && !parts.has(Role::PackedDown) {
        return parts.rows(Role::Down);
    }
    pair_divisor(parts)
}

/// The rank, but of packed halves none: Nunchaku's converter multiplies alpha in.
fn pair_divisor(parts: &Parts<'_>) -> Option<u64> {
    if parts.has(Role::PackedDown) {
        return None;
    }
    pair_rank(parts)
}

pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    if parts.has(Role::PackedDown) {
        let (down, up) = (
            parts.matrix(Role::PackedDown)?,
            parts.matrix(Role::PackedUp)?,
        );
        return Some((up.0, down.0));
    }
    pair_shape(parts)
}

/// (out, in) of the product of two halves.
fn pair_shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    let (down, up) = (parts.matrix(Role::Down)?, parts.matrix(Role::Up)?);
    let product = (up.0, down.1);
    let is_embedding = matches!(parts.kind(), ModuleKind::Embedding { .. });
    Some(if is_embedding && parts.is_peft_embedding() {
        product
    } else {
        parts.out_in(product)
    })
}
