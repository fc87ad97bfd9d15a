//! Files of other models, of other parts of a pipeline, and files that are no LoRAs: what is said of
//! them.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod state_dict;

use qwenlora_core::plan::Verdict;
use state_dict::{TO_Q, Tensors};

#[test]
fn another_models_name_makes_a_note() {
    let notes_by = |key: &str, name: &str| {
        let tensors = Tensors::default().peft(&TO_Q.replace(".0.", ".40."), 16);
        let plan = tensors.metadata(key, name).plan();
        assert_eq!(plan.verdict(), Verdict::Apply, "{name}");
        plan.notes().to_vec()
    };
    let notes = |name: &str| notes_by("ss_base_model_version", name);
    for name in [
        "qwen_image",
        "Qwen-Image-Edit",
        "z_image",
        "zimage",
        "Z-Image",
        "",
    ] {
        assert!(notes(name).is_empty(), "{name}");
    }
    insta::assert_snapshot!(
        notes("mageflow").join("\n"),
        @"the metadata names another model, `mageflow`: names and shapes are qwen-image's"
    );
    insta::assert_snapshot!(
        notes_by("modelspec.architecture", "flux-1-dev/lora").join("\n"),
        @"the metadata names another model, `flux-1-dev/lora`: names and shapes are qwen-image's"
    );
    assert!(notes_by("modelspec.architecture", "Qwen-Image-Edit/lora").is_empty());
}

#[test]
fn attention_of_the_first_blocks_alone_may_be_another_models() {
    let notes = |paths: &[&str]| {
        let tensors = paths
            .iter()
            .fold(Tensors::default(), |t, path| t.peft(path, 16));
        tensors.plan().notes().len()
    };
    let text = "transformer_blocks.19.attn.add_q_proj";
    assert_eq!(notes(&[TO_Q, text]), 1);
    assert_eq!(notes(&[TO_Q, "transformer_blocks.20.attn.to_q"]), 0);
    assert_eq!(
        notes(&[TO_Q, "time_text_embed.timestep_embedder.linear_2"]),
        0
    );
}

