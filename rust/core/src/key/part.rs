//! Parts of a pipeline other than the transformer, told by the names in their keys.

use crate::key::lookalike::{contains_segment, numberless};

/// A part of a pipeline that a file may be of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// A network that steers the transformer.
    ControlNet,
    /// Attention to a picture.
    IpAdapter,
    /// Trained words: textual inversion.
    Embedding,
    /// A network that makes a picture larger.
    Upscaler,
    /// The encoder of a prompt; language models are its kin.
    TextEncoder,
    /// The encoder of a picture for a prompt.
    ImageEncoder,
    /// The network that turns latents to pictures.
    Vae,
}

impl Part {
    /// How people call it, with the article.
    pub fn name(self) -> &'static str {
        match self {
            Self::ControlNet => "a ControlNet",
            Self::IpAdapter => "an IP-Adapter",
            Self::Embedding => "a textual inversion embedding",
            Self::Upscaler => "an upscaler",
            Self::TextEncoder => "a text encoder",
            Self::ImageEncoder => "an image encoder",
            Self::Vae => "a VAE",
        }
    }

    /// The part that a key belongs to, where its names tell.
    pub fn of(key: &str) -> Option<Self> {
        if EMBEDDINGS.contains(&key) {
            return Some(Self::Embedding);
        }
        let flat = numberless(key).to_lowercase();
        let row = ROWS.iter().find(|(part, _)| contains_segment(&flat, part));
        row.map(|(_, part)| *part)
    }
}

/// Whole keys of embeddings: one tensor for each text encoder.
const EMBEDDINGS: [&str; 7] = [
    "emb_params",
    "clip_g",
    "clip_l",
    "t5xxl",
    "qwen25_7b",
    "qwen3_4b",
    "string_to_param",
];

/// (a part of a flattened key in lower case, what it belongs to); `#` stands for a number. The
/// first row that fits decides: an image encoder's layers are named as a text encoder's are.
const ROWS: [(&str, Part); 60] = [
    ("controlnet_", Part::ControlNet),
    ("control_net_", Part::ControlNet),
    ("control_model_", Part::ControlNet),
    ("control_blocks_", Part::ControlNet),
    ("input_hint_block_", Part::ControlNet),
    ("zero_convs_", Part::ControlNet),
    ("ip_adapter_", Part::IpAdapter),
    ("image_proj_", Part::IpAdapter),
    ("to_k_ip_", Part::IpAdapter),
    ("to_v_ip_", Part::IpAdapter),
    ("string_to_param_", Part::Embedding),
    ("model_#_sub_#_", Part::Upscaler),
    ("_rdb1_", Part::Upscaler),
    ("rrdb_trunk_", Part::Upscaler),
    ("residual_group_", Part::Upscaler),
    ("conv_first_", Part::Upscaler),
    ("conv_up1_", Part::Upscaler),
    ("upconv1_", Part::Upscaler),
    ("vision_model_", Part::ImageEncoder),
    ("vision_tower_", Part::ImageEncoder),
    ("visual_blocks_#_", Part::ImageEncoder),
    ("visual_transformer_", Part::ImageEncoder),
    ("visual_patch_embed_", Part::ImageEncoder),
    ("visual_merger_", Part::ImageEncoder),
    ("text_model_", Part::TextEncoder),
    ("text_encoder_", Part::TextEncoder),
    ("text_encoders_", Part::TextEncoder),
    ("text_projection_", Part::TextEncoder),
    ("layers_#_self_attn_", Part::TextEncoder),
    ("layers_#_mlp_gate_proj", Part::TextEncoder),
    ("layers_#_mlp_up_proj", Part::TextEncoder),
    ("layers_#_mlp_down_proj", Part::TextEncoder),
    ("layers_#_input_layernorm", Part::TextEncoder),
    ("layers_#_post_attention_layernorm", Part::TextEncoder),
    ("encoder_block_#_layer_#_", Part::TextEncoder),
    ("transformer_resblocks_#_", Part::TextEncoder),
    ("embed_tokens_", Part::TextEncoder),
    ("token_embedding_", Part::TextEncoder),
    ("lm_head_", Part::TextEncoder),
    ("cond_stage_model_", Part::TextEncoder),
    ("conditioner_embedders_", Part::TextEncoder),
    ("spiece_model", Part::TextEncoder),
    ("vae_", Part::Vae),
    ("first_stage_model_", Part::Vae),
    ("quant_conv_", Part::Vae),
    ("post_quant_conv_", Part::Vae),
    ("decoder_conv", Part::Vae),
    ("encoder_conv", Part::Vae),
    ("decoder_down", Part::Vae),
    ("encoder_down", Part::Vae),
    ("decoder_up", Part::Vae),
    ("encoder_up", Part::Vae),
    ("decoder_mid", Part::Vae),
    ("encoder_mid", Part::Vae),
    ("decoder_head_", Part::Vae),
    ("encoder_head_", Part::Vae),
    ("decoder_norm_out", Part::Vae),
    ("encoder_norm_out", Part::Vae),
    ("taesd_", Part::Vae),
    ("taef1_", Part::Vae),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;

    #[test]
    fn parts_are_told_by_their_names() {
        for (key, expected) in [
            (
                "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj.lora_A.weight",
                Part::TextEncoder,
            ),
            (
                "base_model.model.model.layers.3.mlp.gate_proj.lora_B.weight",
                Part::TextEncoder,
            ),
            ("model.layers.0.self_attn.q_proj.weight", Part::TextEncoder),
            (
                "encoder.block.0.layer.0.SelfAttention.q.weight",
                Part::TextEncoder,
            ),
            (
                "text_model.encoder.layers.0.mlp.fc1.weight",
                Part::TextEncoder,
            ),
            (
                "vision_model.encoder.layers.0.self_attn.k_proj.weight",
                Part::ImageEncoder,
            ),
            ("visual.blocks.0.attn.qkv.weight", Part::ImageEncoder),
            ("decoder.conv1.weight", Part::Vae),
            ("encoder.down_blocks.0.resnets.0.conv1.weight", Part::Vae),
            ("first_stage_model.decoder.conv_in.weight", Part::Vae),
            ("decoder.upsamples.0.residual.2.weight", Part::Vae),
            ("model.1.sub.0.RDB1.conv1.0.weight", Part::Upscaler),
            ("body.0.rdb1.conv1.weight", Part::Upscaler),
            ("conv_first.weight", Part::Upscaler),
            ("controlnet_blocks.0.weight", Part::ControlNet),
            (
                "control_model.input_blocks.1.0.in_layers.0.weight",
                Part::ControlNet,
            ),
            ("image_proj.latents", Part::IpAdapter),
            ("emb_params", Part::Embedding),
            ("clip_g", Part::Embedding),
        ] {
            assert_eq!(Part::of(key), Some(expected), "{key}");
        }
        for key in [
            "blocks.0.self_attn.q.lora_A.weight",
            "double_blocks.0.img_mlp.fc1.lora_A.weight",
            "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
            "something.else",
            "",
        ] {
            assert_eq!(Part::of(key), None, "{key}");
        }
    }

    #[test]
    fn no_module_of_the_table_is_of_another_part() {
        for module in model::table().modules() {
            let key = format!("model.diffusion_model.{}.weight", module.path);
            assert_eq!(Part::of(&key), None, "{key}");
        }
    }
}
