//! Files of other models: what gives them away, and their names where they can be told.

use crate::key::suffix;
use crate::model::Model;

/// (a part of a flattened key, the model it belongs to, whether it decides alone); `#` stands for
/// a number. The more telling come first: where several are in one file, the first row names it.
///
/// A deciding witness rejects a file even where other keys fit, since FLUX shares Qwen-Image's
/// attention names and width. The others only put a name to a file of which nothing fits.
const WITNESSES: [(&str, &str, bool); 44] = [
    ("_attn_to_qkv_mlp_proj", "FLUX.2", true),
    ("_stream_modulation_", "FLUX.2", true),
    ("transformer_blocks_#_ff_linear_", "FLUX.2", true),
    ("transformer_blocks_#_ff_context_linear_", "FLUX.2", true),
    ("distilled_guidance_layer_", "Chroma", true),
    ("clean_x_embedder_", "FramePack", true),
    ("double_blocks_#_img_mlp_fc", HUNYUAN, true),
    ("double_blocks_#_txt_mlp_fc", HUNYUAN, true),
    ("double_blocks_#_img_mod_linear", HUNYUAN, true),
    ("double_blocks_#_txt_mod_linear", HUNYUAN, true),
    ("double_blocks_#_img_attn_q_", HUNYUAN, true),
    ("double_blocks_#_txt_attn_q_", HUNYUAN, true),
    ("single_blocks_#_modulation_linear", HUNYUAN, true),
    ("individual_token_refiner_", HUNYUAN, true),
    ("context_embedder_token_refiner_", HUNYUAN, true),
    ("context_embedder_time_text_embed_", HUNYUAN, true),
    ("single_transformer_blocks_", FLUX_OR_HUNYUAN, true),
    ("double_blocks_", FLUX_KIN, true),
    ("single_blocks_", FLUX_KIN, true),
    ("img_mlp_gate_layer", "Qwen-Image-2.1", true),
    ("img_mlp_gate_up", "Qwen-Image-2.1", true),
    ("img_mlp_proj", "Qwen-Image-2.1", true),
    ("img_mlp_out", "Qwen-Image-2.1", true),
    ("joint_transformer_blocks_", "Stable Diffusion 3", true),
    ("joint_blocks_", "Stable Diffusion 3", true),
    ("transformer_blocks_#_ff_", FLUX_OR_SD3, true),
    ("transformer_blocks_#_ff_context_", FLUX_OR_SD3, true),
    ("transformer_blocks_#_norm1_linear", FLUX_OR_SD3, true),
    (
        "transformer_blocks_#_norm1_context_linear",
        FLUX_OR_SD3,
        true,
    ),
    ("down_blocks_", "Stable Diffusion", false),
    ("input_blocks_", "Stable Diffusion", false),
    ("mid_block_", "Stable Diffusion", false),
    ("up_blocks_", "Stable Diffusion", false),
    ("output_blocks_", "Stable Diffusion", false),
    ("middle_block_", "Stable Diffusion", false),
    ("double_stream_blocks_", "HiDream", false),
    ("single_stream_blocks_", "HiDream", false),
    ("_cross_attn_", "Wan or another video model", false),
    ("_self_attn_", "Wan or another video model", false),
    (
        "transformer_blocks_#_attn1_",
        "a video or Stable Diffusion model",
        false,
    ),
    // Z-Image's has a number behind it, and is spelled otherwise.
    ("layers_#_adaln_modulation_", IDEOGRAM, true),
    ("layers_#_attention_o_", IDEOGRAM, true),
    ("layers_#_attn_to_", LUMINA_IN_DIFFUSERS, false),
    ("time_caption_embed_", LUMINA_IN_DIFFUSERS, false),
];

/// HunyuanVideo's own names; HunyuanImage and HunyuanVideo 1.5 share them.
const HUNYUAN: &str = "HunyuanVideo";
/// Blocks of these names are in both, in the spelling of diffusers.
const FLUX_OR_HUNYUAN: &str = "FLUX or HunyuanVideo";
/// Blocks of these names are in all of them, in the spelling of their authors.
const FLUX_KIN: &str = "FLUX, Chroma or HunyuanVideo";
/// Their blocks have the same names, their widths differ.
const FLUX_OR_SD3: &str = "FLUX, HunyuanVideo or Stable Diffusion 3";

