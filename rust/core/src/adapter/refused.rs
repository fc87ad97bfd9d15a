//! Kinds of adapter that are not applied: the tensors that tell them, and the ranks in reports.

use super::Adapter;
use super::delta::Form;
use super::module::Fault;
use super::parts::Parts;
use crate::key::role::Role;

pub(super) const DORA: [Role; 1] = [Role::DoraScale];
pub(super) const GLORA: [Role; 5] = [
    Role::GloraA1,
    Role::GloraA2,
    Role::GloraB1,
    Role::GloraB2,
    Role::GloraBm,
];
pub(super) const OFT: [Role; 1] = [Role::OftR];
/// Blocks of either: those of BOFT have four dimensions.
pub(super) const OFT_OR_BOFT: [Role; 1] = [Role::OftBlocks];
pub(super) const BOFT: [Role; 2] = [Role::BoftR, Role::BoftS];
pub(super) const IA3: [Role; 2] = [Role::Ia3, Role::Ia3L];

/// Dimensions of BOFT's blocks.
pub(super) const BOFT_DIMENSIONS: usize = 4;

/// Never a form, whatever the tensors are.
pub(super) fn form(adapter: Adapter) -> Result<Form, Fault> {
    Err(Fault::Unsupported(format!(
        "{} is not supported",
        adapter.title()
    )))
}

/// The small axis of GLoRA's a1: its roles were transposed in older files.
pub(super) fn glora_rank(parts: &Parts<'_>) -> Option<u64> {
    let (rows, columns) = parts.matrix(Role::GloraA1)?;
    Some(rows.min(columns))
}
