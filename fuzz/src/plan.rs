//! What holds for the plan of any file.

use std::collections::HashSet;

use qwenlora_core::key::role::Role;
use qwenlora_core::model;
use qwenlora_core::plan::{FilePlan, Verdict};
use serde_json::Value;

use crate::assert_speakable;

/// Checks a plan against the keys that it was made from, in order; its document.
pub fn check<'k>(plan: &FilePlan, keys: impl ExactSizeIterator<Item = &'k str>) -> Value {
    assert_eq!(plan.table().entries().len(), keys.len());
    for (entry, key) in plan.table().entries().iter().zip(keys) {
        assert_eq!(entry.tensor.key, key);
    }
    assert_one_place_each(plan);
    assert_modules(plan);
    let reason = plan.reason();
    assert_eq!(reason.is_none(), plan.verdict() == Verdict::Apply);
    reason
        .iter()
        .chain(plan.notes())
        .for_each(|text| assert_speakable(text));
    assert_document(plan)
}

/// Every tensor belongs to one module, or has a reason why to none.
fn assert_one_place_each(plan: &FilePlan) {
    let mut homes = vec![None; plan.table().entries().len()];
    for module in plan.modules() {
        for &index in &module.tensors {
            assert_eq!(
                homes[index].replace(module.id),
                None,
                "two modules share a tensor"
            );
        }
    }
    for (entry, home) in plan.table().entries().iter().zip(homes) {
        assert_eq!(entry.module, home, "{}", entry.tensor.key);
        assert_eq!(
            home.is_none(),
            entry.reason.is_some(),
            "{}",
            entry.tensor.key
        );
        assert_eq!(
            home.is_none(),
            entry.role == Role::Ignored,
            "{}",
            entry.tensor.key
        );
        entry
            .reason
            .iter()
            .for_each(|reason| assert_speakable(&reason.text()));
    }
}

fn assert_modules(plan: &FilePlan) {
    let mut seen = HashSet::new();
    for module in plan.modules() {
        let path = &model::table().module(module.id).path;
        assert!(seen.insert(module.id), "{path} twice");
        assert!(module.scale.is_finite(), "{path}: {}", module.scale);
        assert_eq!(module.fault.is_some(), module.deltas.is_empty(), "{path}");
        assert!(
            module.fault.is_none() || module.left_out.is_empty(),
            "{path}"
        );
        let own: HashSet<usize> = module.tensors.iter().copied().collect();
        let mut used = HashSet::new();
        for delta in &module.deltas {
            assert!(delta.scale.is_finite(), "{path}: {}", delta.scale);
            for (role, tensor) in delta.tensors() {
                let index = tensor.index;
                assert!(own.contains(&index), "{path}: another module's {role}");
                assert!(used.insert(index), "{path}: {role} is in two deltas");
            }
        }
        for (index, text) in &module.left_out {
            assert!(own.contains(index), "{path}");
            assert_speakable(text);
        }
        module
            .fault
            .iter()
            .for_each(|fault| assert_speakable(fault.text()));
        module.misfit.iter().for_each(|text| assert_speakable(text));
    }
}

fn assert_document(plan: &FilePlan) -> Value {
    let text = plan.to_json();
    assert_eq!(text, plan.to_json());
    assert!(!text.contains('\n'), "one line");
    let document: Value = serde_json::from_str(&text).expect("the document is JSON");
    let rows = |name: &str| document[name].as_array().expect("a list").clone();
    assert_eq!(document["verdict"], plan.verdict().name());
    assert_eq!(document["reason"].as_str(), plan.reason().as_deref());
    assert_eq!(rows("tensors").len(), plan.table().entries().len());
    for (row, entry) in rows("tensors").iter().zip(plan.table().entries()) {
        assert_eq!(row["key"].as_str(), Some(entry.tensor.key.as_str()));
        assert!(
            row["target"].is_string() || row["reason"].is_string(),
            "{row}"
        );
        assert!(
            row["target"].is_string() || row["role"] == "ignored",
            "{row}"
        );
    }
    let supported = rows("modules")
        .iter()
        .filter(|row| row["supported"] == true)
        .count();
    assert_eq!(supported, plan.applied_modules().count());
    assert_eq!(supported == 0, plan.verdict() == Verdict::Reject);
    assert_eq!(supported == 0, rows("slots").is_empty());
    document
}
