//! The words of the key grammar, as the targets put them together.

/// Spellings of a module's prefix.
pub const PREFIXES: [&str; 14] = [
    "",
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "transformer.base_model.model.",
    "model.diffusion_model.",
    "pipe.dit.",
    "unet.",
    "lora_unet_",
    "lora_unet__",
    "lycoris_",
    "lora_transformer_",
    "module._orig_mod.",
    "lora_unet__orig_mod_",
];

/// One suffix per role at least, and every spelling that a rule treats by itself.
pub const SUFFIXES: [&str; 74] = [
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_down",
    ".lora_up",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".lora_A.other.weight",
    ".lora_B.other.weight",
    ".lora.down.weight",
    ".lora.up.weight",
    "_lora.down.weight",
    "_lora.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_linear_layer.up.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_embedding_A.default",
    ".lora_embedding_B.default",
    ".lora_mid.weight",
    ".lora_B.bias",
    ".lora_B.default.bias",
    ".alpha",
    ".lora_alpha",
    ".scale",
    ".dora_scale",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default",
    ".magnitude",
    ".lokr_w1",
    ".lokr_w1.default",
    ".lokr_w2.other",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".bm.weight",
    ".oft_blocks",
    ".rescale",
    ".oft_R.weight",
    ".oft_R.scaled_oft",
    ".boft_R",
    ".boft_s",
    ".ia3_l",
    ".hra_u",
    ".lora_E",
    ".vera_lambda_b",
    ".weight",
    ".on_input",
    ".diff",
    ".diff_b",
    ".w_norm",
    ".b_norm",
    ".set_weight",
    ".reshape_weight",
    ".lora_down.weight.scale_weight",
    ".lora_up.scale_weight",
    ".lora_A.weight_scale",
    ".lokr_w1.scale_weight",
    ".diff.weight_scale",
    ".no_such_suffix",
];

/// What one adapter is made of, by family.
pub const FAMILIES: [&[&str]; 25] = [
    &[".lora_down.weight", ".lora_up.weight", ".alpha"],
    &[".lora_A.weight", ".lora_B.weight"],
    &[
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        ".lora_B.default.bias",
    ],
    &[".lora_down", ".lora_up"],
    &[
        ".lora_down.weight",
        ".lora_mid.weight",
        ".lora_up.weight",
        ".alpha",
    ],
    &[".lora_embedding_A", ".lora_embedding_B"],
    &[
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_magnitude_vector.weight",
    ],
    &[".lokr_w1", ".lokr_w2", ".alpha"],
    &[".lokr_w1", ".lokr_w2"],
    &[".lora_A.weight", ".lora_B.weight", ".lora_E"],
    &[".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha"],
    &[
        ".lokr_w1_a",
        ".lokr_w1_b",
        ".lokr_w2_a",
        ".lokr_w2_b",
        ".alpha",
    ],
    &[
        ".hada_w1_a",
        ".hada_w1_b",
        ".hada_w2_a",
        ".hada_w2_b",
        ".alpha",
    ],
    &[".diff", ".diff_b"],
    &[".w_norm", ".b_norm"],
    &[".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"],
    &[".oft_blocks", ".rescale", ".alpha"],
    &[".lokr_w1", ".lokr_w2", ".dora_scale", ".alpha"],
    &[".oft_R.weight", ".oft_R.scaled_oft"],
    &[".boft_R", ".boft_s"],
    &[".ia3_l"],
    &[".hra_u"],
    &[".weight", ".on_input"],
    &[".set_weight", ".reshape_weight"],
    &[".set_weight"],
];

#[cfg(test)]
mod tests {
    use qwenlora_core::key;
    use qwenlora_core::key::suffix;

    #[test]
    fn every_word_is_one_of_the_grammar() {
        for prefix in super::PREFIXES {
            assert!(prefix.is_empty() || key::resolve(&format!("{prefix}img_in")).is_some());
        }
        let (unknown, suffixes) = super::SUFFIXES.split_last().unwrap();
        assert_eq!(suffix::cut(&format!("img_in{unknown}")), None);
        for suffix in suffixes.iter().chain(super::FAMILIES.into_iter().flatten()) {
            let key = format!("img_in{suffix}");
            assert_eq!(
                suffix::cut(&key).map(|cut| cut.stem),
                Some("img_in"),
                "{suffix}"
            );
        }
    }
}
