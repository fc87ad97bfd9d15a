//! BOFT: a butterfly of orthogonal blocks on the outputs (LyCORIS), or one stage of them on the
//! inputs (PEFT).

use super::Adapter;
use super::delta::Form;
use super::module::Fault;
use super::parts::Parts;
use super::rotation::{self, Cayley, Rotation, RotationRule, StoredRotation};
use crate::key::role::Role;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 2] = [Role::BoftR, Role::BoftS];

/// Dimensions of its blocks.
pub(super) const DIMENSIONS: usize = 4;

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    if parts.has_any(&ROLES) {
        input_blocks(parts)
    } else {
        butterfly(parts)
    }
}

fn butterfly(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = || super::missing(Adapter::Boft, Role::OftBlocks);
    let stored = parts.factor(Role::OftBlocks)?.ok_or_else(lacks)?;
    let (stages, count, size) = square_blocks(parts, Role::OftBlocks)?;
    check_butterfly(stages, count, size)?;
    let rescale = rotation::rescale(parts, count.checked_mul(size))?;
    Ok(Form::Rotation(Rotation {
        stored: StoredRotation::Butterfly {
            stages: stored,
            rescale,
        },
        rule: rotation::constrained(parts)?,
        count,
        size,
    }))
}

/// Stage i turns pairs of half blocks that lie 2^i half blocks apart.
fn check_butterfly(stages: u64, count: u64, size: u64) -> Result<(), Fault> {
    let apart = u32::try_from(stages - 1).ok();
    let apart = apart.and_then(|last| 1u64.checked_shl(last));
    let fits = apart.is_some_and(|apart| count.is_multiple_of(apart));
    if fits && size.is_multiple_of(2) {
        return Ok(());
    }
    Err(Fault::Broken(format!(
        "{count} blocks of {size} make no butterfly of {stages} stages"
    )))
}

fn input_blocks(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = |role| super::missing(Adapter::Boft, role);
    let blocks = parts
        .factor(Role::BoftR)?
        .ok_or_else(|| lacks(Role::BoftR))?;
    let factor = rotation::factors(parts, Role::BoftS)?.ok_or_else(|| lacks(Role::BoftS))?;
    let (stages, count, size) = square_blocks(parts, Role::BoftR)?;
    if stages != 1 {
        return Err(Fault::Unsupported(format!(
            "PEFT's BOFT of {stages} butterfly factors is not supported: one is"
        )));
    }
    Ok(Form::Rotation(Rotation {
        stored: StoredRotation::InputBlocks { blocks, factor },
        rule: RotationRule {
            cayley: Cayley::Solve,
            constraint: 0.0,
            scaled: false,
            shared: false,
        },
        count,
        size,
    }))
}

/// (stages, blocks, rows of a block) of a tensor that holds such.
fn square_blocks(parts: &Parts<'_>, role: Role) -> Result<(u64, u64, u64), Fault> {
    match *parts.dimensions(role) {
        [stages, count, rows, columns] if rows == columns => Ok((stages, count, rows)),
        ref other => Err(rotation::no_squares(role, other)),
    }
}
