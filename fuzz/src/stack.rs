//! What holds for the plan of any stack on a model.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use qwenlora_core::key::table::Entry;
use qwenlora_core::model::slot::{BlockBuild, MAX_RANK, RANK_MULTIPLE, Slot, SlotKind};
use qwenlora_core::model::{self, Model, ModuleKind};
use qwenlora_core::plan::FilePlan;
use qwenlora_core::stack::{Route, SlotPlan, StackItem, StackOptions, StackPlan, TensorRef};
use serde_json::Value;

use crate::assert_speakable;

/// Blocks of the model that stacks are planned on: the fewest that a uniform rank can differ in.
pub const BLOCKS: [u32; 2] = [0, 59];

/// Slots of a Qwen-Image of two blocks, of real size, as Nunchaku or diffusers builds it.
pub fn slots(base_rank: u64, offloaded: bool, build: BlockBuild) -> Vec<Slot> {
    static FUSED: LazyLock<Vec<Slot>> = LazyLock::new(|| released_slots(BlockBuild::Nunchaku));
    static STOCK: LazyLock<Vec<Slot>> = LazyLock::new(|| released_slots(BlockBuild::Stock));
    let mut slots = match build {
        BlockBuild::Nunchaku => FUSED.clone(),
        BlockBuild::Stock => STOCK.clone(),
    };
    for slot in &mut slots {
        slot.offloaded &= offloaded;
        slot.base_rank = if slot.kind == SlotKind::Svdq {
            base_rank
        } else {
            0
        };
    }
    slots
}

fn released_slots(build: BlockBuild) -> Vec<Slot> {
    let modules = model::table().modules();
    let in_model = modules.iter().filter(|module| {
        module.model == Model::QwenImage
            && module.block.is_none_or(|block| BLOCKS.contains(&block))
            && match build {
                BlockBuild::Nunchaku => module.place.slot == module.path,
                BlockBuild::Stock => !module.is_fused(),
            }
    });
    in_model
        .map(|module| {
            let in_block = module.block.is_some();
            let (kind, in_features, out_features) = match module.kind {
                ModuleKind::Linear {
                    out_features,
                    in_features,
                } => (
                    linear_kind(&module.path, in_block),
                    in_features,
                    out_features,
                ),
                ModuleKind::Norm { channels } => (SlotKind::Norm, 1, channels),
                ModuleKind::Embedding { rows, dim } => (SlotKind::Embedding, rows, dim),
            };
            let number = module.block.map(|block| format!(".{block}."));
            Slot {
                path: module.path.clone(),
                kind,
                in_features,
                out_features,
                base_rank: 0,
                element_bytes: 2,
                offloaded: in_block,
                pattern: number.map_or(module.path.clone(), |n| module.path.replacen(&n, ".*.", 1)),
                has_bias: matches!(module.kind, ModuleKind::Linear { .. }),
                build,
                opens: build == BlockBuild::Nunchaku && module.opens(),
            }
        })
        .collect()
}

fn linear_kind(path: &str, in_block: bool) -> SlotKind {
    if !in_block {
        SlotKind::Linear
    } else if path.ends_with("_mod.1") {
        SlotKind::Awq
    } else {
        SlotKind::Svdq
    }
}

/// Plans a stack twice and checks the plan.
pub fn check(plans: &[&FilePlan], strengths: &[f64], slots: &[Slot], options: StackOptions) {
    let items: Vec<StackItem> = plans
        .iter()
        .zip(strengths)
        .map(|(plan, &strength)| StackItem {
            name: "lora",
            plan,
            strength,
            modulation: true,
            off: &[],
        })
        .collect();
    match (
        StackPlan::new(&items, slots, options),
        StackPlan::new(&items, slots, options),
    ) {
        (Ok(first), Ok(second)) => {
            assert_eq!(first, second);
            assert_plan(&first, &items, slots, options);
        }
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            assert_speakable(&first.to_string());
        }
        _ => panic!("the same stack is taken and refused"),
    }
}

fn assert_plan(plan: &StackPlan, items: &[StackItem], slots: &[Slot], options: StackOptions) {
    let document: Value = serde_json::from_str(&plan.to_json()).expect("the document is JSON");
    assert_eq!(
        document["slots"].as_array().map(Vec::len),
        Some(plan.slots.len())
    );
    let by_path: HashMap<&str, &Slot> = slots.iter().map(|s| (s.path.as_str(), s)).collect();
    for slot in &plan.slots {
        assert_slot(slot, by_path[slot.path.as_str()], items, options);
    }
    for group in &plan.uniform {
        let ranks = plan
            .slots
            .iter()
            .filter(|slot| group.slots.contains(&slot.path));
        assert!(ranks.clone().all(|slot| slot.rank <= group.rank));
        assert!(ranks.clone().all(|slot| slot.route == group.route));
        assert!(ranks.clone().any(|slot| slot.rank == group.rank));
    }
    for (lora, item) in items.iter().enumerate() {
        assert_nothing_is_lost(plan, lora, item);
    }
    let lost = plan.skipped.iter().any(|skip| skip.matters);
    assert!(!(options.strict && lost), "strict leaves nothing out");
    plan.skipped
        .iter()
        .for_each(|skip| assert_speakable(&skip.reason));
}

