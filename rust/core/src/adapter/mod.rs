//! The kinds of adapter, one file for each.
//!
//! A question is one match here: a new kind makes the compiler list all that must be answered.

mod boft;
pub mod delta;
mod dora;
pub mod exactness;
mod full;
mod glora;
mod hra;
mod ia3;
mod loha;
mod lokr;
mod lora;
pub mod module;
mod norm;
mod oft;
mod parts;
pub mod peft;
mod refused;
pub mod rotation;
mod rows;
pub(crate) mod set_weight;

use serde::{Serialize, Serializer};

use crate::key::peft_method::{self, PeftMethod};
use crate::key::role::Role;
use crate::model::ModuleKind;
use delta::{Form, Magnitude};
use module::Fault;
use parts::Parts;
use peft::AdapterConfig;

/// How a module's tensors change its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Adapter {
    /// Low-rank pair.
    Lora,
    /// Kronecker product.
    Lokr,
    /// Hadamard product of two low-rank pairs.
    Loha,
    /// Low-rank pair, or another product, with a magnitude per channel.
    Dora,
    /// Generalised LoRA.
    Glora,
    /// Orthogonal blocks.
    Oft,
    /// Butterfly of orthogonal blocks.
    Boft,
    /// Diagonal on the input or output.
    Ia3,
    /// Reflections of the input.
    Hra,
    /// Full weight (or bias) delta.
    Full,
    /// Delta of a norm's weight.
    Norm,
    /// A value that replaces the weight.
    Set,
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
            Self::Hra => "hra",
            Self::Full => "full",
            Self::Norm => "norm",
            Self::Set => "set",
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
            Self::Hra => "HRA",
            Self::Full => "full delta",
            Self::Norm => "norm delta",
            Self::Set => "set_weight",
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
            Self::Lora
            | Self::Lokr
            | Self::Loha
            | Self::Dora
            | Self::Glora
            | Self::Oft
            | Self::Boft
            | Self::Ia3
            | Self::Hra
            | Self::Full
            | Self::Norm
            | Self::Set => None,
            Self::Peft(_) => Some("only PEFT knows what its tensors make up"),
        }
    }

    /// Why a layer inside a kernel that takes ranks alone carries nothing of it, and what does.
    pub fn in_kernel(self) -> String {
        let title = self.title();
        format!(
            "{title} is more than rank, and Nunchaku computes this layer inside a kernel that takes \
             ranks alone: a model that calls the layer by itself takes it"
        )
    }

    /// The kind of piece that it is executed as.
    pub fn piece(self) -> PieceKind {
        match self {
            Self::Lora | Self::Loha | Self::Glora | Self::Hra => PieceKind::LowRank,
            Self::Lokr => PieceKind::Kron,
            Self::Full | Self::Set | Self::Peft(_) => PieceKind::Dense,
            Self::Norm => PieceKind::Vector,
            Self::Dora | Self::Ia3 => PieceKind::Diagonal,
            Self::Oft | Self::Boft => PieceKind::Rotation,
        }
    }

    /// The kind that a module's tensors make up. A kind that changes the meaning of another's
    /// tensors comes first: a pair with a magnitude is DoRA, never a LoRA.
    fn of(parts: &Parts<'_>) -> Option<Self> {
        let is_norm = matches!(parts.kind(), ModuleKind::Norm { .. });
        let dimensions = parts.dimensions(Role::OftBlocks).len();
        let has_blocks = parts.has_any(&oft::BLOCKS);
        if let Some(method) = peft_method(parts) {
            Some(Self::Peft(method))
        } else if parts.has_any(&dora::ROLES) {
            Some(Self::Dora)
        } else if parts.has_any(&lokr::ROLES) {
            Some(Self::Lokr)
        } else if parts.has_any(&loha::ROLES) {
            Some(Self::Loha)
        } else if parts.has_any(&glora::ROLES) {
            Some(Self::Glora)
        } else if parts.has_any(&oft::ROLES) || (has_blocks && dimensions != boft::DIMENSIONS) {
            Some(Self::Oft)
        } else if has_blocks || parts.has_any(&boft::ROLES) {
            Some(Self::Boft)
        } else if parts.has_any(&ia3::ROLES) {
            Some(Self::Ia3)
        } else if parts.has_any(&hra::ROLES) {
            Some(Self::Hra)
        } else if parts.has_any(&lora::ROLES) {
            Some(Self::Lora)
        } else if parts.has_any(&set_weight::ROLES) {
            Some(Self::Set)
        } else if is_norm && parts.has_any(&norm::ROLES) {
            Some(Self::Norm)
        } else if parts.has_any(&full::ROLES) {
            Some(Self::Full)
        } else {
            None
        }
    }

    /// How a module's tensors make up the delta of its weight.
    fn form(self, parts: &Parts<'_>, config: Option<&AdapterConfig>) -> Result<Form, Fault> {
        match self {
            Self::Lora => lora::form(parts),
            Self::Lokr => lokr::form(parts),
            Self::Loha => loha::form(parts),
            Self::Dora => dora::form(parts),
            Self::Glora => glora::form(parts),
            Self::Oft => oft::form(parts, config),
            Self::Boft => boft::form(parts),
            Self::Ia3 => ia3::form(parts),
            Self::Hra => hra::form(parts, config),
            Self::Full => full::form(parts),
            Self::Norm => norm::form(parts),
            Self::Set => set_weight::form(parts),
            Self::Peft(_) => refused::form(self),
        }
    }

    /// What the weight with its delta is normed and stretched by.
    fn magnitude(self, parts: &Parts<'_>, form: &Form) -> Result<Option<Magnitude>, Fault> {
        match self {
            Self::Dora => dora::magnitude(parts, form).map(Some),
            Self::Lora
            | Self::Lokr
            | Self::Loha
            | Self::Glora
            | Self::Oft
            | Self::Boft
            | Self::Ia3
            | Self::Hra
            | Self::Full
            | Self::Norm
            | Self::Set
            | Self::Peft(_) => Ok(None),
        }
    }

    /// The rank that is stored, or an upper bound of the delta's.
    fn rank(self, parts: &Parts<'_>) -> Option<u64> {
        let full = parts.full_rank();
        let bounded = |rank: Option<u64>| Some(rank?.min(full?));
        match self {
            Self::Lora => lora::rank(parts),
            Self::Dora => dora::inner(parts)?.rank(parts),
            Self::Lokr => bounded(lokr::rank(parts)),
            Self::Loha => bounded(loha::rank(parts)),
            Self::Glora => bounded(glora::divisor(parts).map(|r| r.saturating_mul(2))),
            Self::Hra => bounded(hra::rank(parts)),
            Self::Oft | Self::Boft | Self::Ia3 => full,
            Self::Full => full::rank(parts),
            Self::Set => matches!(parts.kind(), ModuleKind::Linear { .. })
                .then_some(full)
                .flatten(),
            Self::Norm | Self::Peft(_) => None,
        }
    }

    /// The divisor of a stored alpha; none where the kind has no alpha that scales.
    fn divisor(self, parts: &Parts<'_>) -> Option<u64> {
        match self {
            Self::Lora => lora::divisor(parts),
            Self::Dora => dora::inner(parts)?.divisor(parts),
            Self::Lokr => lokr::divisor(parts),
            Self::Loha => loha::divisor(parts),
            Self::Glora => glora::divisor(parts),
            Self::Oft
            | Self::Boft
            | Self::Ia3
            | Self::Hra
            | Self::Full
            | Self::Norm
            | Self::Set
            | Self::Peft(_) => None,
        }
    }

    /// (out, in) of the weight's delta, where tensors tell both.
    fn shape(self, parts: &Parts<'_>) -> Option<(u64, u64)> {
        match self {
            Self::Lora => lora::shape(parts),
            Self::Dora => dora::inner(parts)?.shape(parts),
            Self::Lokr => lokr::shape(parts),
            Self::Loha => loha::shape(parts),
            Self::Glora => glora::shape(parts),
            Self::Full => full::shape(parts),
            Self::Norm => norm::shape(parts),
            Self::Set => set_weight::shape(parts),
            Self::Oft | Self::Boft | Self::Ia3 | Self::Hra | Self::Peft(_) => None,
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
    /// One factor per channel.
    Diagonal,
    /// Orthogonal blocks.
    Rotation,
}

impl Serialize for Adapter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
