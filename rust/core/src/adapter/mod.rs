//! The kinds of adapter, and which this version applies.

pub mod delta;
pub mod module;
pub mod peft;

use serde::{Serialize, Serializer};

use crate::key::peft_method::PeftMethod;
use crate::key::role::Role;

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

    /// The kind that a module's roles make up. A kind that changes the meaning of another's
    /// tensors comes first: a pair with a magnitude is DoRA, never a LoRA.
    /// `method` is that of the module's [`Role::PeftOnly`] tensors.
    pub(crate) fn of(
        has: &impl Fn(Role) -> bool,
        is_norm: bool,
        oft_rank: usize,
        method: Option<&'static PeftMethod>,
    ) -> Option<Self> {
        let any = |roles: &[Role]| roles.iter().any(|r| has(*r));
        if let Some(method) = method {
            Some(Self::Peft(method))
        } else if any(&[Role::DoraScale]) {
            Some(Self::Dora)
        } else if any(&LOKR) {
            Some(Self::Lokr)
        } else if any(&LOHA) {
            Some(Self::Loha)
        } else if any(&GLORA) {
            Some(Self::Glora)
        } else if any(&[Role::OftR]) || (any(&[Role::OftBlocks]) && oft_rank != 4) {
            Some(Self::Oft)
        } else if any(&[Role::OftBlocks, Role::BoftR, Role::BoftS]) {
            Some(Self::Boft)
        } else if any(&[Role::Ia3, Role::Ia3L]) {
            Some(Self::Ia3)
        } else if any(&[Role::Down, Role::Up, Role::PackedDown, Role::PackedUp]) {
            Some(Self::Lora)
        } else if is_norm && any(&[Role::Diff, Role::WNorm, Role::SetWeight]) {
            Some(Self::Norm)
        } else if any(&[Role::Diff, Role::DiffB, Role::WNorm, Role::SetWeight]) {
            Some(Self::Full)
        } else {
            None
        }
    }
}

/// What a module's delta is to the slot that carries it.
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

const LOKR: [Role; 7] = [
    Role::LokrW1,
    Role::LokrW1A,
    Role::LokrW1B,
    Role::LokrW2,
    Role::LokrW2A,
    Role::LokrW2B,
    Role::LokrT2,
];
const LOHA: [Role; 6] = [
    Role::HadaW1A,
    Role::HadaW1B,
    Role::HadaW2A,
    Role::HadaW2B,
    Role::HadaT1,
    Role::HadaT2,
];
const GLORA: [Role; 5] = [
    Role::GloraA1,
    Role::GloraA2,
    Role::GloraB1,
    Role::GloraB2,
    Role::GloraBm,
];

impl Serialize for Adapter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
