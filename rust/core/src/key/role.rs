//! The parts that tensors play in their modules: the vocabulary of the key grammar.

use serde::{Serialize, Serializer};

macro_rules! roles {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// The part a tensor plays in its adapter.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Role { $($(#[$doc])* $variant,)* }

        impl Role {
            /// Every role.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name in reports and in JSON.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

roles! {
    /// LoRA A: (rank, in).
    Down => "down",
    /// LoRA B: (out, rank).
    Up => "up",
    /// The middle factor of a Tucker LoRA.
    Mid => "mid",
    /// PEFT's `lora_B.bias`: a bias delta before scaling.
    UpBias => "up_bias",
    /// The alpha of the scale rule.
    Alpha => "alpha",
    /// The scale itself (stable-diffusion.cpp).
    Scale => "scale",
    /// DoRA's magnitude.
    DoraScale => "dora_scale",
    /// LoKr, first factor.
    LokrW1 => "lokr_w1",
    /// LoKr, first factor, left half.
    LokrW1A => "lokr_w1_a",
    /// LoKr, first factor, right half.
    LokrW1B => "lokr_w1_b",
    /// LoKr, second factor.
    LokrW2 => "lokr_w2",
    /// LoKr, second factor, left half.
    LokrW2A => "lokr_w2_a",
    /// LoKr, second factor, right half.
    LokrW2B => "lokr_w2_b",
    /// LoKr, Tucker core of the second factor.
    LokrT2 => "lokr_t2",
    /// LoHa, first product, left half.
    HadaW1A => "hada_w1_a",
    /// LoHa, first product, right half.
    HadaW1B => "hada_w1_b",
    /// LoHa, second product, left half.
    HadaW2A => "hada_w2_a",
    /// LoHa, second product, right half.
    HadaW2B => "hada_w2_b",
    /// LoHa, Tucker core of the first product.
    HadaT1 => "hada_t1",
    /// LoHa, Tucker core of the second product.
    HadaT2 => "hada_t2",
    /// GLoRA a1.
    GloraA1 => "glora_a1",
    /// GLoRA a2.
    GloraA2 => "glora_a2",
    /// GLoRA b1.
    GloraB1 => "glora_b1",
    /// GLoRA b2.
    GloraB2 => "glora_b2",
    /// GLoRA middle factor.
    GloraBm => "glora_bm",
    /// OFT (3-D) or BOFT (4-D) blocks.
    OftBlocks => "oft_blocks",
    /// Rescale of OFT and BOFT.
    OftRescale => "oft_rescale",
    /// OFT as PEFT and OneTrainer store it.
    OftR => "oft_r",
    /// OneTrainer's marker of scaled OFT.
    OftScaled => "oft_scaled",
    /// IA3's diagonal.
    Ia3 => "ia3",
    /// Whether IA3 acts on the input.
    Ia3OnInput => "ia3_on_input",
    /// IA3's diagonal as PEFT stores it.
    Ia3L => "ia3_l",
    /// BOFT's blocks as PEFT stores them.
    BoftR => "boft_r",
    /// BOFT's scale per channel as PEFT stores it.
    BoftS => "boft_s",
    /// HRA's reflections: (in, rank).
    HraU => "hra_u",
    /// A tensor of a kind of adapter that only PEFT knows.
    PeftOnly => "peft_only",
    /// A full weight delta.
    Diff => "diff",
    /// A bias delta.
    DiffB => "diff_b",
    /// A norm's weight delta.
    WNorm => "w_norm",
    /// A norm's bias delta.
    BNorm => "b_norm",
    /// A weight that replaces the module's.
    SetWeight => "set_weight",
    /// A new shape of the module's weight.
    Reshape => "reshape",
    /// Scale of a float8 half.
    Fp8Scale => "fp8_scale",
    /// LoRA A, already in Nunchaku's packed layout.
    PackedDown => "packed_down",
    /// LoRA B, already in Nunchaku's packed layout.
    PackedUp => "packed_up",
    /// Not part of anything this version knows.
    Ignored => "ignored",
}

impl Role {
    /// Whether it is a matrix that a delta is made of.
    pub fn is_factor(self) -> bool {
        matches!(
            self,
            Self::Down
                | Self::Up
                | Self::Mid
                | Self::PackedDown
                | Self::PackedUp
                | Self::LokrW1
                | Self::LokrW1A
                | Self::LokrW1B
                | Self::LokrW2
                | Self::LokrW2A
                | Self::LokrW2B
                | Self::LokrT2
                | Self::HadaW1A
                | Self::HadaW1B
                | Self::HadaW2A
                | Self::HadaW2B
                | Self::HadaT1
                | Self::HadaT2
                | Self::Diff
        )
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Roles(u64);

const _: () = assert!(Role::ALL.len() <= 64, "each has a bit of its own");

impl Roles {
    /// Takes a role in.
    pub(crate) fn add(&mut self, role: Role) {
        self.0 |= 1 << role as u32;
    }

    /// Whether a role is one of them.
    pub(crate) fn has(self, role: Role) -> bool {
        self.0 & (1 << role as u32) != 0
    }
}

impl Serialize for Role {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