/// Its blocks have Z-Image's names but for these.
const IDEOGRAM: &str = "Ideogram 4";
/// Both share names and width. Finetunes of Lumina-Image 2.0, such as Neta-Lumina, are of it, too.
const LUMINA: &str = "Lumina-Image 2.0 or NewBie";
/// Their blocks have the same names in diffusers.
const LUMINA_IN_DIFFUSERS: &str = "Lumina-Image 2.0 or OmniGen2";

/// Names tell within this many bytes; the bound keeps a hostile key cheap.
const MAX_LOOKED_BYTES: usize = 256;

/// (the blocks of models that share names, how many FLUX has): HunyuanVideo has a few more.
const FLUX_BLOCKS: [(&str, u32); 3] = [
    ("single_transformer_blocks", 38),
    ("double_blocks", 19),
    ("single_blocks", 38),
];

/// (a model of the table, inputs of an attention linear, the model that has this width under the
/// same names, whether that one has the text side's linears).
const WIDTHS: [(Model, u64, &str, bool); 6] = [
    (Model::QwenImage, 4096, "Qwen-Image-2.1", false),
    (Model::QwenImage, 1536, "Stable Diffusion 3", true),
    (Model::QwenImage, 2432, "Stable Diffusion 3.5", true),
    (Model::QwenImage, 6144, "FLUX.2", true),
    (Model::ZImage, 2304, LUMINA, true),
    (Model::ZImage, 4608, IDEOGRAM, true),
];

/// A model that a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookalike {
    /// Its name.
    pub model: &'static str,
    /// Whether the key decides by itself.
    pub decides: bool,
    /// Place among all witnesses: a lower one tells more.
    pub place: usize,
}

/// The model of others that a key belongs to, if any.
pub fn witness(key: &str) -> Option<Lookalike> {
    let flat = numberless(key);
    WITNESSES
        .iter()
        .enumerate()
        .find(|(_, (part, _, _))| contains_segment(&flat, part))
        .map(|(place, &(_, model, decides))| Lookalike {
            model,
            decides,
            place,
        })
}

/// Which of the models that share a name it is, by the numbers of the blocks: a file trains all of
/// them as a rule, and FLUX has fewer. `name` where they do not tell.
pub fn by_blocks<'k>(name: &'static str, keys: impl Iterator<Item = &'k str>) -> &'static str {
    if ![FLUX_OR_HUNYUAN, FLUX_KIN].contains(&name) {
        return name;
    }
    let beyond = |key: &str| {
        let flat = suffix::cut(key)
            .map_or(key, |cut| cut.stem)
            .replace('.', "_");
        FLUX_BLOCKS.iter().find_map(|(group, count)| {
            let (_, rest) = flat.split_once(&format!("{group}_"))?;
            let number: u32 = rest.split('_').next()?.parse().ok()?;
            // 1 for a block that FLUX lacks, 0 for its last one.
            number.saturating_add(1).checked_sub(*count)
        })
    };
    match keys.filter_map(beyond).max() {
        Some(0) => "FLUX",
        Some(_) => HUNYUAN,
        None => name,
    }
}

/// The model whose attention has this width under a known model's names.
pub fn by_width(model: Model, width: u64, has_text_side: bool) -> Option<&'static str> {
    let fits = |row: &&(Model, u64, &str, bool)| {
        let (own, wide, _, text_side) = **row;
        own == model && wide == width && (text_side || !has_text_side)
    };
    WIDTHS.iter().find(fits).map(|(_, _, name, _)| *name)
}

/// A key with its dots flattened and `#` in the place of each number between them.
pub(crate) fn numberless(key: &str) -> String {
    let end = key
        .char_indices()
        .map(|(at, _)| at)
        .find(|at| *at >= MAX_LOOKED_BYTES);
    let flat = end
        .and_then(|end| key.get(..end))
        .unwrap_or(key)
        .replace('.', "_");
    let segments: Vec<&str> = flat
        .split('_')
        .map(|segment| {
            let is_number = !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit());
            if is_number { "#" } else { segment }
        })
        .collect();
    segments.join("_")
}

