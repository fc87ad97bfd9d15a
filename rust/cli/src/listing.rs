//! `--all`: every tensor on a line of its own, and what it is taken for.

use std::collections::HashMap;

use qwenlora_core::adapter::module::Fault;
use qwenlora_core::key::table::Entry;
use qwenlora_core::model;
use qwenlora_core::plan::FilePlan;
use qwenlora_core::plan::check::ModelCheck;

use crate::escape;
use crate::report::shape;
use crate::screen::Screen;
use crate::tally::number;

/// Longest key: the list is for reading keys, so that only absurd ones are cut.
const KEY_CHARS: usize = 200;

/// Adds the list, in file order.
pub(crate) fn add(screen: &mut Screen, plan: &FilePlan) {
    let is_other = !matches!(plan.check(), ModelCheck::Known(_));
    let entries = plan.table().entries();
    // What befalls a tensor by its module's fault, or by itself.
    let mut reasons: HashMap<usize, &str> = HashMap::new();
    for module in plan.modules() {
        let whole = module
            .fault
            .as_ref()
            .map(Fault::text)
            .or(module.misfit.as_deref());
        reasons.extend(
            whole
                .iter()
                .flat_map(|text| module.tensors.iter().map(|&i| (i, *text))),
        );
        reasons.extend(module.left_out.iter().map(|(i, text)| (*i, text.as_str())));
    }
    for (index, entry) in entries.iter().enumerate() {
        let (key, dtype) = (
            escape::short(&entry.tensor.key, KEY_CHARS),
            entry.tensor.dtype.name(),
        );
        let fate = fate(entry, reasons.get(&index).copied(), is_other);
        screen.item(&format!(
            "{key}  {dtype} {}  -> {fate}",
            shape(&entry.tensor.shape)
        ));
    }
}

fn fate(entry: &Entry, reason: Option<&str>, is_other: bool) -> String {
    if let Some(reason) = &entry.reason {
        return format!("ignored: {}", escape::short(&reason.text(), KEY_CHARS));
    }
    let Some(id) = entry.module.filter(|_| !is_other) else {
        return "ignored: other model".to_owned();
    };
    let mut text = format!("{} {}", model::table().module(id).path, entry.role.name());
    if let Some(value) = entry.value {
        text = format!("{text} = {}", number(value));
    }
    match reason {
        Some(reason) => format!("{text}, not applied: {reason}"),
        None => text,
    }
}
