//! OFT: orthogonal blocks on the outputs (LyCORIS) or on the inputs (PEFT, `OneTrainer`).

use super::Adapter;
use super::delta::Form;
use super::module::Fault;
use super::parts::Parts;
use super::peft::AdapterConfig;
use super::rotation::{self, Cayley, Rotation, RotationRule, StoredRotation};
use crate::key::role::Role;

/// It makes a module one.
pub(super) const ROLES: [Role; 1] = [Role::OftR];
/// Blocks of OFT or BOFT: those of BOFT have four dimensions.
pub(super) const BLOCKS: [Role; 1] = [Role::OftBlocks];

/// Terms of the series that PEFT and `OneTrainer` take.
pub(super) const NEUMANN_TERMS: u64 = 5;

pub(super) fn form(parts: &Parts<'_>, config: Option<&AdapterConfig>) -> Result<Form, Fault> {
    if parts.has(Role::OftR) {
        triangles(parts, config)
    } else {
        blocks(parts)
    }
}

fn blocks(parts: &Parts<'_>) -> Result<Form, Fault> {
    let lacks = || super::missing(Adapter::Oft, Role::OftBlocks);
    let blocks = parts.factor(Role::OftBlocks)?.ok_or_else(lacks)?;
    let (count, size) = match *parts.dimensions(Role::OftBlocks) {
        [count, rows, columns] if rows == columns => (count, rows),
        ref other => {
            return Err(rotation::no_squares(Role::OftBlocks, other));
        }
    };
    let rescale = rotation::rescale(parts, count.checked_mul(size))?;
    Ok(Form::Rotation(Rotation {
        stored: StoredRotation::Blocks { blocks, rescale },
        rule: rotation::constrained(parts)?,
        count,
        size,
    }))
}

fn triangles(parts: &Parts<'_>, config: Option<&AdapterConfig>) -> Result<Form, Fault> {
    let lacks = || super::missing(Adapter::Oft, Role::OftR);
    let triangles = parts.factor(Role::OftR)?.ok_or_else(lacks)?;
    let size = size_of(triangles.columns).ok_or_else(|| {
        Fault::Broken(format!(
            "oft_r has {} values in a row, which are no triangle of a block",
            triangles.columns
        ))
    })?;
    let cayley = match config.map(AdapterConfig::cayley) {
        None | Some(Ok(Cayley::Neumann)) => Cayley::Neumann,
        Some(Ok(other)) => other,
        Some(Err(terms)) => {
            return Err(Fault::Unsupported(format!(
                "OFT with {terms} terms of the Cayley-Neumann series is not supported: \
                 {NEUMANN_TERMS} are"
            )));
        }
    };
    Ok(Form::Rotation(Rotation {
        stored: StoredRotation::Triangles { triangles },
        rule: RotationRule {
            cayley,
            constraint: 0.0,
            scaled: parts.number(Role::OftScaled)?.is_some_and(|own| own != 0.0),
            // A single block of all inputs is the same, once.
            shared: triangles.rows == 1,
        },
        count: triangles.rows,
        size,
    }))
}

/// The side of a block whose strict upper triangle has this many values.
fn size_of(triangle: u64) -> Option<u64> {
    let size = triangle.checked_mul(8)?.checked_add(1)?.isqrt() / 2 + 1;
    let values = size.checked_mul(size - 1)? / 2;
    (values == triangle).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triangle_tells_its_block() {
        for size in (2..100).chain([3840, 1 << 31]) {
            let values = size * (size - 1) / 2;
            assert_eq!(size_of(values), Some(size));
            if size > 2 {
                assert_eq!(size_of(values - 1), None);
                assert_eq!(size_of(values + 1), None);
            }
        }
        assert_eq!(size_of(u64::MAX), None);
    }
}