#[test]
fn other_models_are_named_where_they_can_be_told() {
    let pair = |tensors: Tensors, stem: &str, out: u64, inp: u64| {
        tensors
            .tensor(&format!("{stem}.lora_A.weight"), &[16, inp])
            .tensor(&format!("{stem}.lora_B.weight"), &[out, 16])
    };
    let reason = |rows: &[(&str, u64, u64)]| {
        let tensors = rows.iter().fold(Tensors::default(), |t, (stem, out, inp)| {
            pair(t, stem, *out, *inp)
        });
        let plan = tensors.plan();
        assert_eq!(plan.verdict(), Verdict::Reject, "{rows:?}");
        plan.reason().unwrap()
    };
    let block = |name: &str| format!("transformer_blocks.3.{name}");
    insta::assert_snapshot!(
        reason(&[(&block("attn.to_q"), 3072, 3072), (&block("ff.net.0.proj"), 12288, 3072)]),
        @"a FLUX, HunyuanVideo or Stable Diffusion 3 LoRA (it has `transformer_blocks.3.ff.net.0.proj.lora_A.weight`)"
    );
    insta::assert_snapshot!(
        reason(&[
            (&block("ff.net.0.proj"), 12288, 3072),
            ("single_transformer_blocks.0.attn.to_q", 3072, 3072),
        ]),
        @"a FLUX or HunyuanVideo LoRA (it has `single_transformer_blocks.0.attn.to_q.lora_A.weight`)"
    );
    insta::assert_snapshot!(
        reason(&[(&block("attn.to_q"), 4096, 4096)]),
        @"a LoRA of another model, probably Qwen-Image-2.1: `transformer_blocks.3.attn.to_q` is 4096x4096 where qwen-image has 3072x3072"
    );
    insta::assert_snapshot!(
        reason(&[(&block("attn.to_q"), 1536, 1536), (&block("attn.add_k_proj"), 1536, 1536)]),
        @"a LoRA of another model, probably Stable Diffusion 3: `transformer_blocks.3.attn.to_q` is 1536x1536 where qwen-image has 3072x3072"
    );
    for stem in [
        "layers.3.attention.to_q",
        "lora_unet_layers_3_attention_out",
    ] {
        let said = reason(&[(stem, 2304, 2304)]);
        let begin =
            "a LoRA of another model, probably Lumina-Image 2.0 or NewBie: `layers.3.attention.";
        assert!(said.starts_with(begin), "{said}");
    }
    insta::assert_snapshot!(
        reason(&[("layers.25.attention.qkv", 3840, 2304), ("layers.25.feed_forward.w2", 2304, 9216)]),
        @"a LoRA of another model, probably Lumina-Image 2.0 or NewBie: `layers.25.attention.to_qkv` is 3840x2304 where z-image has 11520x3840"
    );
    // NewBie has more blocks than Z-Image.
    insta::assert_snapshot!(
        reason(&[("layers.35.attention.qkv", 3840, 2304), ("layers.29.attention.out", 2304, 2304)]),
        @"a LoRA of another model, probably Lumina-Image 2.0 or NewBie: `layers.29.attention.to_out.0` is 2304x2304 where z-image has 3840x3840"
    );
    insta::assert_snapshot!(
        reason(&[("layers.25.attn.to_q", 2304, 2304), ("layers.25.attn.to_k", 768, 2304)]),
        @"a LoRA of another model, probably Lumina-Image 2.0 or OmniGen2"
    );
    insta::assert_snapshot!(
        reason(&[("layers.33.attention.qkv", 13824, 4608), ("layers.33.attention.o", 4608, 4608)]),
        @"an Ideogram 4 LoRA (it has `layers.33.attention.o.lora_A.weight`)"
    );
    insta::assert_snapshot!(
        reason(&[("layers.3.attention.qkv", 13824, 4608), ("layers.3.feed_forward.w1", 12288, 4608)]),
        @"a LoRA of another model, probably Ideogram 4: `layers.3.attention.to_qkv` is 13824x4608 where z-image has 11520x3840"
    );
    insta::assert_snapshot!(
        reason(&[("layers.3.attention.to_q", 2304, 2304)]),
        @"a LoRA of another model, probably Lumina-Image 2.0 or NewBie: `layers.3.attention.to_q` is 2304x2304 where z-image has 3840x3840"
    );
    insta::assert_snapshot!(
        reason(&[(&block("attn.to_q"), 64, 64)]),
        @"a LoRA of another model: `transformer_blocks.3.attn.to_q` is 64x64 where qwen-image has 3072x3072"
    );
}

/// The reason for a file of these tensors, none of which is applied, and the reasons of the tensors.
fn told(keys: &[&str]) -> (String, Vec<String>) {
    let tensors = keys.iter().fold(Tensors::default(), |t, key| {
        t.tensor(
            key,
            &[
                if key.ends_with(".lora_B.weight") {
                    64
                } else {
                    4
                },
                4,
            ],
        )
    });
    let plan = tensors.plan();
    assert_eq!(plan.verdict(), Verdict::Reject, "{keys:?}");
    let document: serde_json::Value = serde_json::from_str(&plan.to_json()).unwrap();
    let rows = document["tensors"].as_array().unwrap().iter();
    let reasons = rows.map(|row| row["reason"].as_str().unwrap().to_owned());
    (plan.reason().unwrap(), reasons.collect())
}

