//! The losses of a file, in as few rows as there are reasons.

use std::cmp::Reverse;
use std::collections::HashMap;

use qwenlora_core::adapter::module::{self, Module};
use qwenlora_core::header::Quoted;
use qwenlora_core::key::reason::Reason;
use qwenlora_core::key::table::Entry;
use qwenlora_core::plan::FilePlan;
use qwenlora_core::plan::check::ModelCheck;
use qwenlora_core::plan::component::Component;

/// Things that are left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Loss {
    /// The reason.
    pub(crate) text: String,
    /// How many.
    pub(crate) count: usize,
    /// The key of one of them.
    pub(crate) example: String,
}

/// Losses in order of their first appearance, found again by their reason: a file may have as many
/// reasons as tensors.
#[derive(Debug, Default)]
struct Tally {
    losses: Vec<Loss>,
    by_text: HashMap<String, usize>,
}

impl Tally {
    fn add(&mut self, text: String, entry: Option<&Entry>) {
        let example = entry.map(|entry| entry.tensor.key.as_str());
        self.add_many(text, 1, example.unwrap_or_default());
    }

    fn add_many(&mut self, text: String, count: usize, example: &str) {
        let at = *self.by_text.entry(text).or_insert_with_key(|text| {
            self.losses.push(Loss {
                text: text.clone(),
                count: 0,
                example: example.to_owned(),
            });
            self.losses.len() - 1
        });
        if let Some(loss) = self.losses.get_mut(at) {
            loss.count += count;
        }
    }

    /// Commonest first, else in order.
    fn sorted(mut self) -> Vec<Loss> {
        self.losses.sort_by_key(|loss| Reverse(loss.count));
        self.losses
    }
}

/// The losses by their weight; commonest first.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    /// Modules that do nothing at all.
    pub(crate) modules: Vec<Loss>,
    /// Tensors whose loss changes what the file does.
    pub(crate) tensors: Vec<Loss>,
    /// Tensors whose loss changes nothing.
    pub(crate) harmless: Vec<Loss>,
}

impl Losses {
    /// Collects them from a plan.
    pub(crate) fn of(plan: &FilePlan) -> Self {
        let entries = plan.table().entries();
        let (mut modules, mut tensors) = (Tally::default(), Tally::default());
        let mut harmless = Tally::default();
        if let ModelCheck::Other(_) | ModelCheck::OtherShapes(_) = plan.check() {
            for entry in entries {
                tensors.add("another model's".to_owned(), Some(entry));
            }
            return Self {
                tensors: tensors.sorted(),
                ..Self::default()
            };
        }
        for module in plan.modules() {
            let first = example_of(module, entries);
            if let Some(text) = reason_of(module) {
                modules.add(text, first);
            }
            for (index, text) in &module.left_out {
                tensors.add(text.clone(), entries.get(*index));
            }
        }
        let components = plan.components();
        for component in &components {
            let tally = if component.harmless {
                &mut harmless
            } else {
                &mut tensors
            };
            tally.add_many(title(component), component.tensors, &component.example);
        }
        let is_component = |reason: &&Reason| components.iter().any(|c| c.reason == reason.kind());
        for entry in entries {
            if let Some(reason) = entry.reason.as_ref().filter(|reason| !is_component(reason)) {
                let tally = if reason.is_harmless() {
                    &mut harmless
                } else {
                    &mut tensors
                };
                tally.add(kind_of(reason), Some(entry));
            }
        }
        Self {
            modules: modules.sorted(),
            tensors: tensors.sorted(),
            harmless: harmless.sorted(),
        }
    }
}

/// A tensor that stands for its module: rather a factor than an alpha.
fn example_of<'t>(module: &Module, entries: &'t [Entry]) -> Option<&'t Entry> {
    let mut own = module.tensors.iter().filter_map(|&i| entries.get(i));
    let first = own.clone().next();
    own.find(|entry| !module::is_scalar_role(entry.role))
        .or(first)
}

/// Why a module does nothing, if so.
fn reason_of(module: &Module) -> Option<String> {
    let own = module.fault.as_ref().map(|fault| fault.text().to_owned());
    own.or_else(|| module.misfit.clone())
}

/// The reason without what differs from tensor to tensor.
fn kind_of(reason: &Reason) -> String {
    match reason {
        Reason::DuplicateOf(_) | Reason::UnequalDuplicate(_) => reason.kind().to_owned(),
        other => other.text(),
    }
}

/// The kind of a component, with the name that the keys give it.
fn title(component: &Component) -> String {
    format!("{} {}", component.reason, Quoted::new(&component.name))
}
