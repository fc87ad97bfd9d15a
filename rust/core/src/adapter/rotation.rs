//! OFT and BOFT: the base weight's rows or columns, turned block by block.

use serde::Serialize;

use super::delta::{Factor, Side, Sides};
use super::module::Fault;
use super::parts::{Laid, Parts};
use crate::key::role::Role;

/// The way from a skew-symmetric block Q to a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cayley {
    /// (I + Q)(I - Q)^-1: LyCORIS.
    Exact,
    /// I + 2Q + 2Q^2 + 2Q^3 + Q^4: PEFT's default, and OneTrainer.
    Neumann,
    /// (I - Q)(I + Q)^-1: PEFT with `use_cayley_neumann` off, and its BOFT.
    Solve,
}

/// The way from stored blocks to rotations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RotationRule {
    /// From a skew-symmetric block to a rotation.
    pub cayley: Cayley,
    /// LyCORIS' alpha as it is stored: times the rows, the most that the norm of all blocks may be;
    /// 0 where there is none.
    pub constraint: f64,
    /// Whether Q is divided by 2 sqrt(b - 1), as OneTrainer's marker says.
    pub scaled: bool,
    /// Whether one block stands for all.
    pub shared: bool,
}

/// The blocks of a rotation, as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredRotation {
    /// LyCORIS' OFT: blocks (n, b, b) of the outputs, then a factor for each output.
    Blocks {
        /// The blocks.
        blocks: Factor,
        /// The factors: (n b, 1).
        rescale: Option<Factor>,
    },
    /// LyCORIS' BOFT: stages (m, n, b, b) of the outputs, then a factor for each output.
    Butterfly {
        /// The stages.
        stages: Factor,
        /// The factors: (n b, 1).
        rescale: Option<Factor>,
    },
    /// OFT of PEFT and `OneTrainer`: the upper triangles (n, b (b - 1) / 2) of blocks of the inputs.
    Triangles {
        /// The triangles.
        triangles: Factor,
    },
    /// PEFT's BOFT: blocks (1, n, b, b) of the inputs, and a factor for each output.
    InputBlocks {
        /// The blocks.
        blocks: Factor,
        /// The factors: (out, 1).
        factor: Factor,
    },
}

/// A rotation of one side of a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation {
    /// Its blocks.
    pub stored: StoredRotation,
    /// How they become rotations.
    pub rule: RotationRule,
    /// How many there are, in each stage; of a shared one, 1.
    pub count: u64,
    /// Rows of each.
    pub size: u64,
}

impl Rotation {
    /// The side that is turned.
    pub fn side(&self) -> Side {
        match self.stored {
            StoredRotation::Blocks { .. } | StoredRotation::Butterfly { .. } => Side::Out,
            StoredRotation::Triangles { .. } | StoredRotation::InputBlocks { .. } => Side::In,
        }
    }

    /// (out, in) of the weight, as far as the blocks tell.
    pub(super) fn shape(&self) -> Option<Sides> {
        let turned = self.count.checked_mul(self.size)?;
        Some(match self.stored {
            StoredRotation::Blocks { .. } | StoredRotation::Butterfly { .. } => {
                (Some(turned), None)
            }
            StoredRotation::Triangles { .. } => (None, (!self.rule.shared).then_some(turned)),
            StoredRotation::InputBlocks { factor, .. } => (Some(factor.rows), Some(turned)),
        })
    }

    /// How many blocks turn this many channels.
    pub fn blocks_of(&self, channels: u64) -> u64 {
        if self.rule.shared {
            channels.checked_div(self.size).unwrap_or(0)
        } else {
            self.count
        }
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, Factor)> {
        let named = |role: Role, factor: Factor| (role.name(), factor);
        let with = |blocks: Factor, rescale: Option<Factor>| {
            let rescale = rescale.map(|own| named(Role::OftRescale, own));
            let blocks = [named(Role::OftBlocks, blocks)];
            blocks.into_iter().chain(rescale).collect()
        };
        match self.stored {
            StoredRotation::Blocks { blocks, rescale } => with(blocks, rescale),
            StoredRotation::Butterfly { stages, rescale } => with(stages, rescale),
            StoredRotation::Triangles { triangles } => vec![named(Role::OftR, triangles)],
            StoredRotation::InputBlocks { blocks, factor } => {
                vec![named(Role::BoftR, blocks), named(Role::BoftS, factor)]
            }
        }
    }
}

/// A factor for each output, checked against how many are turned.
pub(super) fn factors(parts: &Parts<'_>, role: Role) -> Result<Option<Factor>, Fault> {
    let Some((factor, laid)) = parts.channels(role)? else {
        return Ok(None);
    };
    let name = role.name();
    match laid {
        Laid::Flat | Laid::Column => Ok(Some(factor)),
        Laid::Row => Err(Fault::Broken(format!(
            "{name} has {} values in a row, and is of the outputs",
            factor.columns
        ))),
    }
}

/// LyCORIS' rescale, one for each of the outputs that blocks turn.
pub(super) fn rescale(parts: &Parts<'_>, turned: Option<u64>) -> Result<Option<Factor>, Fault> {
    let rescale = factors(parts, Role::OftRescale)?;
    match (rescale, turned) {
        (Some(own), Some(turned)) if own.rows != turned => Err(Fault::Broken(format!(
            "{} has {} values where the blocks turn {turned} outputs",
            Role::OftRescale.name(),
            own.rows
        ))),
        _ => Ok(rescale),
    }
}

/// The rule of LyCORIS: alpha bounds the norm of the blocks, and is no scale.
pub(super) fn constrained(parts: &Parts<'_>) -> Result<RotationRule, Fault> {
    Ok(RotationRule {
        cayley: Cayley::Exact,
        constraint: parts.number(Role::Alpha)?.unwrap_or(0.0),
        scaled: false,
        shared: false,
    })
}

/// A fault of blocks that are no squares.
pub(super) fn no_squares(role: Role, shape: &[u64]) -> Fault {
    let name = role.name();
    Fault::Broken(format!("{name} holds no square blocks: {shape:?}"))
}
