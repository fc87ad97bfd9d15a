//! The slots of a released model, for work on files without a model at hand.

use serde::Serialize;

use crate::model::slot::{BlockBuild, Slot, SlotKind};
use crate::model::{self, KnownModule, Layer, Model, ModuleKind};

/// A slot of a released model, and the modules that are computed in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KnownSlot {
    /// The slot.
    #[serde(flatten)]
    pub slot: Slot,
    /// Canonical paths of its modules; the slot's rows are cut into as many equal parts.
    pub parts: Vec<&'static str>,
}

/// The slots of a model as Nunchaku quantizes it, in model order.
///
/// Ranks of the base are not counted: they differ from one released file to the next.
pub fn known_slots(model: Model) -> Vec<KnownSlot> {
    let modules = model::table().modules().iter();
    modules
        .filter(|module| module.model == model && module.place.slot == module.path)
        .filter_map(known_slot)
        .collect()
}

/// None for a layer that is computed in a way that is not known.
fn known_slot(module: &'static KnownModule) -> Option<KnownSlot> {
    let (kind, out_features, in_features) = match module.kind {
        ModuleKind::Norm { channels } => (SlotKind::Norm, channels, 1),
        ModuleKind::Embedding { rows, dim } => (SlotKind::Embedding, dim, rows),
        ModuleKind::Linear {
            out_features,
            in_features,
        } => (kind_of(module.layer?), out_features, in_features),
    };
    let parts = if module.is_fused() {
        let path = |id: &usize| model::table().module(*id).path.as_str();
        module.split.iter().map(path).collect()
    } else {
        vec![module.path.as_str()]
    };
    Some(KnownSlot {
        slot: Slot {
            path: module.path.clone(),
            kind,
            in_features,
            out_features,
            base_rank: 0,
            element_bytes: 2,
            offloaded: false,
            pattern: module.path.clone(),
            has_bias: matches!(module.kind, ModuleKind::Linear { .. }),
            build: BlockBuild::Nunchaku,
            opens: module.opens(),
        },
        parts,
    })
}

fn kind_of(layer: Layer) -> SlotKind {
    match layer {
        Layer::Svdq | Layer::SvdqInKernel => SlotKind::Svdq,
        Layer::Awq { .. } => SlotKind::Awq,
        Layer::Plain => SlotKind::Linear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_is_in_one_slot() {
        let slots = known_slots(Model::QwenImage);
        assert_eq!(slots.len(), 60 * 14 + 8);
        let mut parts: Vec<_> = slots.iter().flat_map(|s| s.parts.iter().copied()).collect();
        assert_eq!(parts.len(), 60 * 18 + 8);
        parts.sort_unstable();
        parts.dedup();
        assert_eq!(parts.len(), 60 * 18 + 8);
        let count = |kind| slots.iter().filter(|s| s.slot.kind == kind).count();
        assert_eq!(count(SlotKind::Awq), 120);
        assert_eq!(count(SlotKind::Svdq), 60 * 8);
        assert_eq!(count(SlotKind::Linear), 6);
        assert_eq!(count(SlotKind::Norm), 60 * 4 + 1);
        assert_eq!(count(SlotKind::Embedding), 1);
    }

    #[test]
    fn every_module_of_z_image_is_in_one_slot() {
        let slots = known_slots(Model::ZImage);
        // In a block: the fused projections, two more linears, six norms; modulations; the rest.
        assert_eq!(slots.len(), 34 * (2 + 2 + 6) + 32 + 7);
        let parts: usize = slots.iter().map(|s| s.parts.len()).sum();
        assert_eq!(parts, 34 * (7 + 6) + 32 + 7);
        let count = |kind| slots.iter().filter(|s| s.slot.kind == kind).count();
        assert_eq!(count(SlotKind::Svdq), 34 * 4);
        assert_eq!(count(SlotKind::Linear), 32 + 6);
        assert_eq!(count(SlotKind::Norm), 34 * 6 + 1);
    }

    #[test]
    fn a_slot_as_json_is_a_slot_again() {
        for known in known_slots(Model::QwenImage) {
            let json = serde_json::to_string(&known).unwrap();
            let slot: Slot = serde_json::from_str(&json).unwrap();
            assert_eq!(slot, known.slot);
        }
    }
}