/// `part` in `flat`, beginning at a word: `double_blocks_` is not in `xdouble_blocks_`.
pub(crate) fn contains_segment(flat: &str, part: &str) -> bool {
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
    use crate::model;

    #[test]
    fn names_and_decisions() {
        for (key, expected) in [
            (
                "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
                Some((FLUX_OR_HUNYUAN, true)),
            ),
            (
                "diffusion_model.double_blocks.0.img_mlp.fc1.lora_A.weight",
                Some((HUNYUAN, true)),
            ),
            (
                "lora_unet_double_blocks_0_txt_mlp_fc2.alpha",
                Some((HUNYUAN, true)),
            ),
            (
                "lora_unet_single_blocks_3_modulation_linear.alpha",
                Some((HUNYUAN, true)),
            ),
            (
                "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q.alpha",
                Some((HUNYUAN, true)),
            ),
            (
                "lora_unet_single_blocks_0_linear1.alpha",
                Some((FLUX_KIN, true)),
            ),
            (
                "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
                Some((FLUX_KIN, true)),
            ),
            (
                "transformer.single_transformer_blocks.12.attn.to_qkv_mlp_proj.lora_A.weight",
                Some(("FLUX.2", true)),
            ),
            (
                "transformer.transformer_blocks.12.ff.net.0.proj.lora_A.weight",
                Some((FLUX_OR_SD3, true)),
            ),
            (
                "lora_transformer_transformer_blocks_3_ff_context_net_2.alpha",
                Some((FLUX_OR_SD3, true)),
            ),
            (
                "transformer_blocks.7.ff.linear_in.lora_A.weight",
                Some(("FLUX.2", true)),
            ),
            (
                "transformer.transformer_blocks.31.img_mlp.out.lora_A.weight",
                Some(("Qwen-Image-2.1", true)),
            ),
            (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
                Some(("Stable Diffusion", false)),
            ),
            (
                "transformer_blocks.27.attn1.to_q.lora_A.weight",
                Some(("a video or Stable Diffusion model", false)),
            ),
            (
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                None,
            ),
            (
                "transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight",
                None,
            ),
            ("layers.0.feed_forward.w1.lora_A.weight", None),
            (
                "diffusion_model.layers.0.adaln_modulation.lora_A.weight",
                Some((IDEOGRAM, true)),
            ),
            (
                "lora_unet_layers_33_attention_o.alpha",
                Some((IDEOGRAM, true)),
            ),
            (
                "transformer.layers.25.attn.to_q.lora_A.weight",
                Some((LUMINA_IN_DIFFUSERS, false)),
            ),
        ] {
            let found = witness(key).map(|l| (l.model, l.decides));
            assert_eq!(found, expected, "{key}");
        }
    }

    /// A module of a known model that looked like another's would be refused.
    #[test]
    fn no_module_of_the_table_is_a_witness() {
        for module in model::table().modules() {
            let dotted = format!("{}.lora_A.weight", module.path);
            assert_eq!(witness(&dotted), None, "{dotted}");
        }
    }

    #[test]
    fn the_number_of_blocks_tells_flux_from_its_kin() {
        let name = |name, keys: &[&str]| by_blocks(name, keys.iter().copied());
        let single = "transformer.single_transformer_blocks.37.proj_out.lora_A.weight";
        assert_eq!(name(FLUX_OR_HUNYUAN, &["x", single]), "FLUX");
        let more = "transformer.single_transformer_blocks.39.proj_out.lora_A.weight";
        assert_eq!(name(FLUX_OR_HUNYUAN, &[single, more]), HUNYUAN);
        assert_eq!(
            name(FLUX_KIN, &["lora_unet_double_blocks_19_img_attn_qkv.alpha"]),
            HUNYUAN
        );
        assert_eq!(
            name(FLUX_KIN, &["lora_unet_double_blocks_18_img_attn_qkv.alpha"]),
            "FLUX"
        );
        let few = [
            "single_blocks.0.linear1.alpha",
            "single_blocks.x.linear1.alpha",
            "single_blocks",
        ];
        assert_eq!(name(FLUX_KIN, &few), FLUX_KIN);
        let far = "single_blocks.4294967295.linear1.alpha";
        assert_eq!(name(FLUX_KIN, &[far]), HUNYUAN);
        assert_eq!(name("Chroma", &[single]), "Chroma");
    }

    #[test]
    fn widths_name_models_of_the_same_names() {
        assert_eq!(
            by_width(Model::QwenImage, 4096, false),
            Some("Qwen-Image-2.1")
        );
        // It has no text side: FLUX.2 in one of its sizes has that width and one.
        assert_eq!(by_width(Model::QwenImage, 4096, true), None);
        assert_eq!(by_width(Model::ZImage, 2304, false), Some(LUMINA));
        assert_eq!(by_width(Model::ZImage, 4608, false), Some(IDEOGRAM));
        assert_eq!(by_width(Model::QwenImage, 3072, false), None);
    }
}
