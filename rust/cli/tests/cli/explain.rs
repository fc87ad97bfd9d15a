//! `--explain`: one key.

use insta::assert_snapshot;
use serde_json::Value;

use crate::Folder;
use crate::corpus;
use crate::lora_file::{self, LoraFile};

fn explain(file: &LoraFile, key: &str) -> String {
    let folder = Folder::new();
    let path = file.write(folder.join("style.safetensors"));
    folder
        .run(["--explain", key, path.to_str().unwrap()])
        .text()
}

fn of_corpus(name: &str, key: &str) -> String {
    let (_, file) = corpus::files()
        .into_iter()
        .find(|(other, _)| other == name)
        .unwrap();
    explain(&file, key)
}

#[test]
fn a_factor_that_is_applied() {
    let key = "lora_unet_transformer_blocks_1_attn_to_k.lora_down.weight";
    assert_snapshot!(explain(&lora_file::clean(), key), @"
    exit 0
    --- stdout
    APPLIED      lora_unet_transformer_blocks_1_attn_to_k.lora_down.weight
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     BF16 16x3072
      prefix     `lora_unet_`
      path       `transformer_blocks_1_attn_to_k`
      suffix     `.lora_down.weight`
      role       down: the pair's first factor (LoRA A), rank x in
      module     transformer_blocks.1.attn.to_k
      slot       transformer_blocks.1.attn.to_qkv, part 2 of 3
      adapter    LoRA, rank 16
      scale      0.5 = alpha 8 / rank 16
                 by `lora_unet_transformer_blocks_1_attn_to_k.alpha`
      with       `lora_unet_transformer_blocks_1_attn_to_k.lora_up.weight`
                 `lora_unet_transformer_blocks_1_attn_to_k.alpha`
    ");
}

#[test]
fn an_alpha() {
    let key = "lora_unet_transformer_blocks_1_img_mod_1.alpha";
    assert_snapshot!(explain(&lora_file::clean(), key), @"
    exit 0
    --- stdout
    APPLIED      lora_unet_transformer_blocks_1_img_mod_1.alpha
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     F32 scalar = 8
      prefix     `lora_unet_`
      path       `transformer_blocks_1_img_mod_1`
      suffix     `.alpha`
      role       alpha: the numerator of the scale, alpha / rank
      module     transformer_blocks.1.img_mod.1
      slot       transformer_blocks.1.img_mod.1
      adapter    LoRA, rank 16
      scale      0.5 = alpha 8 / rank 16
                 by `lora_unet_transformer_blocks_1_img_mod_1.alpha`
      with       `lora_unet_transformer_blocks_1_img_mod_1.lora_down.weight`
                 `lora_unet_transformer_blocks_1_img_mod_1.lora_up.weight`
    ");
}

#[test]
fn stacked_prefixes_and_an_adapters_name() {
    let key = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight";
    assert_snapshot!(of_corpus("peft_base_model_default", key), @"
    exit 0
    --- stdout
    APPLIED      base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     F32 16x3072
      prefix     `base_model.model.`
      path       `transformer_blocks.0.attn.to_q`
      suffix     `.lora_A.default.weight`
                 in it the adapter's name, as PEFT writes it: `default`
      role       down: the pair's first factor (LoRA A), rank x in
      module     transformer_blocks.0.attn.to_q
      slot       transformer_blocks.0.attn.to_qkv, part 1 of 3
      adapter    LoRA, rank 16
      scale      1: neither an alpha nor a configuration
      with       `base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight`
    ");
}

#[test]
fn a_key_with_wrappers() {
    let key = "module._fsdp_wrapped_module.transformer_blocks.59._fsdp_wrapped_module.\
               _checkpoint_wrapped_module.attn.to_v.lora_B.weight";
    assert_snapshot!(of_corpus("fsdp_checkpoint_wrapped", key), @"
    exit 0
    --- stdout
    APPLIED      module._fsdp_wrapped_module.transformer_blocks.59._fsdp_wrapped_module._checkpoint_wrapped_module.attn.to_v.lora_B.weight
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     BF16 3072x16
      prefix     none
      wrapper    `module` then `_fsdp_wrapped_module` then `_fsdp_wrapped_module`
                 then `_checkpoint_wrapped_module`, taken out
      path       `transformer_blocks.59.attn.to_v`
      suffix     `.lora_B.weight`
      role       up: the pair's second factor (LoRA B), out x rank
      module     transformer_blocks.59.attn.to_v
      slot       transformer_blocks.59.attn.to_qkv, part 3 of 3
      adapter    LoRA, rank 16
      scale      1: neither an alpha nor a configuration
      with       `module._fsdp_wrapped_module.transform…rapped_module.attn.to_v.lora_A.weight`
    ");
    let key = "lora_unet__orig_mod_transformer_blocks_0_attn_to_out_0.alpha";
    assert_snapshot!(of_corpus("compiled_flat", key), @"
    exit 0
    --- stdout
    APPLIED      lora_unet__orig_mod_transformer_blocks_0_attn_to_out_0.alpha
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     F32 scalar = 8
      prefix     `lora_unet_`
      wrapper    `_orig_mod`, taken out
      path       `transformer_blocks_0_attn_to_out_0`
      suffix     `.alpha`
      role       alpha: the numerator of the scale, alpha / rank
      module     transformer_blocks.0.attn.to_out.0
      slot       transformer_blocks.0.attn.to_out.0
      adapter    LoRA, rank 16
      scale      0.5 = alpha 8 / rank 16
                 by `lora_unet__orig_mod_transformer_blocks_0_attn_to_out_0.alpha`
      with       `lora_unet__orig_mod_transformer_blocks_0_attn_to_out_0.lora_down.weight`
                 `lora_unet__orig_mod_transformer_blocks_0_attn_to_out_0.lora_up.weight`
    ");
}

#[test]
fn a_scale_of_the_configuration() {
    let key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight";
    assert_snapshot!(of_corpus("diffusers_peft_rslora", key), @"
    exit 0
    --- stdout
    APPLIED      transformer.transformer_blocks.0.attn.to_q.lora_B.weight
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     BF16 3072x64
      prefix     `transformer.`
      path       `transformer_blocks.0.attn.to_q`
      suffix     `.lora_B.weight`
      role       up: the pair's second factor (LoRA B), out x rank
      module     transformer_blocks.0.attn.to_q
      slot       transformer_blocks.0.attn.to_qkv, part 1 of 3
      adapter    LoRA, rank 64
      scale      2 = alpha 16 of the configuration / sqrt(rank 64), rsLoRA
      with       `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`
    ");
}

#[test]
fn a_kronecker_factor() {
    let key = "diffusion_model.transformer_blocks.0.attn.to_q.lokr_w1";
    assert_snapshot!(of_corpus("ai_toolkit_lokr_full_f16_inf_alpha", key), @"
    exit 0
    --- stdout
    APPLIED      diffusion_model.transformer_blocks.0.attn.to_q.lokr_w1
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     F16 16x16
      prefix     `diffusion_model.`
      path       `transformer_blocks.0.attn.to_q`
      suffix     `.lokr_w1`
      role       lokr_w1: LoKr's first factor, whole
      module     transformer_blocks.0.attn.to_q
      slot       transformer_blocks.0.attn.to_qkv, part 1 of 3
      adapter    LoKr, rank up to 3072
      scale      1: both factors are stored whole, so that no alpha counts
      with       `diffusion_model.transformer_blocks.0.attn.to_q.alpha`
                 `diffusion_model.transformer_blocks.0.attn.to_q.lokr_w2`
    ");
}

#[test]
fn a_tensor_of_a_lost_module() {
    let key = "diffusion_model.transformer_blocks.7.attn.to_v.lora_E";
    assert_snapshot!(explain(&lora_file::partial(), key), @"
    exit 0
    --- stdout
    LOST         diffusion_model.transformer_blocks.7.attn.to_v.lora_E
                 its module is not applied: AdaLoRA is not supported: only PEFT
                 knows what its tensors make up

      file       [dir]/style.safetensors
      tensor     F32 3072
      prefix     `diffusion_model.`
      path       `transformer_blocks.7.attn.to_v`
      suffix     `.lora_E`
      role       peft_only: a tensor of a kind of adapter that only PEFT knows
      module     transformer_blocks.7.attn.to_v
      slot       transformer_blocks.7.attn.to_qkv, part 3 of 3
      adapter    AdaLoRA
      scale      1: this kind of adapter has no alpha
      with       `diffusion_model.transformer_blocks.7.attn.to_v.lora_A.weight`
                 `diffusion_model.transformer_blocks.7.attn.to_v.lora_B.weight`
    ");
}

#[test]
fn a_foreign_key_and_bookkeeping() {
    let key = "text_encoder.layers.0.q.lora_A.weight";
    assert_snapshot!(explain(&lora_file::partial(), key), @"
    exit 0
    --- stdout
    LEFT OUT     text_encoder.layers.0.q.lora_A.weight
                 text encoder

      file       [dir]/style.safetensors
      tensor     BF16 16x64
      path       belongs to a text encoder, to which nothing is applied
    ");
    assert_snapshot!(explain(&lora_file::partial(), "_aux.step"), @"
    exit 0
    --- stdout
    IGNORED      _aux.step
                 without effect on the image: bookkeeping

      file       [dir]/style.safetensors
      tensor     I64 scalar
      path       bookkeeping
    ");
}

#[test]
fn a_key_of_another_models_file() {
    let key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight";
    assert_snapshot!(explain(&lora_file::flux(), key), @"
    exit 0
    --- stdout
    LOST         transformer.transformer_blocks.0.attn.to_q.lora_A.weight
                 its module is not applied: a FLUX or HunyuanVideo LoRA (it has
                 `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`)

      file       [dir]/style.safetensors
      tensor     BF16 16x3072
      prefix     `transformer.`
      path       `transformer_blocks.0.attn.to_q`
      suffix     `.lora_A.weight`
      role       down: the pair's first factor (LoRA A), rank x in
      module     transformer_blocks.0.attn.to_q
      slot       transformer_blocks.0.attn.to_qkv, part 1 of 3
      adapter    LoRA, rank 16
      scale      1: neither an alpha nor a configuration
      with       `transformer.transformer_blocks.0.attn.to_q.lora_B.weight`
    ");
}

#[test]
fn every_key_of_the_corpus_has_a_screen_that_fits() {
    let folder = Folder::new();
    for (name, file) in corpus::files() {
        let path = file.write(folder.join("file.safetensors"));
        let path = path.to_str().unwrap();
        let document: Value = serde_json::from_str(&folder.run(["--json", path]).stdout).unwrap();
        let tensors = document["tensors"].as_array().unwrap();
        // Of a long file a part shows all that it has.
        for tensor in tensors.iter().step_by(1 + tensors.len() / 5) {
            let key = tensor["key"].as_str().unwrap();
            let outcome = folder.run(["--explain", key, path]);
            assert_eq!(
                (outcome.exit.code(), outcome.stderr.as_str()),
                (0, ""),
                "{name}: {key}"
            );
            for line in outcome
                .stdout
                .lines()
                .skip(1)
                .filter(|line| !line.contains("[dir]"))
            {
                assert!(line.chars().count() <= 90, "{name}: {line}");
            }
            let explained = folder.run(["--json", "--explain", key, path]).stdout;
            let explained: Value = serde_json::from_str(&explained).unwrap();
            assert_eq!(explained["key"], tensor["key"]);
            // Of another model's file the document says of no tensor what it is.
            if !document["model"].is_null() {
                assert_eq!(explained["role"], tensor["role"], "{name}: {key}");
            }
        }
    }
}

#[test]
fn a_key_that_the_file_does_not_have() {
    let text = explain(
        &lora_file::clean(),
        "lora_unet_transformer_blocks_1_attn_to_k.lora_dwn.weight",
    );
    assert_snapshot!(text, @"
    exit 1
    --- stderr
    error: `[dir]/style.safetensors` has no key `lora_unet_transformer_blocks_1_attn_to_k.lora_dwn.weight`
    hint: its nearest keys are
      lora_unet_transformer_blocks_1_attn_to_k.lora_down.weight
      lora_unet_transformer_blocks_0_attn_to_k.lora_down.weight
      lora_unet_transformer_blocks_1_attn_to_q.lora_down.weight
      lora_unet_transformer_blocks_1_attn_to_v.lora_down.weight
      lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight
    ");
    let text = explain(&lora_file::clean(), "transformer_blocks.1.attn.to_k");
    assert_snapshot!(text, @"
    exit 1
    --- stderr
    error: `[dir]/style.safetensors` has no key `transformer_blocks.1.attn.to_k`
    hint: its nearest keys are
      lora_unet_transformer_blocks_1_attn_to_k.lora_down.weight
      lora_unet_transformer_blocks_1_attn_to_k.lora_up.weight
      lora_unet_transformer_blocks_1_attn_to_k.alpha
    ");
    let text = explain(&lora_file::clean(), "something.else.entirely");
    assert_snapshot!(text, @"
    exit 1
    --- stderr
    error: `[dir]/style.safetensors` has no key `something.else.entirely`
    hint: `--all` lists its keys
    ");
}

#[test]
fn a_key_that_is_no_tensor_of_a_module() {
    let folder = Folder::new();
    let says = |key: &str| {
        let outcome = folder.run(["--explain", key]);
        assert_eq!(outcome.exit.code(), 1);
        let mut lines = outcome.stdout.lines().skip(1).map(str::trim);
        lines.by_ref().collect::<Vec<_>>().join(" ")
    };
    let keys = [
        "transformer_blocks.0.attn.to_q",
        "lora_unet__orig_mod_transformer_blocks_0_attn_to_q",
        "transformer_blocks.0.attn.to_q.lora_a.weight",
        "lora_unet_transformer_blocks_0_attn_to_q_lora_C_weight",
        "diffusion_model.transformer_blocks.60.attn.to_q",
        "layers.30.attention.to_q.lora_A.weight",
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te_model_layers_0_mlp_up_proj.alpha",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "vae.decoder.conv_in.weight",
        "emb_params",
        "controlnet_blocks.0.weight",
        "_aux.step",
        "transformer_blocks.0.attn.to_q.base_layer.weight",
        "transformer_blocks.0.attn.to_q.bias",
        "double_blocks.0.img_mlp.fc1.lora_A.weight",
        "something.else",
        "",
    ];
    let rows: Vec<String> = keys
        .iter()
        .map(|key| format!("{key}: {}", says(key)))
        .collect();
    assert_snapshot!(rows.join("\n"), @"
    transformer_blocks.0.attn.to_q: names the module `transformer_blocks.0.attn.to_q`, without an ending that says what the tensor is, such as `.lora_A.weight`
    lora_unet__orig_mod_transformer_blocks_0_attn_to_q: names the module `transformer_blocks.0.attn.to_q`, without an ending that says what the tensor is, such as `.lora_A.weight`
    transformer_blocks.0.attn.to_q.lora_a.weight: names the module `transformer_blocks.0.attn.to_q`, with an unknown ending: `.lora_a.weight`
    lora_unet_transformer_blocks_0_attn_to_q_lora_C_weight: names the module `transformer_blocks.0.attn.to_q`, with an unknown ending: `_lora_C_weight`
    diffusion_model.transformer_blocks.60.attn.to_q: names a block that Qwen-Image does not have (its last is `transformer_blocks.59`)
    layers.30.attention.to_q.lora_A.weight: names a block that Z-Image does not have (its last is `layers.29`)
    text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight: belongs to a text encoder, to which nothing is applied
    lora_te_model_layers_0_mlp_up_proj.alpha: belongs to a text encoder, to which nothing is applied
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: belongs to a text encoder, to which nothing is applied
    vae.decoder.conv_in.weight: belongs to a VAE, to which nothing is applied
    emb_params: belongs to a textual inversion embedding, to which nothing is applied
    controlnet_blocks.0.weight: belongs to a ControlNet, to which nothing is applied
    _aux.step: bookkeeping
    transformer_blocks.0.attn.to_q.base_layer.weight: base weight saved along
    transformer_blocks.0.attn.to_q.bias: a checkpoint's weight
    double_blocks.0.img_mlp.fc1.lora_A.weight: names no module of Qwen-Image or Z-Image, but one as HunyuanVideo has it
    something.else: names no module of Qwen-Image or Z-Image
    : names no module of Qwen-Image or Z-Image
    ");
    assert_snapshot!(folder.run(["--json", "--explain", keys[2]]).text(), @r#"
    exit 1
    --- stdout
    {"schema":1,"key":"transformer_blocks.0.attn.to_q.lora_a.weight","reading":null,"reason":"names the module `transformer_blocks.0.attn.to_q`, with an unknown ending: `.lora_a.weight`"}
    "#);
    // An ending that has two meanings.
    let key = "transformer_blocks.0.attn.to_q.weight";
    assert_snapshot!(folder.run(["--explain", key]).text(), @"
    exit 0
    --- stdout
    KEY          transformer_blocks.0.attn.to_q.weight
                 as it is read in any file; name one to see its scale and its fate

      prefix     none
      path       `transformer_blocks.0.attn.to_q`
      suffix     `.weight`
      role       ia3: the module's own weight, as in a checkpoint; only beside
                 `.on_input` IA3's factors
      module     transformer_blocks.0.attn.to_q
    ");
}

#[test]
fn keys_of_z_image_in_every_spelling() {
    let folder = Folder::new();
    let rows: Vec<String> = [
        "lora_unet_layers_29_attention_qkv.lora_up.weight",
        "diffusion_model.layers.0.attention.q_norm.diff",
        "diffusion_model.layers.0.attention.out.lora_A.weight",
        "transformer.layers.7.feed_forward.net.0.proj.lora_B.weight",
        "transformer.layers.7.feed_forward.net.2.lora_B.weight",
        "lora_unet__noise_refiner_1_attention_to_out_0.alpha",
        "lycoris_context_refiner_0_feed_forward_w3.lokr_w1",
        "diffusion_model.x_embedder.diff_b",
        "transformer.all_x_embedder.2-1.lora_A.weight",
        "diffusion_model.final_layer.linear.lora_down.weight",
        "diffusion_model.final_layer.adaLN_modulation.1.lora_down.weight",
        "pipe.dit.layers.3.adaLN_modulation.0.lora_A.default.weight",
    ]
    .iter()
    .map(|key| {
        let outcome = folder.run(["--json", "--explain", key]);
        assert_eq!(outcome.exit.code(), 0, "{key}");
        let document: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        let reading = &document["reading"];
        let text = |field: &str| reading[field].as_str().unwrap();
        format!("{key}: {} of {}", text("role"), text("target"))
    })
    .collect();
    assert_snapshot!(rows.join("\n"), @"
    lora_unet_layers_29_attention_qkv.lora_up.weight: up of layers.29.attention.to_qkv
    diffusion_model.layers.0.attention.q_norm.diff: diff of layers.0.attention.norm_q
    diffusion_model.layers.0.attention.out.lora_A.weight: down of layers.0.attention.to_out.0
    transformer.layers.7.feed_forward.net.0.proj.lora_B.weight: up of layers.7.feed_forward.net.0.proj
    transformer.layers.7.feed_forward.net.2.lora_B.weight: up of layers.7.feed_forward.w2
    lora_unet__noise_refiner_1_attention_to_out_0.alpha: alpha of noise_refiner.1.attention.to_out.0
    lycoris_context_refiner_0_feed_forward_w3.lokr_w1: lokr_w1 of context_refiner.0.feed_forward.w3
    diffusion_model.x_embedder.diff_b: diff_b of all_x_embedder.2-1
    transformer.all_x_embedder.2-1.lora_A.weight: down of all_x_embedder.2-1
    diffusion_model.final_layer.linear.lora_down.weight: down of all_final_layer.2-1.linear
    diffusion_model.final_layer.adaLN_modulation.1.lora_down.weight: down of all_final_layer.2-1.adaLN_modulation.1
    pipe.dit.layers.3.adaLN_modulation.0.lora_A.default.weight: down of layers.3.adaLN_modulation.0
    ");
}

#[test]
fn keys_that_z_image_lacks() {
    let folder = Folder::new();
    let rows: Vec<String> = [
        "context_refiner.0.adaLN_modulation.0.lora_A.weight",
        "diffusion_model.noise_refiner.2.attention.qkv.lora_A.weight",
        "diffusion_model.layers.0.feed_forward.w13.lora_A.weight",
        "diffusion_model.norm_final.diff",
        "diffusion_model.layers.0.adaln_modulation.lora_A.weight",
        "transformer.layers.0.attn.to_q.lora_A.weight",
    ]
    .iter()
    .map(|key| {
        let outcome = folder.run(["--explain", key]);
        assert_eq!(outcome.exit.code(), 1, "{key}");
        let lines = outcome.stdout.lines().skip(1).map(str::trim);
        format!("{key}: {}", lines.collect::<Vec<_>>().join(" "))
    })
    .collect();
    assert_snapshot!(rows.join("\n"), @"
    context_refiner.0.adaLN_modulation.0.lora_A.weight: names no module of Qwen-Image or Z-Image
    diffusion_model.noise_refiner.2.attention.qkv.lora_A.weight: names a block that Z-Image does not have (its last is `noise_refiner.1`)
    diffusion_model.layers.0.feed_forward.w13.lora_A.weight: names no module of Qwen-Image or Z-Image
    diffusion_model.norm_final.diff: a module that the model never uses
    diffusion_model.layers.0.adaln_modulation.lora_A.weight: names no module of Qwen-Image or Z-Image, but one as Ideogram 4 has it
    transformer.layers.0.attn.to_q.lora_A.weight: names no module of Qwen-Image or Z-Image, but one as Lumina-Image 2.0 or OmniGen2 has it
    ");
}

/// A fused pair is its slot's whole, the parts of the MLP's are its rows in the slot's order.
#[test]
fn the_places_of_z_image_s_modules() {
    let file = LoraFile::new()
        .pair("lora_unet_layers_0_attention_qkv", 96, (11520, 3840))
        .alpha("lora_unet_layers_0_attention_qkv", 48.0)
        .pair("lora_unet_layers_0_feed_forward_w1", 8, (10240, 3840))
        .pair("lora_unet_layers_0_feed_forward_w3", 8, (10240, 3840));
    assert_snapshot!(explain(&file, "lora_unet_layers_0_attention_qkv.lora_up.weight"), @"
    exit 0
    --- stdout
    APPLIED      lora_unet_layers_0_attention_qkv.lora_up.weight
                 it takes part in what is applied

      file       [dir]/style.safetensors
      tensor     BF16 11520x96
      prefix     `lora_unet_`
      path       `layers_0_attention_qkv`
      suffix     `.lora_up.weight`
      role       up: the pair's second factor (LoRA B), out x rank
      module     layers.0.attention.to_qkv
      slot       layers.0.attention.to_qkv
      adapter    LoRA, rank 96
      scale      0.5 = alpha 48 / rank 96
                 by `lora_unet_layers_0_attention_qkv.alpha`
      with       `lora_unet_layers_0_attention_qkv.lora_down.weight`
                 `lora_unet_layers_0_attention_qkv.alpha`
    ");
    let slot = |name: &str| {
        let key = format!("lora_unet_layers_0_feed_forward_{name}.lora_up.weight");
        let text = explain(&file, &key);
        let row = text.lines().find(|line| line.contains(" slot "));
        row.unwrap().trim().to_owned()
    };
    assert_snapshot!(slot("w1"), @"slot       layers.0.feed_forward.net.0.proj, part 2 of 2");
    assert_snapshot!(slot("w3"), @"slot       layers.0.feed_forward.net.0.proj, part 1 of 2");
}

#[test]
fn what_a_file_says_of_a_key_does_not_deny_its_module() {
    let key = "diffusion_model.transformer_blocks.7.attn.to_q.lora_C.weight";
    let file = lora_file::partial().tensor(key, "F32", &[2]);
    assert_snapshot!(explain(&file, key), @"
    exit 0
    --- stdout
    LEFT OUT     diffusion_model.transformer_blocks.7.attn.to_q.lora_C.weight
                 unknown kind of tensor

      file       [dir]/style.safetensors
      tensor     F32 2
      path       names the module `transformer_blocks.7.attn.to_q`, with an unknown
                 ending: `.lora_C.weight`
    ");
}

#[test]
fn a_key_without_a_file() {
    let folder = Folder::new();
    let key = "transformer.transformer_blocks.60.attn.to_q.lora_A.weight";
    assert_snapshot!(folder.run(["--explain", key]).text(), @"
    exit 1
    --- stdout
    KEY          transformer.transformer_blocks.60.attn.to_q.lora_A.weight
                 names a block that Qwen-Image does not have (its last is
                 `transformer_blocks.59`)
    ");
    let key = "lora_unet_transformer_blocks_59_img_mod_1.lora_up.weight";
    assert_snapshot!(folder.run(["--explain", key]).text(), @"
    exit 0
    --- stdout
    KEY          lora_unet_transformer_blocks_59_img_mod_1.lora_up.weight
                 as it is read in any file; name one to see its scale and its fate

      prefix     `lora_unet_`
      path       `transformer_blocks_59_img_mod_1`
      suffix     `.lora_up.weight`
      role       up: the pair's second factor (LoRA B), out x rank
      module     transformer_blocks.59.img_mod.1
    ");
    assert_snapshot!(folder.run(["--json", "--explain", key]).text(), @r#"
    exit 0
    --- stdout
    {"schema":1,"key":"lora_unet_transformer_blocks_59_img_mod_1.lora_up.weight","reading":{"prefixes":["lora_unet_"],"spelling":"transformer_blocks_59_img_mod_1","target":"transformer_blocks.59.img_mod.1","suffix":".lora_up.weight","role":"up","scales":null,"adapter_name":null}}
    "#);
}

#[test]
fn several_files() {
    let folder = Folder::new();
    let clean = lora_file::clean().write(folder.join("clean.safetensors"));
    let flux = lora_file::flux().write(folder.join("flux.safetensors"));
    let key = "lora_unet_transformer_blocks_0_attn_to_q.alpha";
    let args = [
        "--explain",
        key,
        "--json",
        clean.to_str().unwrap(),
        flux.to_str().unwrap(),
    ];
    assert_snapshot!(folder.run(args).text(), @r#"
    exit 1
    --- stdout
    {"schema":1,"path":"[dir]/clean.safetensors","key":"lora_unet_transformer_blocks_0_attn_to_q.alpha","dtype":"F32","shape":[],"value":8.0,"reading":{"prefixes":["lora_unet_"],"spelling":"transformer_blocks_0_attn_to_q","target":"transformer_blocks.0.attn.to_q","suffix":".alpha","role":"alpha","scales":null,"adapter_name":null},"role":"alpha","module":{"target":"transformer_blocks.0.attn.to_q","slot":"transformer_blocks.0.attn.to_qkv","part":0,"parts":3,"adapter":"lora","rank":16,"scale":0.5,"scale_rule":{"rule":"alpha","key":"lora_unet_transformer_blocks_0_attn_to_q.alpha","alpha":8.0,"rank":16},"float8_scales":[],"tensor_scale":null,"keys":["lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight","lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight","lora_unet_transformer_blocks_0_attn_to_q.alpha"]},"fate":{"fate":"applied"}}
    {"schema":1,"path":"[dir]/flux.safetensors","error":"`[dir]/flux.safetensors` has no key `lora_unet_transformer_blocks_0_attn_to_q.alpha`","nearest":["transformer.transformer_blocks.0.attn.to_q.lora_A.weight","transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]}
    --- stderr
    error: `[dir]/flux.safetensors` has no key `lora_unet_transformer_blocks_0_attn_to_q.alpha`
    hint: its nearest keys are
      transformer.transformer_blocks.0.attn.to_q.lora_A.weight
      transformer.transformer_blocks.0.attn.to_q.lora_B.weight
    "#);
}

#[test]
fn hostile_keys() {
    let key = "x\u{1b}[2J\nAPPLIED      fine\r\u{202e}`";
    let file = lora_file::clean().tensor(key, "F32", &[2]);
    assert_snapshot!(explain(&file, key), @r"
    exit 0
    --- stdout
    LEFT OUT     x\u{1b}[2J\u{a}APPLIED      fine\u{d}\u{202e}`
                 not a transformer module

      file       [dir]/style.safetensors
      tensor     F32 2
      path       names no module of Qwen-Image or Z-Image
    ");
    assert_snapshot!(explain(&file, "x\u{1b}[2J\nAPPLIED      fine"), @r"
    exit 1
    --- stderr
    error: `[dir]/style.safetensors` has no key `x\u{1b}[2J\u{a}APPLIED      fine`
    hint: its nearest keys are
      x\u{1b}[2J\u{a}APPLIED      fine\u{d}\u{202e}`
    ");
}
