//! Why a tensor is left out.

use crate::header::Quoted;
use crate::key::Foreign;

/// Why a tensor is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It belongs to no module of the model.
    Foreign(Foreign),
    /// Another key names the same tensor of the same module.
    DuplicateOf(String),
    /// Another key names the same part of the same module with other content, or its module.
    UnequalDuplicate(String),
    /// The file holds the fused and the split form; the split one is used.
    SplitPreferred,
    /// The file holds the fused form and some of its parts; the fused one is used.
    FusedPreferred,
    /// A second adapter for a module; the first is used.
    SecondAdapter(String),
    /// A bias delta for a module without bias.
    NoBias,
}

impl Reason {
    /// The reason in reports.
    pub fn text(&self) -> String {
        match self {
            Self::DuplicateOf(key) => format!("the same tensor as {}", Quoted::new(key)),
            Self::UnequalDuplicate(key) => {
                format!(
                    "a second version of its module, unlike {}",
                    Quoted::new(key)
                )
            }
            Self::SecondAdapter(name) => {
                format!("second adapter {} of this module", Quoted::new(name))
            }
            Self::Foreign(_) | Self::SplitPreferred | Self::FusedPreferred | Self::NoBias => {
                self.kind().to_owned()
            }
        }
    }

    /// The reason without the names in it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Foreign(foreign) => foreign.reason(),
            Self::DuplicateOf(_) => "the same tensor under another key",
            Self::UnequalDuplicate(_) => "a second version of its module, unlike the first",
            Self::SplitPreferred => "the file holds this module's parts as well",
            Self::FusedPreferred => "the file holds the fused module as well",
            Self::SecondAdapter(_) => "a second adapter of its module",
            Self::NoBias => "module has no bias",
        }
    }

    /// Whether it is part of what the file does to the model, unlike another component's tensors.
    pub fn is_of_model(&self) -> bool {
        match self {
            Self::SecondAdapter(_) | Self::UnequalDuplicate(_) | Self::FusedPreferred => true,
            Self::Foreign(foreign) => {
                matches!(
                    foreign,
                    Foreign::UnknownForm
                        | Foreign::PlainWeight
                        | Foreign::TrainedBias
                        | Foreign::Parameter
                )
            }
            Self::DuplicateOf(_) | Self::SplitPreferred | Self::NoBias => false,
        }
    }

    /// Whether leaving it out changes nothing of what the file does.
    pub fn is_harmless(&self) -> bool {
        match self {
            Self::Foreign(foreign) => foreign.is_harmless(),
            Self::DuplicateOf(_) | Self::SplitPreferred => true,
            Self::UnequalDuplicate(_)
            | Self::FusedPreferred
            | Self::SecondAdapter(_)
            | Self::NoBias => false,
        }
    }
}
