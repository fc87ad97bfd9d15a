//! The tensors of a file that belong to no module of the model, component by component.

use std::collections::HashMap;

use serde::Serialize;

use crate::key::Foreign;
use crate::key::reason::Reason;
use crate::plan::FilePlan;
use crate::plan::check::ModelCheck;

/// Segments that only say where a component's own name follows.
const CONTAINERS: [&str; 2] = ["pipe", "text_encoders"];
/// Starts of names whose dots are flattened.
const FLAT: [&str; 5] = ["lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_unet"];

/// Tensors of another component than the transformer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// How the keys call it, as `text_encoders.qwen25_7b`.
    pub name: String,
    /// Its kind.
    pub reason: &'static str,
    /// How many tensors it has.
    pub tensors: usize,
    /// The key of the first.
    pub example: String,
    /// Whether nothing of an adapter is lost with them.
    pub harmless: bool,
}

impl FilePlan {
    /// The components beside the model's modules, in order of the first keys. A tensor of unknown
    /// kind, a block out of range and a saved base weight are a module's own trouble, not another
    /// component.
    pub fn components(&self) -> Vec<Component> {
        // Of another model's file every key is foreign to this one.
        if matches!(
            self.check,
            ModelCheck::Other(_) | ModelCheck::OtherShapes(_)
        ) {
            return Vec::new();
        }
        let mut components: Vec<Component> = Vec::new();
        let mut known = HashMap::new();
        for entry in self.table.entries() {
            let Some(Reason::Foreign(foreign)) = entry.reason else {
                continue;
            };
            if !is_component(foreign) {
                continue;
            }
            let name = name_of(&entry.tensor.key);
            let at = *known.entry((name, foreign)).or_insert_with(|| {
                components.push(Component {
                    name: name.to_owned(),
                    reason: foreign.reason(),
                    tensors: 0,
                    example: entry.tensor.key.clone(),
                    harmless: foreign.is_harmless(),
                });
                components.len() - 1
            });
            if let Some(component) = components.get_mut(at) {
                component.tensors += 1;
            }
        }
        components
    }
}

fn is_component(foreign: Foreign) -> bool {
    match foreign {
        Foreign::TextEncoder
        | Foreign::Vae
        | Foreign::Embedding
        | Foreign::Bookkeeping
        | Foreign::NotAModule => true,
        Foreign::BaseWeight
        | Foreign::TrainedBias
        | Foreign::PlainWeight
        | Foreign::Unused
        | Foreign::Parameter
        | Foreign::BlockOutOfRange
        | Foreign::UnknownForm => false,
    }
}

/// The part of a key that names its component.
fn name_of(key: &str) -> &str {
    if let Some(flat) = FLAT.iter().find(|flat| {
        key.strip_prefix(**flat)
            .is_some_and(|rest| rest.starts_with('_'))
    }) {
        return flat;
    }
    let mut ends = key.match_indices('.').map(|(at, _)| at);
    let first = ends.next().and_then(|at| key.get(..at)).unwrap_or(key);
    if CONTAINERS.contains(&first) {
        let second = ends.next().and_then(|at| key.get(..at));
        return second.unwrap_or(key);
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_are_called_as_their_keys_do() {
        for (key, name) in [
            (
                "text_encoders.qwen25_7b.transformer.model.layers.0.q.alpha",
                "text_encoders.qwen25_7b",
            ),
            (
                "text_encoder.model.layers.0.q.lora_A.weight",
                "text_encoder",
            ),
            ("lora_te_model_layers_0_mlp.alpha", "lora_te"),
            ("lora_te1_text_model_encoder.alpha", "lora_te1"),
            ("bundle_emb.trigger.qwen_out", "bundle_emb"),
            ("_aux.0f1e2d3c", "_aux"),
            (
                "pipe.perceiver_resampler.latents",
                "pipe.perceiver_resampler",
            ),
            ("pipe.x", "pipe.x"),
            ("scaled_fp8", "scaled_fp8"),
            ("", ""),
        ] {
            assert_eq!(name_of(key), name, "{key}");
        }
    }
}
