//! Whose file it is: decided by names and shapes, never by what the metadata says.

mod nothing;

use crate::adapter::module::Module;
use crate::header::Quoted;
use crate::key::lookalike;
use crate::key::role::Role;
use crate::key::table::KeyTable;
use crate::model::{self, Model, Section, Stream};
use crate::plan::fit::{self, Fit};

/// A finding on whose file it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelCheck {
    /// Its modules are this model's.
    Known(Model),
    /// It names another model's modules.
    Other(String),
    /// Its names fit, its shapes are not the released model's.
    OtherShapes(String),
    /// It names no module at all.
    Nothing(String),
}

/// Decides whose file it is, and marks modules whose shape is not the released model's.
pub(crate) fn check_model(modules: &mut [Module], table: &KeyTable) -> ModelCheck {
    if modules.is_empty()
        && let Some(text) = nothing::not_an_adapter(table)
    {
        return ModelCheck::Nothing(text);
    }
    let mut seen: Vec<_> = table
        .entries()
        .iter()
        // No module of the table is a witness, and most keys name one.
        .filter(|e| e.module.is_none())
        .filter_map(|e| Some((lookalike::witness(&e.tensor.key)?, e.tensor.key.as_str())))
        .collect();
    seen.sort_by_key(|(lookalike, _)| lookalike.place);
    if let Some((other, key)) = seen.iter().find(|(l, _)| l.decides) {
        let keys = table.entries().iter().map(|e| e.tensor.key.as_str());
        let name = lookalike::by_blocks(other.model, keys);
        let article = if name.starts_with('I') { "an" } else { "a" };
        return ModelCheck::Other(format!(
            "{article} {name} LoRA (it has {})",
            Quoted::new(key)
        ));
    }
    let Some(model) = fit::majority_model(modules) else {
        return ModelCheck::Nothing(nothing::nothing_found(table));
    };
    let (mut fitting, mut differing) = (0usize, 0usize);
    let mut example = None;
    for module in modules.iter_mut() {
        let own = model::table().module(module.id).model;
        if own != model {
            module.misfit = Some(format!("is a module of {own}, the file is {model}'s"));
            continue;
        }
        let reshaped = module.tensors.iter().any(|&i| {
            table
                .entries()
                .get(i)
                .is_some_and(|e| e.role == Role::Reshape)
        });
        match fit::fit(module) {
            Fit::Fits => fitting += 1,
            Fit::Differs(_) if reshaped => {}
            Fit::Differs(text) => {
                differing += 1;
                example.get_or_insert_with(|| {
                    format!("`{}` {text}", model::table().module(module.id).path)
                });
                module.misfit = Some(text);
            }
            Fit::Unknown => {}
        }
        if module.misfit.is_none() {
            module.misfit = fit::refusal(module);
        }
        if module.misfit.is_none() {
            module.left_out.extend(fit::misfits_beside(module));
        }
    }
    match example {
        Some(example) if differing >= fitting => {
            let probably = name_by_width(modules, model)
                .map(|name| format!(", probably {name}"))
                .unwrap_or_default();
            ModelCheck::OtherShapes(format!("a LoRA of another model{probably}: {example}"))
        }
        _ => ModelCheck::Known(model),
    }
}

/// The model that shares the names and has the width which most attention linears show.
fn name_by_width(modules: &[Module], model: Model) -> Option<&'static str> {
    let attention = || {
        modules.iter().filter_map(|module| {
            let known = model::table().module(module.id);
            match known.section {
                Section::Attention => Some((known.stream, module.shape?)),
                Section::Mlp | Section::Modulation | Section::Other => None,
            }
        })
    };
    let has_text_side = attention().any(|(stream, _)| stream == Some(Stream::Text));
    // Inputs: of a fused projection the outputs are a multiple of the width, or less.
    let mut widths: Vec<u64> = attention().map(|(_, (_, inp))| inp).collect();
    widths.sort_unstable();
    let most = widths.chunk_by(|a, b| a == b).max_by_key(|run| run.len())?;
    lookalike::by_width(model, *most.first()?, has_text_side)
}
