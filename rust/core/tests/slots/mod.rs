//! Slots of a model as Nunchaku builds it.

use qwenlora_core::model::slot::{BlockBuild, Slot, SlotKind};

/// A slot of 16-bit values with a bias, inside no kernel that is opened.
pub(crate) fn slot(path: &str, kind: SlotKind, out_features: u64, in_features: u64) -> Slot {
    Slot {
        path: path.to_owned(),
        kind,
        in_features,
        out_features,
        base_rank: if kind == SlotKind::Svdq { 32 } else { 0 },
        element_bytes: 2,
        offloaded: false,
        pattern: path.replacen(".0.", ".*.", 1).replacen(".1.", ".*.", 1),
        has_bias: true,
        build: BlockBuild::Nunchaku,
        opens: false,
    }
}