/// (keys of a file, how the reason for it begins).
const NO_LORAS: [(&[&str], &str); 19] = [
    (
        &[
            "model.layers.0.self_attn.q_proj.weight",
            "model.norm.weight",
        ],
        "a checkpoint of a text encoder, not a LoRA: it holds whole weights, as `model.layers.0.self_attn.q_proj.weight`",
    ),
    (
        &[
            "visual.blocks.0.attn.qkv.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
        ],
        "a checkpoint of a text encoder, not a LoRA: ",
    ),
    (
        &["vision_model.encoder.layers.0.self_attn.k_proj.weight"],
        "a checkpoint of an image encoder, not a LoRA: ",
    ),
    (
        &["decoder.conv1.weight", "encoder.conv1.weight"],
        "a checkpoint of a VAE, not a LoRA: ",
    ),
    (
        &["model.1.sub.0.RDB1.conv1.0.weight", "model.0.weight"],
        "a checkpoint of an upscaler, not a LoRA: ",
    ),
    (
        &[
            "transformer_blocks.0.attn.to_q.weight",
            "controlnet_blocks.0.weight",
        ],
        "a checkpoint of a ControlNet, not a LoRA: ",
    ),
    (
        &["transformer_blocks.0.attn.to_q.weight", "img_in.bias"],
        "a checkpoint of Qwen-Image, not a LoRA: it holds whole weights, as `transformer_blocks.0.attn.to_q.weight`",
    ),
    (
        &[
            "transformer_blocks.0.attn.to_qkv.qweight",
            "transformer_blocks.0.attn.to_qkv.proj_down",
            "transformer_blocks.0.img_mod.1.weight.absmax",
        ],
        "a checkpoint of Qwen-Image, not a LoRA: ",
    ),
    (
        &["layers.0.attention.to_q.weight"],
        "a checkpoint of Z-Image, not a LoRA: ",
    ),
    (
        &[
            "model.diffusion_model.transformer_blocks.0.attn.to_q.weight",
            "first_stage_model.decoder.conv1.weight",
            "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj.weight",
        ],
        "a checkpoint of Qwen-Image, not a LoRA: ",
    ),
    (
        &["double_blocks.0.img_mlp.fc1.weight"],
        "a checkpoint of HunyuanVideo, not a LoRA: ",
    ),
    (
        &[
            "blocks.0.self_attn.q.weight",
            "blocks.0.cross_attn.q.weight",
        ],
        "a checkpoint of Wan or another video model, not a LoRA: ",
    ),
    (
        &[
            "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
            "first_stage_model.decoder.conv_in.weight",
            "first_stage_model.encoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ],
        "a checkpoint of Stable Diffusion, not a LoRA: it holds whole weights, as `model.diffusion_model.input",
    ),
    (
        &[
            "down_blocks.0.resnets.0.conv1.weight",
            "controlnet_cond_embedding.conv_in.weight",
        ],
        "a checkpoint of a ControlNet, not a LoRA: ",
    ),
    (
        &[
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.mid_block.attentions.0.to_q.weight",
        ],
        "a checkpoint of a VAE, not a LoRA: ",
    ),
    (
        &["emb_params"],
        "a textual inversion embedding, not a LoRA (it has `emb_params`)",
    ),
    (
        &["clip_g", "clip_l"],
        "a textual inversion embedding, not a LoRA (it has `clip_",
    ),
    (
        &["net.0.weight"],
        "a checkpoint, not a LoRA: it holds whole weights, as `net.0.weight`",
    ),
    (
        &["something.else"],
        "no key names a module of Qwen-Image or Z-Image (the first is `something.else`)",
    ),
];

#[test]
fn files_that_are_no_loras_are_told_as_what_they_are() {
    for (keys, expected) in NO_LORAS {
        let (reason, _) = told(keys);
        assert!(reason.starts_with(expected), "{reason}");
    }
    assert_eq!(told(&[]).0, "the file holds no tensor");
}

#[test]
fn loras_of_other_parts_are_told_as_such() {
    let pair = |stem: &str| ["A", "B"].map(|half| format!("{stem}.lora_{half}.weight"));
    for (stem, expected, own) in [
        (
            "text_encoder.model.layers.0.self_attn.q_proj",
            "a LoRA of a text encoder: ",
            "text encoder",
        ),
        (
            "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj",
            "a LoRA of a text encoder: ",
            "text encoder",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj",
            "a LoRA of a text encoder: ",
            "text encoder",
        ),
        (
            "base_model.model.model.language_model.layers.3.mlp.gate_proj",
            "a LoRA of a text encoder: ",
            "text encoder",
        ),
        (
            "vae.decoder.mid_block.attentions.0.to_q",
            "a LoRA of a VAE: ",
            "VAE",
        ),
        (
            "visual.blocks.0.attn.qkv",
            "a LoRA of an image encoder: ",
            "other model",
        ),
        (
            "controlnet_blocks.0",
            "a LoRA of a ControlNet: ",
            "other model",
        ),
        (
            "blocks.0.self_attn.q",
            "a LoRA of another model, probably Wan",
            "other model",
        ),
    ] {
        let pair = pair(stem);
        let (reason, reasons) = told(&pair.each_ref().map(String::as_str));
        assert!(reason.starts_with(expected), "{stem}: {reason}");
        assert_eq!(reasons, [own, own], "{stem}");
    }
}

/// A LoRA of a whole pipeline is called by its transformer, however little of it that is.
#[test]
fn text_encoders_beside_a_transformer_do_not_name_the_file() {
    for stem in [
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "diffusion_model.blocks.0.cross_attn.q",
    ] {
        let text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
        let keys = [
            format!("{text}.lora_down.weight"),
            format!("{text}.lora_up.weight"),
            format!("{text}.alpha"),
            format!("{stem}.lora_down.weight"),
        ];
        let (reason, reasons) = told(&keys.each_ref().map(String::as_str));
        assert!(
            reason.starts_with("a LoRA of another model, probably "),
            "{reason}"
        );
        assert_eq!(reasons.first().unwrap(), "text encoder");
        assert_eq!(reasons.last().unwrap(), "other model");
    }
}

#[test]
fn whole_weights_beside_another_adapter_are_told() {
    let (reason, _) = told(&["img_in.weight", "text_encoder.q.lora_A.weight"]);
    insta::assert_snapshot!(reason, @"no adapter of it is of a module of Qwen-Image, only whole weights are");
}

#[test]
fn models_of_double_and_single_blocks_are_not_all_flux() {
    for (stem, expected) in [
        (
            "diffusion_model.double_blocks.0.img_mlp.fc1",
            "a HunyuanVideo LoRA (it has ",
        ),
        (
            "lora_unet_double_blocks_0_img_mlp_fc2",
            "a HunyuanVideo LoRA (it has ",
        ),
        (
            "lora_unet_single_blocks_0_modulation_linear",
            "a HunyuanVideo LoRA (it has ",
        ),
        (
            "diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1",
            "a HunyuanVideo LoRA (it has ",
        ),
        (
            "transformer.clean_x_embedder.proj",
            "a FramePack LoRA (it has ",
        ),
        (
            "transformer.single_transformer_blocks.39.attn.to_q",
            "a HunyuanVideo LoRA (it has ",
        ),
        (
            "transformer.single_transformer_blocks.37.attn.to_q",
            "a FLUX LoRA (it has ",
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_q",
            "a FLUX or HunyuanVideo LoRA (it has ",
        ),
        (
            "diffusion_model.double_blocks.0.img_mlp.0",
            "a FLUX, Chroma or HunyuanVideo LoRA (it has ",
        ),
        (
            "lora_unet_single_blocks_0_linear1",
            "a FLUX, Chroma or HunyuanVideo LoRA (it has ",
        ),
        (
            "lora_unet_double_blocks_18_img_attn_qkv",
            "a FLUX LoRA (it has ",
        ),
        (
            "lora_unet_distilled_guidance_layer_layers_0_in_layer",
            "a Chroma LoRA (it has ",
        ),
    ] {
        let (reason, _) = told(&[
            &format!("{stem}.lora_A.weight"),
            &format!("{stem}.lora_B.weight"),
        ]);
        assert!(reason.starts_with(expected), "{stem}: {reason}");
    }
}

#[test]
fn an_unknown_ending_does_not_deny_the_module() {
    for (down, up) in [
        ("lora_a.weight", "lora_b.weight"),
        ("lora_A.Weight", "lora_B.Weight"),
        ("q_layer.weight", "p_layer.weight"),
        ("lora_layer.down.weight", "lora_layer.up.weight"),
        ("LORA_DOWN.weight", "LORA_UP.weight"),
    ] {
        let stem = "diffusion_model.transformer_blocks.20.attn.to_q";
        let (reason, reasons) = told(&[&format!("{stem}.{down}"), &format!("{stem}.{up}")]);
        assert_eq!(
            reason,
            format!(
                "a LoRA of Qwen-Image of an unknown kind: `{stem}.{down}` names the module \
                 `transformer_blocks.20.attn.to_q`, with an ending that is not known"
            )
        );
        assert_eq!(reasons, ["unknown kind of tensor"; 2]);
    }
    let (reason, reasons) = told(&["layers.30.attention.to_q.lora_A.weight"]);
    insta::assert_snapshot!(reason, @"a LoRA of another model: `layers.30.attention.to_q.lora_A.weight` names a block that Z-Image does not have (its last is `layers.29`)");
    assert_eq!(reasons, ["block index out of range"]);
}