fn assert_slot(plan: &SlotPlan, slot: &Slot, items: &[StackItem], options: StackOptions) {
    let path = &plan.path;
    assert!(!plan.pieces.is_empty(), "{path}");
    assert_eq!(plan.kind, slot.kind, "{path}");
    if slot.kind == SlotKind::Svdq && plan.route == Route::Inside {
        // A base that is too large by itself is left alone.
        assert!(
            plan.rank == 0 || plan.rank + plan.base_rank <= MAX_RANK,
            "{path}: {}",
            plan.rank
        );
        assert!(
            plan.rank.is_multiple_of(RANK_MULTIPLE),
            "{path}: {}",
            plan.rank
        );
    }
    if let Some(max) = options.max_rank {
        assert!(
            plan.rank < max.saturating_add(RANK_MULTIPLE),
            "{path}: {}",
            plan.rank
        );
    }
    for piece in &plan.pieces {
        assert!(piece.scale.is_finite(), "{path}: {}", piece.scale);
        let end = piece.row_begin.checked_add(piece.row_count);
        assert!(
            end.is_some_and(|end| end <= slot.out_features),
            "{path}: {end:?}"
        );
        assert!(
            piece.rank_budget.is_none_or(|budget| piece.rank <= budget),
            "{path}"
        );
        let entries = items[piece.lora].plan.table().entries();
        for tensor in piece.tensors.values() {
            let own = entries.iter().find(|e| e.tensor.key == tensor.key);
            let own = own.expect("a piece's tensors are its file's");
            assert_place(tensor, own, path);
            assert_eq!(tensor.dtype, own.tensor.dtype.name(), "{path}");
        }
    }
}

/// A piece reads a whole tensor, or whole rows of it.
fn assert_place(tensor: &TensorRef, own: &Entry, path: &str) {
    let stored = &own.tensor;
    let Some(first_row) = tensor.first_row else {
        assert_eq!(tensor.shape, stored.shape, "{path}");
        assert_eq!(tensor.offset_bytes, stored.offset_bytes, "{path}");
        return assert_eq!(tensor.len_bytes, stored.len_bytes, "{path}");
    };
    let rows = (tensor.shape[0], stored.shape[0]);
    assert_eq!(tensor.shape[1..], stored.shape[1..], "{path}");
    assert!(first_row + rows.0 <= rows.1, "{path}");
    assert_eq!(
        tensor.len_bytes * rows.1,
        stored.len_bytes * rows.0,
        "{path}"
    );
    let begin = (tensor.offset_bytes - stored.offset_bytes) * rows.1;
    assert_eq!(begin, first_row * stored.len_bytes, "{path}");
}

/// Every tensor of a LoRA is in a piece, in what is left out, or a scalar of its module.
fn assert_nothing_is_lost(plan: &StackPlan, lora: usize, item: &StackItem) {
    let pieces = || {
        plan.slots
            .iter()
            .flat_map(|s| &s.pieces)
            .filter(|p| p.lora == lora)
    };
    let skipped: HashSet<&str> = plan
        .skipped
        .iter()
        .filter(|s| s.lora == lora)
        .map(|s| s.name.as_str())
        .collect();
    let placed: HashSet<&str> = pieces().map(|piece| piece.module.as_str()).collect();
    assert_eq!(placed.len(), plan.applied_modules[lora]);
    for module in item.plan.modules() {
        let path = model::table().module(module.id).path.as_str();
        assert!(placed.contains(path) != skipped.contains(path), "{path}");
    }
    let entries = item.plan.table().entries();
    for entry in entries.iter().filter(|entry| entry.reason.is_some()) {
        assert!(
            skipped.contains(entry.tensor.key.as_str()),
            "{}",
            entry.tensor.key
        );
    }
    let read: HashSet<&str> = pieces()
        .flat_map(|p| p.tensors.values())
        .map(|t| t.key.as_str())
        .collect();
    for entry in entries.iter().filter(|entry| entry.role.is_factor()) {
        let key = entry.tensor.key.as_str();
        let Some(id) = entry.module else { continue };
        let module_is_out = skipped.contains(model::table().module(id).path.as_str());
        assert!(
            read.contains(key) || skipped.contains(key) || module_is_out,
            "{key} is lost"
        );
    }
}
