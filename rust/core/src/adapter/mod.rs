//! The kinds of adapter, one file for each.
//!
//! A question is one match here: a new kind makes the compiler list all that must be answered.

pub mod delta;
mod full;
mod loha;
mod lokr;
mod lora;
pub mod module;
mod norm;
mod parts;
pub mod peft;
mod refused;
mod rows;

use serde::{Serialize, Serializer};

use crate::key::peft_method::{self, PeftMethod};
use crate::key::role::Role;
use crate::model::ModuleKind;
use delta::Form;
use module::Fault;
use parts::Parts;

/// How a module's tensors change its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Adapter {
    /// Low-rank pair.
    Lora,
    /// Kronecker product.
    Lokr,
    /// Hadamard product of two low-rank pairs.
    Loha,
    /// Low-rank pair with a magnitude per channel.
    Dora,
    /// Generalised LoRA.
    Glora,
    /// Orthogonal blocks.
    Oft,
    /// Butterfly of orthogonal blocks.
    Boft,
    /// Diagonal on the input or output.
    Ia3,
    /// Full weight (or bias) delta.
    Full,
    /// Delta of a norm's weight.
    Norm,
    /// A kind that only PEFT knows.
    Peft(&'static PeftMethod),
}

impl Adapter {
    /// The name in reports and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Lokr => "lokr",
            Self::Loha => "loha",
            Self::Dora => "dora",
            Self::Glora => "glora",
            Self::Oft => "oft",
            Self::Boft => "boft",
            Self::Ia3 => "ia3",
            Self::Full => "full",
            Self::Norm => "norm",
            Self::Peft(method) => method.name,
        }
    }

    /// How people write it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Lokr => "LoKr",
            Self::Loha => "LoHa",
            Self::Dora => "DoRA",
            Self::Glora => "GLoRA",
            Self::Oft => "OFT",
            Self::Boft => "BOFT",
            Self::Ia3 => "IA3",
            Self::Full => "full delta",
            Self::Norm => "norm delta",
            Self::Peft(method) => method.title,
        }
    }

    /// Whether this version applies it.
    pub fn is_supported(self) -> bool {
        self.loss().is_none()
    }

    /// For a kind that is not applied: why its tensors say nothing without what is missing.
    pub fn loss(self) -> Option<&'static str> {
        match self {
            Self::Lora | Self::Lokr | Self::Loha | Self::Full | Self::Norm => None,
            Self::Dora => Some("without its magnitudes the pair would be another LoRA"),
            Self::Glora => {
                Some("a part of its delta is a product with the base weight, which is quantized")
            }
            Self::Oft | Self::Boft => {
                Some("it turns the base weight by rotations, which no low-rank pair can do")
            }
            Self::Ia3 => {
                Some("it stretches the base weight's channels, which no low-rank pair can do")
            }
            Self::Peft(_) => Some("only PEFT knows what its tensors make up"),
        }
    }

    /// The kind of piece that it is executed as.
    pub fn piece(self) -> PieceKind {
        match self {
            Self::Lora | Self::Loha | Self::Glora => PieceKind::LowRank,
            Self::Lokr => PieceKind::Kron,
            Self::Full | Self::Peft(_) => PieceKind::Dense,
            Self::Norm => PieceKind::Vector,
            Self::Dora | Self::Ia3 => PieceKind::Diagonal,
            Self::Oft | Self::Boft => PieceKind::Rotation,
        }
    }

    /// The kind that a module's tensors make up. A kind that changes the meaning of another's
    /// tensors comes first: a pair with a magnitude is DoRA, never a LoRA.
    fn of(parts: &Parts<'_>) -> Option<Self> {
        let is_norm = matches!(parts.kind(), ModuleKind::Norm { .. });
        let blocks = parts.find(Role::OftBlocks);
        let dimensions = blocks.map_or(0, |(_, entry)| entry.tensor.shape.len());
        let is_oft = parts.has_any(&refused::OFT_OR_BOFT) && dimensions != refused::BOFT_DIMENSIONS;
        if let Some(method) = peft_method(parts) {
            Some(Self::Peft(method))
        } else if parts.has_any(&refused::DORA) {
            Some(Self::Dora)
        } else if parts.has_any(&lokr::ROLES) {
            Some(Self::Lokr)
        } else if parts.has_any(&loha::ROLES) {
            Some(Self::Loha)
        } else if parts.has_any(&refused::GLORA) {
            Some(Self::Glora)
        } else if parts.has_any(&refused::OFT) || is_oft {
            Some(Self::Oft)
        } else if parts.has_any(&refused::OFT_OR_BOFT) || parts.has_any(&refused::BOFT) {
            Some(Self::Boft)
        } else if parts.has_any(&refused::IA3) {
            Some(Self::Ia3)
        } else if parts.has_any(&lora::ROLES) {
            Some(Self::Lora)
        } else if is_norm && parts.has_any(&norm::ROLES) {
            Some(Self::Norm)
        } else if parts.has_any(&full::ROLES) {
            Some(Self::Full)
        } else {
            None
        }
    }

    /// The kind of delta that a DoRA's magnitudes stretch: trainers know a DoRA of LoKr and LoHa, too.
    fn under_magnitudes(parts: &Parts<'_>) -> Self {
        if parts.has_any(&lokr::ROLES) {
            Self::Lokr
        } else if parts.has_any(&loha::ROLES) {
            Self::Loha
        } else {
            Self::Lora
        }
    }

    /// How a module's tensors make up the delta of its weight.
    fn form(self, parts: &Parts<'_>) -> Result<Form, Fault> {
        match self {
            Self::Lora => lora::form(parts),
            Self::Lokr => lokr::form(parts),
            Self::Loha => loha::form(parts),
            Self::Full => full::form(parts),
            Self::Norm => norm::form(parts),
            Self::Dora | Self::Glora | Self::Oft | Self::Boft | Self::Ia3 | Self::Peft(_) => {
                refused::form(self)
            }
        }
    }

    /// The rank that is stored, or an upper bound of the delta's.
    fn rank(self, parts: &Parts<'_>) -> Option<u64> {
        let full = parts.full_rank();
        let bounded = |rank: Option<u64>| Some(rank?.min(full?));
        match self {
            Self::Lora => lora::rank(parts),
            Self::Dora => Self::under_magnitudes(parts).rank(parts),
            Self::Lokr => bounded(lokr::rank(parts)),
            Self::Loha => bounded(loha::rank(parts)),
            Self::Glora => bounded(refused::glora_rank(parts).map(|r| r.saturating_mul(2))),
            Self::Oft | Self::Boft | Self::Ia3 => full,
            Self::Full => full::rank(parts),
            Self::Norm | Self::Peft(_) => None,
        }
    }

    /// The divisor of a stored alpha; none where the kind has no alpha.
    fn divisor(self, parts: &Parts<'_>) -> Option<u64> {
        match self {
            Self::Lora => lora::divisor(parts),
            Self::Dora => Self::under_magnitudes(parts).divisor(parts),
            Self::Lokr => lokr::divisor(parts),
            Self::Loha => loha::divisor(parts),
            Self::Glora => refused::glora_rank(parts),
            Self::Oft | Self::Boft | Self::Ia3 | Self::Full | Self::Norm | Self::Peft(_) => None,
        }
    }

    /// (out, in) of the weight's delta, as far as tensors tell.
    fn shape(self, parts: &Parts<'_>) -> Option<(u64, u64)> {
        match self {
            Self::Lora => lora::shape(parts),
            Self::Dora => Self::under_magnitudes(parts).shape(parts),
            Self::Lokr => lokr::shape(parts),
            Self::Loha => loha::shape(parts),
            Self::Full => full::shape(parts),
            Self::Norm => norm::shape(parts),
            Self::Glora | Self::Oft | Self::Boft | Self::Ia3 | Self::Peft(_) => None,
        }
    }
}

/// The kind that only PEFT knows, where one of the module's tensors is of such a kind.
fn peft_method(parts: &Parts<'_>) -> Option<&'static PeftMethod> {
    let (_, entry) = parts.find(Role::PeftOnly)?;
    peft_method::of_key(&entry.tensor.key)
}

fn missing(adapter: Adapter, role: Role) -> Fault {
    Fault::Broken(format!("is a {} without {}", adapter.title(), role.name()))
}

/// The way in which a slot carries a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum PieceKind {
    /// up (out, r) times down (r, in).
    LowRank,
    /// Kronecker product of two small factors.
    Kron,
    /// A matrix of the weight's shape.
    Dense,
    /// One value per channel, added to a bias or a norm.
    Vector,
    /// One factor per channel (reserved).
    Diagonal,
    /// Orthogonal blocks (reserved).
    Rotation,
}

impl Serialize for Adapter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
