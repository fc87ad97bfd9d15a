//! How exact a delta is, once it is applied.

use serde::Serialize;

/// How exact a delta is on the layer that carries it. The worst is last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exactness {
    /// But for rounding, as any LoRA is.
    Exact,
    /// The norms of the weight that it was trained on are estimated from the quantized one.
    Norms,
    /// Cut to the best of fewer ranks.
    Truncated,
}

impl Exactness {
    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Norms => "norms",
            Self::Truncated => "truncated",
        }
    }

    /// How it is said to a user.
    pub fn title(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Norms => "norms estimated",
            Self::Truncated => "truncated",
        }
    }
}
