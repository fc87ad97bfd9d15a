//! Files of other models: what gives them away, and their names where they can be told.

/// (a part of a flattened key, the model it belongs to, whether it decides alone).
///
/// A deciding witness rejects a file even where other keys fit, since FLUX shares Qwen-Image's
/// attention names and width. The others only put a name to a file of which nothing fits.
const WITNESSES: [(&str, &str, bool); 16] = [
    ("single_transformer_blocks_", "FLUX", true),
    ("double_blocks_", "FLUX", true),
    ("single_blocks_", "FLUX", true),
    ("img_mlp_gate_layer", "Qwen-Image-2.1", true),
    ("img_mlp_gate_up", "Qwen-Image-2.1", true),
    ("img_mlp_proj", "Qwen-Image-2.1", true),
    ("img_mlp_out", "Qwen-Image-2.1", true),
    ("joint_transformer_blocks_", "Stable Diffusion 3", true),
    ("joint_blocks_", "Stable Diffusion 3", true),
    ("down_blocks_", "Stable Diffusion", false),
    ("input_blocks_", "Stable Diffusion", false),
    ("mid_block_", "Stable Diffusion", false),
    ("_cross_attn_", "Wan or another video model", false),
    ("_self_attn_", "Wan or another video model", false),
    ("transformer_blocks_0_ff_net_", "FLUX", false),
    (
        "transformer_blocks_0_attn1_",
        "a video or Stable Diffusion model",
        false,
    ),
];

/// A model that a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookalike {
    /// Its name.
    pub model: &'static str,
    /// Whether the key decides by itself.
    pub decides: bool,
}

/// What a key gives away.
pub fn witness(key: &str) -> Option<Lookalike> {
    let flat = key.replace('.', "_");
    WITNESSES
        .iter()
        .find(|(part, _, _)| contains_segment(&flat, part))
        .map(|&(_, model, decides)| Lookalike { model, decides })
}

/// `part` in `flat`, beginning at a word: `double_blocks_` is not in `xdouble_blocks_`.
fn contains_segment(flat: &str, part: &str) -> bool {
    flat.match_indices(part).any(|(at, _)| {
        part.starts_with('_')
            || at == 0
            || flat
                .as_bytes()
                .get(at - 1)
                .is_some_and(|b| !b.is_ascii_alphanumeric())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_decisions() {
        let flux = witness("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight");
        assert_eq!(
            flux,
            Some(Lookalike {
                model: "FLUX",
                decides: true
            })
        );
        assert_eq!(
            witness("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
            None
        );
        assert_eq!(
            witness("transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"),
            None
        );
        assert_eq!(
            witness("transformer.transformer_blocks.31.img_mlp.out.lora_A.weight"),
            Some(Lookalike {
                model: "Qwen-Image-2.1",
                decides: true
            })
        );
    }
}
