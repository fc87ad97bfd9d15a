//! A key that is no tensor of a module: what can be said of it all the same.

use super::{Reading, path_of};
use crate::key::lookalike;
use crate::key::part::Part;
use crate::key::{self, Foreign, ParsedKey};
use crate::model;

/// A key, or a path, that the grammar does not take apart as a module's tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unread {
    /// A module's path, without an ending.
    PathAlone {
        /// The canonical path.
        module: &'static str,
    },
    /// A module's path with an ending that is not in the grammar.
    UnknownEnding {
        /// The canonical path.
        module: &'static str,
        /// The rest of the key behind the path.
        ending: String,
    },
    /// A module of a block whose number the model does not have: which it has, in words.
    BeyondTheModel(String),
    /// A tensor of another part of the pipeline.
    OfPart(Part),
    /// Anything else that is known.
    Known(Foreign),
    /// A module of other models, as far as names tell.
    OfModel(&'static str),
    /// Nothing is known of it.
    Unknown,
}

impl Unread {
    /// Reads a key that names no tensor of a module; none where it names one.
    pub fn of(key: &str) -> Option<Self> {
        if Reading::of(key).is_some() {
            return None;
        }
        let ParsedKey::Foreign { reason, .. } = key::parse(key) else {
            return None;
        };
        Some(match reason {
            Foreign::UnknownForm => Self::beside_module(key),
            Foreign::BlockOutOfRange => {
                key::block_out_of_range(key).map_or(Self::Unknown, Self::BeyondTheModel)
            }
            Foreign::TextEncoder => Self::OfPart(Part::TextEncoder),
            Foreign::Vae => Self::OfPart(Part::Vae),
            Foreign::Embedding => Self::OfPart(Part::Embedding),
            Foreign::NotAModule => Self::of_others(key),
            Foreign::Bookkeeping
            | Foreign::BaseWeight
            | Foreign::TrainedBias
            | Foreign::Unused
            | Foreign::Parameter
            | Foreign::PlainWeight => Self::Known(reason),
        })
    }

    fn beside_module(key: &str) -> Self {
        let Some((module, ending)) = key::named_module(key) else {
            return Self::Unknown;
        };
        let module = path_of(model::table().module(module));
        match ending.as_str() {
            "" | "." => Self::PathAlone { module },
            _ => Self::UnknownEnding { module, ending },
        }
    }

    fn of_others(key: &str) -> Self {
        match (Part::of(key), lookalike::witness(key)) {
            (Some(part), _) => Self::OfPart(part),
            (None, Some(lookalike)) => {
                let model = lookalike::by_blocks(lookalike.model, [key].into_iter());
                Self::OfModel(model)
            }
            (None, None) => Self::Unknown,
        }
    }
}
