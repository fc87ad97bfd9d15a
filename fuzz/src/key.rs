//! One key: the grammar cuts it into parts of itself.

use qwenlora_core::header::MAX_NAME_BYTES;
use qwenlora_core::key::suffix;
use qwenlora_core::key::{self, ParsedKey};
use qwenlora_core::model;

/// Checks one key; bytes that are no text are replaced.
pub fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let key = text
        .get(..MAX_NAME_BYTES.min(text.len()))
        .unwrap_or_default();
    let parsed = key::parse(key);
    assert_eq!(parsed, key::parse(key));
    let cut = suffix::cut(key);
    if let Some(cut) = cut {
        assert!(key.starts_with(cut.stem) && cut.stem.len() < key.len());
        assert!(
            key.get(cut.stem.len()..)
                .is_some_and(|rest| rest.contains(cut.adapter_name))
        );
        assert_eq!(
            cut.scales.is_some(),
            cut.role == qwenlora_core::key::role::Role::Fp8Scale
        );
    }
    match parsed {
        ParsedKey::Module {
            module,
            stem,
            role,
            adapter_name,
            scales,
            bare,
        } => {
            let cut = cut.expect("a module's tensor has a suffix");
            let parts = (cut.stem, cut.role, cut.adapter_name, cut.scales, cut.bare);
            assert_eq!(parts, (stem, role, adapter_name, scales, bare));
            assert_eq!(key::resolve(stem), Some(module));
            assert_canonical(module, key.get(stem.len()..).unwrap_or_default());
        }
        ParsedKey::Foreign { reason, beside } => {
            let is_unknown = reason == key::Foreign::UnknownForm;
            assert_eq!(beside.is_some(), is_unknown, "{reason:?}");
            assert!(cut.is_none_or(|cut| key::resolve(cut.stem).is_none()));
        }
    }
}

/// The same suffix at the module's canonical path says the same.
fn assert_canonical(module: model::ModuleId, suffix: &str) {
    let path = &model::table().module(module).path;
    let canonical = format!("{path}{suffix}");
    let again = match key::parse(&canonical) {
        ParsedKey::Module { module, .. } => Some(module),
        ParsedKey::Foreign { .. } => None,
    };
    assert_eq!(again, Some(module), "{canonical}");
}
